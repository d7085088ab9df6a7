"""The page of a study in the docs: its answers, tables and figures, between markers."""

from tests.support import simulated_study
from tools import marked, study_page
from tools.study_page import BEGIN, END


def test_the_section_says_what_the_study_found(tmp_path):
    made = simulated_study.study(tmp_path / "some", count=4, seeds=3)
    made.folder.report.mkdir(parents=True)
    for name in ("members.svg", "shapes_tifa-train_flops.svg"):
        (made.folder.report / name).touch()
    text = study_page.text(made, "reports/some", ["shapes_tifa"], "reports/some/samples.png")
    lines = text.splitlines()
    assert lines[0] == BEGIN and lines[-1] == END and max(map(len, lines)) < 400
    assert "12 runs are shown" in text.replace("\n", " ") and "reports/some/index.html" in text
    rows = [line for line in lines if line.startswith(("| uvit", "| pixart"))]
    assert len(rows) == 4
    values = [row["shapes_tifa"] for row in made.rows if (row["member"], row["step"]) == ("uvit-000", 1000)]
    assert f"| {sum(values) / 3:.3f} ± " in rows[0] and rows[0].endswith("| 3 |")
    # Seconds of the first member's runs.
    assert "| 60 |" in rows[0] and "1,000 |" in rows[0]
    claim = next(line for line in lines if line.startswith("| the larger is better"))
    assert "supported" in claim or "undecided" in claim or "refuted" in claim
    assert "![Samples](reports/some/samples.png)" in lines
    # Figures that the report has, and no others.
    assert text.count(".svg)") == 2


def test_a_claim_without_runs_is_not_answered(tmp_path):
    made = simulated_study.study(tmp_path, count=2, seeds=2)
    text = study_page.text(simulated_study.with_rows(made, []), "there", [])
    assert "not answered yet" in text and "No run of 4 has finished" in text


def test_a_page_is_made_and_written_again(tmp_path):
    page = tmp_path / "page.md"
    marked.write(page, f"{BEGIN}\none\n{END}", BEGIN, END, "# Title\n\n")
    page.write_text(page.read_text() + "\nA remark.\n")
    marked.write(page, f"{BEGIN}\ntwo\n{END}", BEGIN, END, "# Title\n\n")
    assert page.read_text() == f"# Title\n\n{BEGIN}\ntwo\n{END}\n\nA remark.\n"

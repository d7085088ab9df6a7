"""The report is one page that holds all it shows, with the answer first."""

import csv
import dataclasses
import html
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.monitor.grid import write_png
from scaling_dit.scaling import figure_data, figures, findings, fitted, report, tables
from tests.support import simulated_study
from tests.support.paths import ROOT

few_resamples = simulated_study.few_resamples(fitted, 20)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = simulated_study.study(tmp_path_factory.mktemp("report"), count=6, seeds=3)
    for step in (250, 1000):
        folder = made.folder.run("uvit-000", 0).metrics
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"samples-{step:08d}.png", np.full((20, 30, 3), step % 256, np.uint8))
    return made


@pytest.fixture(scope="module")
def page(study):
    return report.write(study, prints=False).read_text()


def embedded(page, name):
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_answer_comes_first_in_the_words_of_the_tests(study, page):
    answer = findings.headline(study, findings.answers(study))
    body = page[page.index("<body>") :]
    assert body.index(study.spec.question) < body.index('class="answer"') < body.index("<h2>")
    assert f'<p class="answer">{html.escape(answer)}</p>' in body


def test_the_page_asks_for_nothing(page):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy
    # Outside of scripts nothing refers to anything; inside, addresses are names of schemas.
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert (
        not re.search(r'(src|href)="(?!data:)', markup) and "@import" not in markup and "url(" not in markup
    )
    assert len(page) < 5_000_000 and "vegaEmbed" in page


def test_every_chart_has_its_data_and_its_place(page):
    held, drawn = embedded(page, "data"), embedded(page, "figures")["figures"]
    assert len(drawn) >= 12
    for figure in drawn:
        assert f'id="chart-{figure["name"]}"' in page
        assert set(figure["data"]) <= held.keys() and held[figure["data"][0]]
        # Fields that a chart draws are columns of its data.
        fields = set(re.findall(r'"field": "(\w+)"', json.dumps(figure["spec"])))
        assert fields <= {column for name in figure["data"] for row in held[name] for column in row}, figure[
            "name"
        ]
    names = {figure["name"] for figure in drawn}
    for axis in ("step", "train_flops", "params", "inference_flops"):
        assert {f"shapes_tifa-{axis}", f"loss-{axis}"} <= names
    assert {"claims", "members", "frontier", "laws", "types", "timesteps", "time", "goodput"} <= names


def test_colours_of_text_and_marks_have_contrast(page):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = page[page.index("<style>") : page.index("</style>")]
    inks = re.findall(r"(?<![-\w])color: (#[0-9a-f]{6})", style)
    assert len(inks) >= 5
    # The darkest background of text is #f2f6fa.
    for ink in (*inks, *figures.COLOURS):
        assert (luminance("#f2f6fa") + 0.05) / (luminance(ink) + 0.05) >= 4.5, ink


def test_samples_have_a_slider_over_points(page):
    assert 'id="point" min="0" max="1"' in page
    (holder,) = re.findall(r'data-grids="([^"]+)"', page)
    rows = json.loads(holder.replace("&quot;", '"'))
    assert [row["step"] for row in rows] == [250, 1000] and len(embedded(page, "figures")["grids"]) == 2


def test_the_table_by_member_as_csv_and_latex(study, page):
    rows = list(csv.DictReader(io.StringIO((study.folder.report / "members.csv").read_text())))
    assert [row["member"] for row in rows] == [member.name for member in study.spec.members]
    assert float(rows[0]["loss"]) == findings.by_member(study)[0]["loss"]
    latex = (study.folder.report / "members.tex").read_text()
    assert latex.count(r"\\") == 7 and r"shapes\_tifa" in latex and r"$\pm$" in latex
    assert tables.matched_latex([], [], "50 % & a_b").count(r"50 \% \& a\_b") == 1


def test_configs_and_commands_of_all_runs(study, page):
    for member in study.spec.members:
        assert f"runs/{member.name}/seed2" in page
    assert (
        "backbone.name = &#x27;pixart&#x27;" in page and f"scaling-dit study --workdir={study.folder}" in page
    )
    # With --from and no --config they would begin another run, of the base's config.
    assert "resume a run that lies in its folder" in page and "--from" not in re.sub(
        r"<script.*?</script>", "", page
    )


def test_words_of_a_user_cannot_become_markup(tmp_path):
    made = simulated_study.study(tmp_path, count=2, seeds=2)
    spec = dataclasses.replace(made.spec, question="</script><script>alert(1)</script> @data@?")
    text = report.write(dataclasses.replace(made, spec=spec), prints=False).read_text()
    assert "alert(1)</script>" not in text and "&lt;script&gt;alert(1)" in text


def test_an_empty_study_has_a_report(tmp_path):
    made = simulated_study.with_rows(simulated_study.study(tmp_path, count=2, seeds=2), [])
    text = report.write(made, prints=False).read_text()
    assert "No run of 4 has finished yet." in text


def test_each_figure_is_printed_as_svg_and_png(study):
    held = figure_data.data_of(study, findings.answers(study), [])
    made = figures.figures(study, held)
    figure = next(one for one in made if one.name == "members")
    convert = figures.converter()
    svg = convert.vegalite_to_svg(figures.printed(figure, held))
    # A mark for each run and one for each mean.
    assert svg.count('aria-roledescription="point"') == 18 and svg.count('aria-roledescription="tick"') == 6
    assert convert.svg_to_png(svg)[:4] == b"\x89PNG"


def test_guidance_is_a_chart_where_several_scales_were_scored(study):
    def names(made):
        return {one.name for one in figures.figures(made, figure_data.data_of(made, [], []))}

    assert "guidance" not in names(study)
    several = [{**row, "guidance": scale} for row in study.scores for scale in (1.5, 3.0)]
    assert "guidance" in names(dataclasses.replace(study, scores=several))


def test_the_laws_in_print_stand_with_what_is_wrong_with_one(page):
    section = page[page.index("<h2>Laws in print</h2>") :]
    section = section[: section.index("</section>")]
    assert "The exponent cannot be right: TIFA is at most 1" in section
    row = section[section.index("SDXL&#x27;s UNet: 2,392 million parameters") :]
    assert row.index("<td>1.812</td>") < row.index("<td>0.839</td>")
    assert "LensArt and SSTK with synthetic captions: 7,300 million image-noun pairs" in section


def test_early_signals_are_by_score_loss_and_timestep(page):
    section = page[page.index("<h2>Early signal</h2>") :]
    section = section[: section.index("</section>")]
    for head in ("by shapes_tifa", "by validation loss", "by loss at timesteps 0000-0499"):
        assert f'<th scope="col">{head}</th>' in section
    assert "At a lower resolution" not in section


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"report needs vl-convert: pip install 'scaling-dit\[study\]'"):
        figures.converter()


def test_a_run_and_a_study_are_not_reported_together(tmp_path, capsys):
    (tmp_path / "study.json").write_text("{}")
    assert cli.main(["report", str(tmp_path), str(tmp_path / "run")]) == 2
    assert "is no study, so it cannot be reported together" in capsys.readouterr().err


THOUSAND = """
import sys, time
from peak import peak_mib
from scaling_dit.scaling import report
from tests.support import simulated_study
made = simulated_study.study(sys.argv[1], count=334, seeds=3)
began = time.process_time()
page = report.write(made)
print(time.process_time() - began, round(peak_mib() * 2**10), page)
"""


@pytest.mark.slow
def test_a_thousand_runs_take_less_than_half_a_minute_and_two_gib(tmp_path):
    """In a process of its own, whose memory nothing else has used."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
    command = [sys.executable, "-c", THOUSAND, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, kibibytes, page = done.stdout.split()
    print(f"{float(seconds):.1f} s of the processor, {int(kibibytes) / 2**20:.2f} GiB at most")
    # Of the processor: what else runs here takes its share of the clock.
    assert float(seconds) < 30 and int(kibibytes) < 2 * 2**20
    page = pathlib.Path(page)
    assert page.stat().st_size < 5_000_000
    assert "the best 40 of 334 members" in page.read_text()

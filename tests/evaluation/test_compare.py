"""Comparison of runs by prompt: the arithmetic on known numbers, and the verb on made results."""

import json

import numpy as np
import pytest
from etils import epath
from scipy import stats

from scaling_dit.cli import main as cli
from scaling_dit.config import own_code
from scaling_dit.errors import UserError
from scaling_dit.evaluation import compare, sweep
from scaling_dit.evaluation.differences import Difference, holm, paired_bootstrap
from scaling_dit.evaluation.results import DONE, SKIPPED, Results


def test_a_paired_difference_is_students():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    found, (statistic, p) = Difference.paired(a, b), stats.ttest_rel(a, b)
    assert found.p() == pytest.approx(p) and found.effect / found.error == pytest.approx(statistic)
    welch = Difference.welch(a, b[:20])
    assert welch.p() == pytest.approx(stats.ttest_ind(a, b[:20], equal_var=False).pvalue)
    low, high = found.interval()
    assert (low + high) / 2 == pytest.approx(found.effect)
    same = Difference.paired(a, a)
    assert same.p() == 1 and same.p(0.5) == 0 and same.detectable() == 0


def test_the_bootstrap_over_prompts():
    rng = np.random.default_rng(1)
    a = rng.normal(size=400)
    b = a - 0.2 + rng.normal(scale=0.5, size=400)
    found = paired_bootstrap(a, b, seed=3)
    exact = Difference.paired(a, b)
    assert found.effect == exact.effect and found.n == 400 and found.detectable == exact.detectable()
    np.testing.assert_allclose(found.interval, exact.interval(), atol=0.01)
    # The smallest p that 2000 resamples can give.
    assert found.p == pytest.approx(2 / 2001)
    assert paired_bootstrap(a, a).p == 1 and paired_bootstrap(a, a).interval == (0, 0)
    assert paired_bootstrap(b, a, seed=3).effect == -found.effect
    null = [paired_bootstrap(*rng.normal(size=(2, 60)), seed=i).p for i in range(40)]
    assert 0 <= np.mean(np.array(null) < 0.05) < 0.2


def test_the_smallest_detectable_difference_is_detected_in_80_of_100():
    rng = np.random.default_rng(2)
    detectable = Difference.paired(rng.normal(size=4000), np.zeros(4000)).detectable()
    found = []
    for _ in range(400):
        differences = rng.normal(detectable * (4000 / 100) ** 0.5, 1, size=100)
        found.append(Difference.paired(differences, np.zeros(100)).p() < 0.05)
    assert 0.72 < np.mean(found) < 0.88


def write_run(root, values, metric="tifa", guidance=(7.5,), seeds=(0,), **changes):
    """Results of one run; `values` [N] are scores of prompts, or none for a metric without."""
    results = Results(epath.Path(root))
    for scale in guidance:
        for seed in seeds:
            folder = epath.Path(root) / f"g{scale}-s{seed}" / metric
            folder.mkdir(parents=True, exist_ok=True)
            scores = np.asarray(values) + 0.01 * (seed - np.mean(seeds)) - 0.1 * abs(scale - 5) / 5
            rows = [{"id": f"p{i}", "prompt": "x", "score": float(s)} for i, s in enumerate(scores)]
            text = "".join(json.dumps(row) + "\n" for row in rows) if metric != "fid" else '{"id": "p0"}\n'
            (folder / "rows.jsonl").write_text(text)
            row = {
                "status": DONE, "metric": metric, "step": 100, "seed": seed, "guidance": scale, "n": len(rows),
                "prompts_sha256": "abc", "judge": "j", "sampler": "ddim", "steps": 50,
                "scalars": {metric: float(scores.mean())}, "interval": [0, 1],
            }  # fmt: skip
            results.add(row | changes, folder)


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(4)
    base = rng.uniform(0.2, 0.8, 200)
    noise = rng.normal(scale=0.05, size=(2, 200))
    scales = (1.5, 5.0, 7.5)
    write_run(tmp_path / "a", base, guidance=scales, seeds=(0, 1))
    write_run(tmp_path / "b/evaluation", base + 0.04 + noise[0], guidance=scales, seeds=(0, 1))
    write_run(tmp_path / "c", base + 0.001 + noise[1], guidance=scales, seeds=(0, 1))
    return [str(tmp_path / name) for name in "abc"]


def test_runs_are_compared_with_the_first(runs, capsys):
    found = compare.compare(runs)["tifa"]
    assert found["guidance"] == 7.5 and [run["seeds"] for run in found["runs"]] == [2, 2, 2]
    better, same = found["differences"]
    assert better["effect"] == pytest.approx(0.04, abs=0.01) and better["n"] == 200
    assert (better["verdict"], same["verdict"]) == ("better", "undecided")
    assert better["p_holm"] == pytest.approx(2 * better["p"]) and same["p_holm"] == same["p"] > 0.05
    assert 0 < same["detectable"] < 0.02 and same["interval"][0] < 0 < same["interval"][1]
    first = found["runs"][0]
    assert first["best_guidance"] == 5.0 and first["best"] == pytest.approx(first["protocol"] + 0.05)
    assert cli.main(["evaluate", "--compare", *runs]) == 0
    said = capsys.readouterr().out
    assert "better" in said and "undecided" in said and "another training seed may change more" in said
    assert cli.main(["evaluate", "--compare", "--json", "--metrics=tifa", *runs]) == 0
    assert json.loads(capsys.readouterr().out)["tifa"]["runs"][1]["run"] == runs[1]


def test_lower_is_better_where_it_is_and_a_distance_has_no_difference_by_prompt(tmp_path):
    for name, shift in (("a", 0.0), ("b", 1.0)):
        write_run(tmp_path / name, np.full(5, 20 + shift), metric="fid", guidance=(1.5, 5.0))
    found = compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])["fid"]
    assert (
        found["differences"][0]["effect"] is None
        and "no score of each image" in found["differences"][0]["why"]
    )
    # The smaller FID is that at 1.5, and 7.5 was not sampled.
    assert found["runs"][0]["best_guidance"] == 1.5 and found["runs"][0]["protocol"] is None
    assert found["guidance"] == 1.5


def test_a_strangers_results_run_no_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange_score.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nclass Score:\n    LOWER_IS_BETTER = True\n"
    )
    places = [str(tmp_path / name) for name in "ab"]
    for place in places:
        write_run(place, np.arange(5.0), metric="strange_score:Score", guidance=(1.5,))
    assert cli.main(["evaluate", "--compare", *places]) == 2
    said = capsys.readouterr().err
    line = "a/results.jsonl names code outside of scaling_dit, which would run here: metric 'strange_score:Score'"
    assert line in said and "--own_code" in said and said.count("\n") == 1
    assert not (tmp_path / "RAN").exists()
    assert cli.main(["evaluate", "--compare", "--own_code", "--json", *places]) == 0
    assert json.loads(capsys.readouterr().out)["strange_score:Score"]["lower_is_better"] is True
    assert (tmp_path / "RAN").exists()


def test_rows_say_what_is_better_and_need_no_class(tmp_path):
    for name, said in (("a", True), ("b", True), ("c", False)):
        write_run(tmp_path / name, np.arange(5.0), metric="gone:Score", guidance=(1.5,), lower_is_better=said)
    assert compare.compare([str(tmp_path / name) for name in "ab"])["gone:Score"]["lower_is_better"] is True
    with pytest.raises(UserError, match="metric 'gone:Score': by some results lower is better and by others"):
        compare.compare([str(tmp_path / name) for name in "ac"])


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    a = runs[0]
    for made, message in (
        ({"judge": "other"}, "judge is 'j' and 'other'; evaluate both alike"),
        ({"prompts_sha256": "x"}, "cannot be compared: prompts_sha256"),
        ({"steps": 20}, "cannot be compared: steps is 50 and 20"),
        ({"guidance": (3.0,)}, "the runs have no guidance in common"),
        ({"metric": "dpg"}, "have no metric in common"),
    ):
        folder = tmp_path / message[:8]
        write_run(folder, np.zeros(5), **{"n": 200, **made})
        with pytest.raises(UserError, match=message):
            compare.compare([a, str(folder)])
    with pytest.raises(UserError, match="needs two runs or more"):
        compare.compare([a])
    with pytest.raises(UserError, match="names a run twice"):
        compare.compare([a, a])
    with pytest.raises(UserError, match=r"has no results.jsonl; evaluate it first"):
        compare.compare([a, str(tmp_path)])
    with pytest.raises(UserError, match="not every run has results of metric 'tiffa'; did you mean 'tifa'"):
        compare.compare(runs, ["tiffa"])


def test_rows_of_equal_requests_replace_each_other_and_skips_do_not_count(tmp_path):
    write_run(tmp_path, np.zeros(3))
    write_run(tmp_path, np.ones(3))
    results = Results(epath.Path(tmp_path))
    results.add({"status": SKIPPED, "metric": "hpsv2", "reason": "no weights"})
    with results.path.open("a") as file:
        file.write('{"metric": "cut')
    rows = results.read()
    assert [row["status"] for row in rows] == [DONE, SKIPPED] and rows[0]["scalars"]["tifa"] == pytest.approx(
        0.95
    )
    assert rows[0]["folder"] == "g7.5-s0/tifa" and rows[0]["version"]
    # The next row does not end up on the line that was cut.
    results.add({"status": SKIPPED, "metric": "pickscore", "reason": "no weights"})
    assert [row["metric"] for row in results.read()] == ["tifa", "hpsv2", "pickscore"]


def test_the_grid_has_best_and_protocol_columns():
    rows = [
        {"metric": "m", "guidance": g, "scalars": {"m": v}}
        for g, v in ((1.5, 1.0), (7.5, 3.0), (7.5, 5.0), (5, 6.0))
    ]
    found = sweep.summarize(rows, {})["m"]
    assert (found["protocol"], found["best"], found["best_guidance"]) == (4, 6, 5)
    assert found["by_guidance"]["7.5"] == {"mean": 4, "stdev": pytest.approx(2**0.5), "seeds": 2}
    assert sweep.summarize(rows, {"m": True})["m"]["best_guidance"] == 1.5
    lines = sweep.table(sweep.summarize(rows, {})).splitlines()
    assert lines[0].split() == ["metric", "guidance", "1.5", "guidance", "5", "guidance", "7.5", "protocol", "(7.5)",
                                "best"]  # fmt: skip
    assert "4 ± 1.4" in lines[1] and lines[1].endswith("6 at 5")


def test_holm_is_no_smaller_than_the_plain_p():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []

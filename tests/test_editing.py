"""The experiment `editing`: each task has its condition and metric, and a run of it is trained, scored and compared."""

import json

import jax
import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.errors import UserError
from scaling_dit.evaluation import compare, run
from scaling_dit.monitor.grid import read_png
from scaling_dit.training import loop

pytestmark = pytest.mark.usefixtures("opened_once")
ONE = jax.devices()[:1]


@pytest.mark.parametrize(
    "task, name, metric, source",
    [
        ("inpaint", "inpaint", "inpaint", "shapes"),
        ("outpaint", "inpaint", "inpaint", "shapes"),
        ("edges", "edges", "edges_f1", "shapes"),
        ("edit", "edit", "edits", "shapes_edits"),
    ],
)
def test_a_task_has_its_condition_its_metric_and_its_data(task, name, metric, source):
    for way in ("token", "channel"):
        config = config_lib.load(f"editing:{task}-{way}")
        assert config.conditioning.names == (name,) and config.conditions[name].concat == way
        assert config.eval.metrics == (metric,) and config.source.name == source
        assert config.source.preset == "grid16"
    if task == "outpaint":
        for section in (config.conditions.inpaint, config.metrics.inpaint):
            assert (section.boxes, section.strokes, section.objects, section.outpaint) == (0, 0, 0, 1)


def test_a_row_of_the_papers_takes_their_recipe():
    config = config_lib.load("editing:edges-channel,pixart-h1536-d28")
    assert (
        config.backbone.name == "pixart" and config.steps == 600_000 and config.eval.metrics == ("edges_f1",)
    )
    real = config_lib.load("editing:edit-token,uvit-h2048-d42-n16,pretrained")
    assert real.source.name.startswith("latents:") and real.codec.name == "vae" and real.eval.metrics == ()
    for argument, message in (
        ("inpaint", "no argument 'inpaint'; did you mean 'inpaint-token'"),
        ("inpaint-token,uvit", "no option 'uvit' after the comma"),
    ):
        with pytest.raises(UserError, match=message):
            config_lib.load(f"editing:{argument}")


def tiny(argument, *overrides):
    small = (
        "--config.log.tensorboard=False",
        "--config.steps=2",
        "--config.eval.every=2",
        "--config.eval.prompts=6",
    )
    return config_lib.load(f"editing:{argument}", [*small, *overrides])


@pytest.mark.slow
def test_a_run_of_inpainting_is_evaluated_in_training_and_afterwards(tmp_path, capsys):
    workdir = tmp_path / "run"
    loop.train(tiny("smoke"), str(workdir), ONE)
    curves = [row for row in read_metrics(workdir) if "evaluation/inpaint" in row]
    assert len(curves) == 1
    assert {"evaluation/inpaint_psnr", "evaluation/inpaint_mse", "evaluation/inpaint_counting"} <= set(
        curves[0]
    )
    assert run.main(str(workdir), str(tmp_path / "found"), items=6) == 0
    assert "TIFA" in capsys.readouterr().out
    folder = tmp_path / "found/inpaint"
    result = json.loads((folder / "result.json").read_text())
    assert result["scalars"]["inpaint"] == pytest.approx(curves[0]["evaluation/inpaint"])
    assert result["n"] == 6 and 0 < result["scalars"]["inpaint_mse"] < 1
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all({"score", "mse", "psnr", "share"} <= set(row) for row in rows)
    (images,) = (path for path in (tmp_path / "found").iterdir() if path.name.startswith("images-"))
    manifest = [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]
    assert {len(row["conditions"]) for row in manifest} == {64}
    # Another set of masks is another request, with images of its own.
    before = read_png(images / manifest[0]["path"])
    other = ["--config.metrics.inpaint.mask_seed=1"]
    assert run.main(str(workdir), str(tmp_path / "found"), items=6, overrides=other) == 0
    assert len([path for path in (tmp_path / "found").iterdir() if path.name.startswith("images-")]) == 2
    np.testing.assert_array_equal(before, read_png(images / manifest[0]["path"]))
    # A metric without conditions scores the same run, whose conditions are then absent.
    assert run.main(str(workdir), str(tmp_path / "plain"), metrics=["shapes_tifa"], items=4) == 0
    with pytest.raises(
        UserError, match="metric 'edges_f1' gives condition 'edges', and the run reads inpaint"
    ):
        run.main(str(workdir), str(tmp_path / "other"), metrics=["edges_f1"], items=4)


@pytest.mark.slow
def test_runs_of_edits_are_compared_edit_by_edit(tmp_path):
    tinier = ("--config.backbone.hidden=32", "--config.backbone.depth=1", "--config.backbone.heads=2",
              "--config.text_encoder.dim=32", "--config.text_encoder.heads=2", "--config.batch=8",
              "--config.sample.steps=1", "--config.eval.loss_images=8", "--config.eval.grid=4",
              "--config.optim.warmup_steps=1")  # fmt: skip
    for way, every in (("token", 2), ("channel", 0)):
        run_config = tiny(f"edit-{way}", *tinier, f"--config.eval.every={every}")
        loop.train(run_config, str(tmp_path / way), ONE)
        assert run.main(str(tmp_path / way), items=12) == 0
    found = compare.compare([str(tmp_path / "token"), str(tmp_path / "channel")])["edits"]
    assert found["scalar"] == "edits" and found["differences"][0]["n"] == 12
    row = [row for row in read_metrics(tmp_path / "token") if "evaluation/edits_kept" in row][-1]
    assert {"evaluation/edits", "evaluation/edits_success", "evaluation/edits_colour"} <= set(row)

"""The `evaluate` verb, the metrics behind it, and the evaluations during training."""

import dataclasses
import json

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_config, read_metrics
from scaling_dit.data import digits
from scaling_dit.data.sources import create_source
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS, run
from scaling_dit.evaluation.validation import ValidationLoss
from scaling_dit.model.build import open_source
from scaling_dit.model.model import Model
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling import pipeline


def test_true_pictures_score_1_and_the_baseline_is_low():
    source = create_source("shapes")
    items = METRICS["tifa"].items(source, 100)
    assert len({item.prompt + str(item.truth.tobytes()) for item in items}) == 100
    result = METRICS["tifa"].score([item.truth for item in items], items, seed=0)
    assert result["tifa_average"] == 1.0 and result["scalars"]["tifa_spatial"] == 1.0
    assert 0.15 < result["baseline"]["tifa_average"] < 0.5
    assert "wrong scenes" in METRICS["tifa"].table(result)


def test_held_out_prompts_never_occur_in_training():
    source = create_source("shapes", shapes=("circle", "square"), colours=("red", "blue"))
    asked = {item.truth.tobytes() for item in METRICS["tifa"].items(source, 40)}
    trained = {source[i]["image"].tobytes() for i in range(1500)}
    assert not asked & trained


def test_real_digits_are_recognised_and_wrong_ones_are_not(tmp_path):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    by_digit = [digits.to_images(scans[labels == d][:5].reshape(-1, 8, 8)) for d in range(10)]
    pictures = [np.repeat(by_digit[i % 10][i // 10][..., None], 3, axis=-1) for i in range(50)]

    source = create_source(f"folder:{digits.write(tmp_path)}", image_size=16)
    items = METRICS["digits"].items(source, 50)
    assert items[7].prompt == "a handwritten seven"
    result = METRICS["digits"].score(pictures, items, seed=0)
    assert result["tifa_average"] > 0.95 and result["accuracy_on_real_scans"] > 0.95
    assert METRICS["digits"].score(pictures[1:] + pictures[:1], items, seed=0)["tifa_average"] < 0.1


def test_a_metric_that_does_not_fit_the_data_says_so(tmp_path):
    with pytest.raises(UserError, match="needs scenes"):
        METRICS["tifa"].items(create_source(f"folder:{digits.write(tmp_path / 'd')}", image_size=16), 4)
    for preset in ("free32", "grid16"):
        with pytest.raises(UserError, match="16x16"):
            METRICS["digits"].items(create_source("shapes", preset=preset), 4)


def test_the_verb_writes_figures_pictures_and_tifa_files(smoke_run, tmp_path, capsys):
    assert run.main(str(smoke_run), str(tmp_path), items=5) == 0
    said = capsys.readouterr().out
    assert (
        f"guidance {read_config(smoke_run).sample.guidance}" in said
        and "n 5" in said
        and "95 % interval" in said
    )
    result = json.loads((tmp_path / "tifa" / "result.json").read_text())
    assert result["n"] == 5 and result["step"] == 4 and len(result["interval"]) == 2
    images = json.loads((tmp_path / "tifa" / "images.json").read_text())
    assert all((tmp_path / "tifa" / name).exists() for name in images.values())
    rows = json.loads((tmp_path / "tifa" / "questions.json").read_text())
    assert {row["id"] for row in rows} == set(images)


def test_the_verb_refuses_what_it_does_not_know(smoke_run, tmp_path):
    with pytest.raises(UserError, match="did you mean 'tifa'"):
        run.main(str(smoke_run), str(tmp_path), metrics=["tiffa"])


def test_json_is_all_that_is_printed(smoke_run, tmp_path, capsys):
    run.main(str(smoke_run), str(tmp_path), items=2, as_json=True)
    assert json.loads(capsys.readouterr().out)["tifa"]["n"] == 2


def test_training_wrote_validation_loss_by_bin_metrics_and_a_grid(smoke_run):
    row = {key: value for part in read_metrics(smoke_run) if part["step"] == 4 for key, value in part.items()}
    bins = [key for key in row if key.startswith("validation/loss_t")]
    assert len(bins) == 5 and "validation/loss_t0800-0999" in bins
    assert row["validation/loss"] == pytest.approx(np.mean([row[key] for key in bins]), rel=0.3)
    assert "evaluation/tifa" in row and "evaluation/tifa_color" in row


def test_validation_loss_does_not_depend_on_batches_layout_or_the_prediction_kind(smoke_run):
    config = read_config(smoke_run)
    pipe = pipeline.load(smoke_run)
    source = open_source(config)

    def measure(batch, mesh=pipe.mesh):
        return ValidationLoss(pipe.model, source, mesh, images=20, bins=4, batch=batch)(
            pipe.params, pipe.frozen
        )

    whole, parts = measure(24), measure(8)
    assert whole.keys() == parts.keys() and len(whole) == 5
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], rel=1e-5)
    fsdp = measure(24, make_mesh(data=2, fsdp=4))
    assert fsdp["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@dataclasses.dataclass(frozen=True)
class WhiteLatents(Model):
    """Predicts the best x0 for latents that are white noise, which depends on noise to signal alone."""

    def predict(self, params, latents, timesteps, *text, **options):
        alpha, sigma = (f(timesteps)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return latents * alpha / (alpha**2 + sigma**2)


def test_validation_loss_compares_models_of_other_schedules(smoke_run):
    pipe = pipeline.load(smoke_run)
    source = open_source(read_config(smoke_run))
    scores = {}
    for name, zero_snr in (
        ("scaled_linear", False),
        ("scaled_linear", True),
        ("cosine", False),
        ("flow", False),
    ):
        schedule = make_schedule(name, zero_snr=zero_snr)
        fields = {f.name: getattr(pipe.model, f.name) for f in dataclasses.fields(pipe.model)}
        model = WhiteLatents(**fields | {"schedule": schedule, "prediction": "x0"})
        loss = ValidationLoss(model, source, pipe.mesh, images=20, bins=4, batch=24)
        scores[name, zero_snr] = loss(pipe.params, pipe.frozen)
    reference = scores.pop(("scaled_linear", False))
    for score in scores.values():
        assert score == pytest.approx(reference, rel=2e-3)


def test_evaluation_can_be_turned_off():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.eval.every=0"])
    from scaling_dit.evaluation.in_training import InTraining

    InTraining(None, None, None, config)  # type: ignore[arg-type]  # touches nothing

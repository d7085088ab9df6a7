"""The `evaluate` verb, the metrics behind it, and the evaluations during training."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_config, read_metrics
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.errors import UserError
from scaling_dit.evaluation import bases, in_training, results, run
from scaling_dit.evaluation.features import networks
from scaling_dit.evaluation.metric import Item, Skipped
from scaling_dit.evaluation.metrics.shapes_tifa import ShapesTifa
from scaling_dit.evaluation.scoring import Scoring
from scaling_dit.evaluation.validation import ValidationLoss
from scaling_dit.model.build import open_source
from scaling_dit.model.model import Model
from scaling_dit.monitor import writers
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling import pipeline

pytestmark = pytest.mark.usefixtures("opened_once")


def test_the_verb_writes_results_images_rows_and_tifa_files(smoke_run, tmp_path, capsys):
    assert run.main(str(smoke_run), str(tmp_path), items=5) == 0
    said = capsys.readouterr().out
    assert f"guidance {read_config(smoke_run).sample.guidance}" in said
    assert "n 5" in said and "95 % interval" in said
    folder = tmp_path / "shapes_tifa"
    result = json.loads((folder / "result.json").read_text())
    assert result["n"] == 5 and result["step"] == 4 and len(result["interval"]) == 2
    assert result["judge"] == "shapes-oracle-1"
    assert result["fields"] == {
        "every": 0, "prompts": 0, "batch": 64, "prompt_set": "", "prompt_transform": "none", "baseline": True,
    }  # fmt: skip
    images = json.loads((folder / "images.json").read_text())
    assert all((folder / name).exists() for name in images.values())
    questions = json.loads((folder / "questions.json").read_text())
    assert {row["id"] for row in questions} == set(images)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(images)
    assert result["tifa_average"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert not (folder / "parts").exists()


def test_a_killed_evaluation_gives_the_same_files(smoke_run, tmp_path, monkeypatch):
    workdir, changed = smoke_run, {"overrides": ["--config.metrics.shapes_tifa.batch=2"]}
    whole, broken = tmp_path / "whole" / "shapes_tifa", tmp_path / "broken" / "shapes_tifa"
    run.main(str(workdir), str(whole.parent), items=9, **changed)

    calls = []
    plain = ShapesTifa.update

    def dies(self, state, batch):
        calls.append([item.id for item in batch.items])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, state, batch)

    monkeypatch.setattr(ShapesTifa, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        run.main(str(workdir), str(broken.parent), items=9, **changed)
    assert len(list((broken / "parts").glob("*.npz"))) == 2
    run.main(str(workdir), str(broken.parent), items=9, **changed)
    # The third batch again, and the two that are left.
    assert len(calls) == 6 and calls[3] == calls[2]
    for name in sorted(path.name for path in whole.iterdir()):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_verb_refuses_what_it_does_not_know(smoke_run, tmp_path):
    for name, message in {
        "tiffa": "unknown metric 'tiffa'; did you mean 'tifa'",
        "json:loads": "metric 'json:loads' is no class but function",
        "json:JSONDecoder": "is no metric: it has no method items, init, update",
        "no_such_module:Metric": "no module 'no_such_module'",
    }.items():
        with pytest.raises(UserError, match=message):
            run.main(str(smoke_run), str(tmp_path), metrics=[name])
    assert not list(tmp_path.iterdir())


def test_json_is_all_that_is_printed(smoke_run, tmp_path, capsys):
    run.main(str(smoke_run), str(tmp_path), items=5, as_json=True)
    assert json.loads(capsys.readouterr().out)["shapes_tifa"]["n"] == 5


def test_training_wrote_validation_loss_by_bin_metrics_and_a_grid(smoke_run):
    row = {key: value for part in read_metrics(smoke_run) if part["step"] == 4 for key, value in part.items()}
    bins = [key for key in row if key.startswith("validation/loss_t")]
    assert len(bins) == 5 and "validation/loss_t0800-0999" in bins
    assert row["validation/loss"] == pytest.approx(np.mean([row[key] for key in bins]), rel=0.3)
    assert "evaluation/shapes_tifa" in row and "evaluation/shapes_tifa_color" in row


def test_validation_loss_does_not_depend_on_batches_layout_or_the_prediction_kind(smoke_run):
    config = read_config(smoke_run)
    pipe = pipeline.load(smoke_run)
    source = open_source(config)

    def measure(batch, mesh=pipe.mesh):
        weights = jax.device_put((pipe.params, pipe.frozen), NamedSharding(mesh, PartitionSpec()))
        return ValidationLoss(pipe.model, source, mesh, images=20, bins=4, batch=batch)(*weights)

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

    # Touches nothing.
    evaluator = InTraining(None, None, None, config)  # type: ignore[arg-type]
    assert not evaluator.due(config.steps)


class Grey:
    """Real images of a user's own, of any size."""

    def __init__(self, image_size: int = 16):
        self.image_size = image_size

    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = np.full((self.image_size, self.image_size, 3), 20 * index, np.uint8)
        return {"image": image, "captions": [""], "key": str(index)}

    def describe(self):
        return f"{len(self)} grey images"

    def held_out(self):
        return self


def test_statistics_of_a_source_are_built_once_and_compared_with(smoke_run, tmp_path, monkeypatch, capsys):
    calls = []

    def features(images):
        calls.append(len(images))
        return images.mean((1, 2)).astype(np.float32)

    known = networks.INCEPTION["tensorflow1"].weights
    small = networks.Network("inception", 3, known, "means of colours", lambda place, batch: features)
    monkeypatch.setitem(networks.INCEPTION, "tensorflow1", small)
    monkeypatch.setenv("SCALING_DIT_WEIGHTS", str(tmp_path))
    (tmp_path / known.names[0]).write_bytes(b"weights")
    workdir = tmp_path / "run"
    shutil.copytree(smoke_run, workdir)
    options = {"metrics": ["fid"], "items": 5}

    def result(name, **more):
        assert run.main(str(workdir), str(tmp_path / name), **options, **more) == 0
        (path,) = (tmp_path / name).glob("fid*/result.json")
        return json.loads(path.read_text())

    first = result("first", reference=f"{__name__}:Grey")
    (built,) = (workdir / "evaluation" / "references").rglob("*.safetensors")
    assert first["reference"]["images"] == "12 grey images" and first["n_reference"] == 12
    assert first["fields"]["reference"] == str(built) and "fid" in capsys.readouterr().out
    count = len(calls)
    assert result("second", reference=f"{__name__}:Grey")["scalars"] == first["scalars"]
    # The images are those of the first call, whose features are still at hand.
    assert len(calls) == count, "the statistics were built again"
    # By default the real images of the prompts.
    own = result("own")
    assert own["n_reference"] == 5 and own["scalars"] != first["scalars"]
    prompts = tmp_path / "drawbench.csv"
    prompts.write_text("Prompts,Category\na red car,Colors\n")
    with pytest.raises(
        UserError, match="'fid': prompt set drawbench holds no images to compare with; give --ref"
    ):
        result("set", shared={"prompt_set": f"drawbench:{prompts}"})
    with pytest.raises(UserError, match="--reference: none of shapes_tifa compares with real images"):
        run.main(str(smoke_run), str(tmp_path / "x"), metrics=["shapes_tifa"], reference=str(built))


def test_metrics_of_one_network_compute_its_features_once(smoke_run, tmp_path, monkeypatch, capsys):
    calls = []

    def features(images):
        calls.append(len(images))
        if len(calls) == 4 and dying:
            raise KeyboardInterrupt
        return images.mean((1, 2)).astype(np.float32)

    known = networks.INCEPTION["tensorflow1"].weights
    names, dying = ["fid", "kid", "mind"], False
    monkeypatch.setenv("SCALING_DIT_WEIGHTS", str(tmp_path))
    (tmp_path / known.names[0]).write_bytes(b"weights")

    def evaluate(metrics, name):
        # A network of its own, which has seen nothing yet.
        small = networks.Network("inception", 3, known, "means", lambda place, batch: lambda x: features(x))
        monkeypatch.setitem(networks.INCEPTION, "tensorflow1", small)
        calls.clear()
        small_subsets = ["--config.metrics.kid.subset_size=4"] if "kid" in metrics else []
        fields = {"items": 5, "shared": {"batch": "2"}, "overrides": small_subsets}
        assert run.main(str(smoke_run), str(tmp_path / name), metrics=metrics, **fields) == 0
        return sorted(path for path in (tmp_path / name).rglob("*") if path.suffix in (".json", ".jsonl"))

    for name in names:
        evaluate([name], "alone")
        # Three batches of generated and of real images.
        assert calls == [2, 2, 2, 2, 1, 1]
    whole = evaluate([*names[:2], "shapes_tifa", names[2]], "whole")
    assert calls == [2, 2, 2, 2, 1, 1]
    said = capsys.readouterr().out
    assert all(f"{name} of" in said for name in names)
    dying = True
    with pytest.raises(KeyboardInterrupt):
        evaluate(names, "broken")
    kept = {path.parents[1].name.partition("-")[0] for path in (tmp_path / "broken").rglob("parts/*.npz")}
    assert kept == set(names)
    dying = False
    evaluate(names, "broken")
    # The batch that died, and the last one.
    assert calls == [2, 2, 1, 1]
    compared = 0
    for name in ("alone", "broken"):
        for path in whole:
            place = path.relative_to(tmp_path / "whole")
            if place.parts[0].partition("-")[0] in names:
                assert (tmp_path / name / place).read_bytes() == path.read_bytes(), (name, place)
                compared += 1
        assert not list((tmp_path / name).rglob("parts"))
    # result.json and rows.jsonl of three metrics, twice.
    assert compared == 12


@pytest.mark.slow
def test_a_grid_of_guidance_and_seeds_shares_images_and_fills_results(smoke_run, tmp_path, capsys):
    fields = {"shared": {"judge": "shapes"}, "store": "tar", "metrics": ["tifa", "soft_tifa", "shapes_tifa"]}
    changes = {"guidance": (1.0, 7.5), "seed": (0, 1), "items": 6}
    assert run.main(str(smoke_run), str(tmp_path), **fields, **changes) == 0
    said = capsys.readouterr().out
    assert "protocol (7.5)" in said and " ± " in said
    folders = [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("step4")]
    assert len(folders) == 4
    for folder in folders:
        # The three metrics have the same prompts.
        (images,) = folder.glob("images-*")
        assert {path.name for path in images.iterdir()} == {"images-00000.tar", "grid.png", "manifest.jsonl"}
        exact, published = (
            json.loads((next(folder.glob(f"{name}*")) / "result.json").read_text())
            for name in ("shapes_tifa", "tifa")
        )
        # The published formula with the oracle as judge is the exact metric.
        assert published["tifa_average"] == pytest.approx(exact["tifa_average"], abs=1e-12)
        assert (
            published["training_seed"] == read_config(smoke_run).seed
            and published["judge"] == "shapes-oracle-1"
        )
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {(row["guidance"], row["seed"]) for row in rows} == {
        (g, s) for g in (1.0, 7.5) for s in (0, 1)
    }
    assert all((tmp_path / row["folder"] / "rows.jsonl").exists() for row in rows)


def test_other_fields_have_another_folder_and_a_missing_judge_skips_its_metric(smoke_run, tmp_path, capsys):
    def evaluate(*overrides, **more):
        return run.main(str(smoke_run), str(tmp_path), items=5, overrides=overrides, **more)

    assert evaluate() == evaluate("--config.metrics.shapes_tifa.baseline=false") == 0
    plain, other = sorted(path.parent for path in tmp_path.glob("shapes_tifa*/result.json"))
    assert plain.name == "shapes_tifa" and other.name.startswith("shapes_tifa-")
    assert "baseline" in json.loads((plain / "result.json").read_text())
    assert "baseline" not in json.loads((other / "result.json").read_text())
    capsys.readouterr()
    assert evaluate(metrics=["tifa", "shapes_tifa"]) == run.INCOMPLETE
    said = capsys.readouterr()
    assert said.err.startswith("tifa: skipped: it needs a judge: --judge=") and "shapes_tifa of" in said.out
    last = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][-2:]
    assert [row["status"] for row in last] == ["skipped", "done"] and "judge" in last[0]["reason"]


def test_tensorboard_shows_each_evaluated_step_once_and_in_order(tmp_path, monkeypatch):
    """Only one file of events is left, with the newest value of each step; tests/monitor reads real events."""
    folder = epath.Path(tmp_path / "evaluate-ema0.9")

    class Writer:
        made = 0

        def __init__(self, place):
            Writer.made += 1
            self.off = Writer.made == 5
            self.path = place / f"events.out.{Writer.made}"

        def scalars(self, step, values):
            with open(self.path, "a") as file:
                file.write(json.dumps([step, values]) + "\n")

        def close(self):
            pass

    monkeypatch.setattr(writers, "TensorBoardWriter", Writer)
    for step, scalars in (
        (4, {"fid": 9.0}),
        (2, {"fid": 20.0, "kid": 3.0}),
        (4, {"fid": 8.0}),
        (4, {"kid": 1.0}),
    ):
        results.write_curves(folder, step, scalars, tensorboard=True)
    results.write_curves(folder, 6, {"fid": 1.0}, tensorboard=False)
    (events,) = folder.glob("events*")
    assert [json.loads(line) for line in events.read_text().splitlines()] == [
        [2, {"evaluation/fid": 20.0, "evaluation/kid": 3.0}],
        [4, {"evaluation/fid": 8.0, "evaluation/kid": 1.0}],
    ]
    # A disk that refuses leaves the older events, and what is to be shown is not lost.
    results.write_curves(folder, 8, {"fid": 2.0}, tensorboard=True)
    assert len(list(folder.glob("events*"))) == 2
    results.write_curves(folder, 9, {"fid": 1.0}, tensorboard=True)
    (events,) = folder.glob("events*")
    assert [json.loads(line)[0] for line in events.read_text().splitlines()] == [2, 4, 8, 9]
    (folder / "curves.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="curves.json .*delete it: the numbers are in results.jsonl"):
        results.write_curves(folder, 4, {"fid": 7.0}, tensorboard=True)


def test_a_metric_that_is_skipped_while_training_leaves_the_others(caplog):
    """A judge that is out of reach at one evaluation and back at the next."""
    away = [True, False]

    class Judged(bases.PerImage):
        def rows(self, batch):
            if away.pop(0):
                raise Skipped("the judge is out of reach")
            return [{"score": 0.5} for _ in batch.items]

    class Bright(bases.PerImage):
        def rows(self, batch):
            return [{"score": float(image.mean())} for image in batch.images]

    items = [Item(str(number), "a circle") for number in range(3)]
    evaluator = object.__new__(in_training.InTraining)
    evaluator._config = config_lib.load("experiments/shapes.py:smoke")
    images = np.full((3, 4, 4, 3), 7, np.uint8)

    class Sampled:
        def __call__(self, *_, **__):
            return images

        def batches(self, *_, **__):
            yield images

    class Shown(list):
        def scalars(self, step, values):
            self.append((step, values))

        def images(self, step, values):
            pass

        def flush(self):
            pass

    evaluator._loss = lambda params, frozen: {"loss": 1.0}
    evaluator._sampler, evaluator._ema, evaluator._adapters = Sampled(), None, None
    evaluator._captions, evaluator._conditions = ["a"] * 3, None
    evaluator._metrics = [
        ([Scoring(name, metric(), items, 3)], ["a circle"] * 3, 2)
        for name, metric in (("judged", Judged), ("bright", Bright))
    ]
    shown = Shown()
    state = types.SimpleNamespace(params={}, emas={})
    for step in (2, 4):
        assert evaluator.write(shown, step, state, {})
    assert shown == [
        (2, {"validation/loss": 1.0, "evaluation/Bright": 7.0}),
        (4, {"validation/loss": 1.0, "evaluation/Judged": 0.5, "evaluation/Bright": 7.0}),
    ]
    assert "metric judged is skipped at step 2: the judge is out of reach" in caplog.text


def test_metrics_of_one_network_are_sampled_for_once_in_training(smoke_run, tmp_path, monkeypatch):
    known, asked = networks.INCEPTION["tensorflow1"].weights, []

    def means(images):
        return images.mean((1, 2)).astype(np.float32)

    small = networks.Network("inception", 3, known, "means", lambda place, batch: means)
    monkeypatch.setitem(networks.INCEPTION, "tensorflow1", small)
    monkeypatch.setenv("SCALING_DIT_WEIGHTS", str(tmp_path))
    (tmp_path / known.names[0]).write_bytes(b"weights")
    chosen = ["--config.eval.metrics=('fid', 'shapes_tifa', 'kid')", "--config.eval.prompts=4"]
    chosen.append("--config.metrics.kid.subset_size=4")
    config = config_lib.load("experiments/shapes.py:smoke", chosen)
    pipe = pipeline.load(smoke_run)
    evaluator = in_training.InTraining(pipe.model, open_source(config), pipe.mesh, config)
    side = pipe.model.image_size
    groups = [[scoring.name for scoring in scorings] for scorings, _, _ in evaluator._metrics]
    assert groups == [["fid", "kid"], ["shapes_tifa"]]

    class Sampled:
        def __call__(self, params, frozen, captions, **_):
            return np.zeros((len(captions), side, side, 3), np.uint8)

        def batches(self, params, frozen, prompts, **_):
            asked.append(len(prompts))
            yield np.random.default_rng(0).integers(0, 256, (len(prompts), side, side, 3), np.uint8)

    evaluator._loss = lambda params, frozen: {"loss": 1.0}
    evaluator._sampler, evaluator._ema = Sampled(), None
    written = {}
    writer = types.SimpleNamespace(
        scalars=lambda step, values: written.update(values), images=lambda *_: None, flush=lambda: None
    )
    assert evaluator.write(writer, config.steps, types.SimpleNamespace(params={}), {})
    assert asked == [4, 4] and written["evaluation/fid"] > 0
    assert {"evaluation/kid", "evaluation/shapes_tifa"} <= written.keys()


def test_a_running_job_is_followed_to_its_last_step(smoke_run, tmp_path, monkeypatch):
    """The smoke run has checkpoints at 2 and 4, its last step; the second appears only while the first is scored."""
    shown = [[2], [2, 4]]
    plain = run.Checkpoints.all_steps

    def all_steps(self):
        steps = plain(self)
        return [step for step in steps if step in shown[0]] if len(shown) > 1 else steps

    slept = []
    monkeypatch.setattr(run.Checkpoints, "all_steps", all_steps)
    sleep = types.SimpleNamespace(sleep=lambda seconds: (slept.append(seconds), shown.pop(0)))
    monkeypatch.setattr(run, "time", sleep)
    assert run.main(str(smoke_run), str(tmp_path), items=5, watch=7.0) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and slept == [7.0]
    # Nothing is left to do; another field is another result.
    assert run.main(str(smoke_run), str(tmp_path), items=5, watch=7.0) == 0
    config = run.config_of(run.Request(workdir=str(smoke_run)))
    assert run._evaluated(run.Request(workdir=str(smoke_run), out=str(tmp_path)), config) == {2, 4}
    assert not run._evaluated(run.Request(workdir=str(smoke_run), out=str(tmp_path), seed=(0, 1)), config)
    config.metrics.shapes_tifa.baseline = False
    assert not run._evaluated(run.Request(workdir=str(smoke_run), out=str(tmp_path)), config)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

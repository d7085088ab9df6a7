"""Weights into a new run and out of one, in the names of the published code."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from safetensors import numpy as safetensors_numpy

import scaling_dit
from scaling_dit import config, interop
from scaling_dit.checkpoints.state import init_state
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import open_workdir
from scaling_dit.cli import main as cli
from scaling_dit.interop import exporting
from scaling_dit.model.build import build_model
from scaling_dit.training import optim
from scaling_dit.training.loop import train

pytestmark = pytest.mark.usefixtures("on_one_device")
SMOKE = "experiments/shapes.py:smoke"


def run(capsys, *arguments):
    """One command: (exit code, stdout, stderr), the latter of one line at most."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert said.err.count("\n") <= 1
    return code, said.out, said.err


def refuses(capsys, match, *arguments):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and match in error, error


def exported(folder):
    return safetensors_numpy.load_file(folder / "model.safetensors")


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.fixture(scope="module")
def weights(smoke_run, tmp_path_factory):
    """A folder with the raw weights of the miniature run at its last step."""
    folder = tmp_path_factory.mktemp("weights") / "out"
    assert exporting.main(str(smoke_run), str(folder), to="safetensors", ema="none") == 0
    return folder


@pytest.fixture(scope="module")
def imported(weights, tmp_path_factory):
    """A run of the same experiment made from these weights."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    command = ["import", f"--from={weights}", f"--workdir={workdir}", f"--config={SMOKE}"]
    assert cli.main([*command, "--config.seed=5"]) == 0
    return workdir


def test_export_writes_what_the_checkpoint_holds(smoke_run, weights):
    assert [path.name for path in weights.iterdir()] == ["model.safetensors"]
    pipe = scaling_dit.load(smoke_run)
    assert_same(
        exported(weights), interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]})
    )


def test_step_and_average_are_chosen(capsys, smoke_run, weights, tmp_path):
    command = ["export", f"--workdir={smoke_run}", "--to=safetensors"]
    code, said, _ = run(capsys, *command, f"--out={tmp_path / 'ema'}")
    assert code == 0 and "uvit in" in said and "step 4, ema 0.995" in said
    assert run(capsys, *command, f"--out={tmp_path / 'early'}", "--step=2", "--ema=none")[0] == 0
    averaged, early, last = exported(tmp_path / "ema"), exported(tmp_path / "early"), exported(weights)
    pipe = scaling_dit.load(smoke_run, ema=0.995)
    assert_same(averaged, interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]}))
    assert averaged.keys() == early.keys() == last.keys()
    name = "in_blocks.0.mlp.fc1.weight"
    assert not np.array_equal(early[name], last[name]) and not np.array_equal(averaged[name], last[name])


def test_an_export_is_never_overwritten_nor_half_there(capsys, smoke_run, weights, tmp_path, monkeypatch):
    command = ["export", f"--workdir={smoke_run}", "--to=safetensors"]
    refuses(capsys, "exists and is not empty; give another --out", *command, f"--out={weights}")
    # An empty folder.
    monkeypatch.chdir(tmp_path)
    refuses(capsys, "give a new one, such as --out=export", *command, "--out=.")
    out = tmp_path / "out"

    def dies(*arguments, **options):
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_numpy, "save", dies)
        code, _, error = run(capsys, *command, f"--out={out}")
        assert code == 74 and "No space left" in error
    assert not out.exists()
    (tmp_path / "out.partial" / "old").touch()
    out.mkdir()
    assert run(capsys, *command, f"--out={out}")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_the_import_is_a_run_at_step_0(weights, imported):
    raw, averaged = scaling_dit.load(imported), scaling_dit.load(imported, ema=0.995)
    assert raw.step == 0 and raw.config.seed == 5
    for pipe in (raw, averaged):
        assert_same(
            interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]}), exported(weights)
        )
        jax.tree.map(np.testing.assert_array_equal, pipe.params["text_encoder"], raw.params["text_encoder"])
    assert raw.sample(["a red circle"]).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_train_goes_on_from_it_as_from_its_own_start(imported, weights, tmp_path):
    """The state is that of a fresh run with the backbone replaced: the same text encoder, moments and data."""
    plain = ["--config.eval.every=0", "--config.log.tensorboard=False"]
    resolved = config.load(SMOKE, ["--config.seed=5", *plain])
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    tokenizer = open_workdir(epath.Path(workdir), resolved)
    model = build_model(resolved, tokenizer)
    optimizer = optim.make_optimizer(resolved.optim, resolved.steps)
    fresh = jax.jit(lambda key: init_state(model, optimizer, resolved, key))(jax.random.key(5))
    with Checkpoints(workdir / "checkpoints", read_only=True) as store:
        state, _ = store.restore(0, fresh)
    jax.tree.map(np.testing.assert_array_equal, state.params["text_encoder"], fresh.params["text_encoder"])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    last = train(resolved, workdir, jax.devices()[:1])
    assert int(last.step) == resolved.steps
    kernel = np.asarray(last.params["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"])
    start = exported(weights)["mid_block.mlp.fc1.weight"].T
    # Four updates of at most 1.5e-3 each.
    assert 0 < np.abs(kernel - start).max() < 0.02


@pytest.mark.slow
def test_halves_and_shards_are_read(weights, tmp_path, capsys):
    whole = exported(weights)
    halves = {name: array.astype(np.float16) for name, array in whole.items()}
    safetensors_numpy.save_file(halves, tmp_path / "half.safetensors")
    command = [f"--from={tmp_path / 'half.safetensors'}", f"--workdir={tmp_path / 'run'}"]
    assert run(capsys, "import", *command, f"--config={SMOKE}")[0] == 0
    command = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert (
        exporting.main(str(tmp_path / "run"), str(tmp_path / "out"), to="safetensors", shard_bytes=20000) == 0
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = [f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}", f"--config={SMOKE}"]
    assert run(capsys, "import", *again)[0] == 0
    pipe = scaling_dit.load(tmp_path / "again")
    found = interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]})
    assert_same(found, {name: array.astype(np.float32) for name, array in halves.items()})


def test_mistakes_are_one_line_and_leave_no_run(capsys, smoke_run, weights, tmp_path):
    new = f"--workdir={tmp_path / 'new'}"
    use = ["import", f"--config={SMOKE}"]
    refuses(capsys, "import needs --from", *use, new)
    refuses(capsys, "holds a run already", *use, f"--from={weights}", f"--workdir={smoke_run}")
    refuses(capsys, "no file or folder", *use, f"--from={tmp_path / 'x'}", new)
    refuses(capsys, "has no _class_name, so diffusers did not write it", *use, f"--from={smoke_run}", new)
    refuses(
        capsys,
        "(96, 32), it must be (192, 64)",
        *use,
        f"--from={weights}",
        new,
        "--config.backbone.hidden=64",
    )
    changed = exported(weights)
    changed["extra"] = changed.pop("norm.bias")
    safetensors_numpy.save_file(changed, tmp_path / "changed.safetensors")
    wrong = [*use, f"--from={tmp_path / 'changed.safetensors'}", new]
    refuses(capsys, "does not fit UViT: missing: norm.bias; unknown: extra", *wrong)
    refuses(
        capsys, "pos_embed of the weights is (21, 32), but latents of (16, 16, 3) and 20 tokens",
        *use, f"--from={weights}", new, "--config.text_encoder.length=20",
    )  # fmt: skip
    assert not (tmp_path / "new").exists()

    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionalModel"}))
    refuses(
        capsys,
        "is of a UNet2DConditionalModel, which no backbone here computes",
        *use,
        f"--from={tmp_path}",
        new,
    )
    (tmp_path / "config.json").write_text("{")
    refuses(capsys, "config.json is not valid JSON", *use, f"--from={tmp_path}", new)


def test_a_backbone_that_diffusers_lacks_says_so(capsys, smoke_run, tmp_path):
    refuses(
        capsys, "diffusers has no model that computes what backbone 'uvit' does",
        "export", f"--workdir={smoke_run}", f"--out={tmp_path / 'out'}", "--to=diffusers",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    code, _, error = run(capsys, "export", f"--workdir={smoke_run}", f"--out={tmp_path / 'out'}", "--to=onnx")
    assert code == 2 and "diffusers" in error

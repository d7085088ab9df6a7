"""The training loop: resuming, stopping, layouts, microbatches, frozen weights, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from scaling_dit.checkpoints.workdir import Workdir, read_config, read_metrics
from scaling_dit.errors import UserError
from scaling_dit.evaluation.in_training import InTraining
from scaling_dit.model import frozen as frozen_weights
from scaling_dit.monitor.writers import JsonlWriter, MultiWriter
from scaling_dit.parallel import rules
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop, start
from scaling_dit.training import step as train_step
from scaling_dit.training.loop import main, train
from scaling_dit.training.start import Run
from tests.support.runs import (
    STEPS,
    assert_same_bits,
    losses,
    open_on_one_device,
    tiny,
    train_on_one_device,
)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """An uninterrupted run on one device: (workdir, final state)."""
    workdir = tmp_path_factory.mktemp("one")
    return workdir, train(tiny(), workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """The same on eight devices that split the parameters: (workdir, final state)."""
    workdir = tmp_path_factory.mktemp("eight")
    return workdir, train(tiny(mesh__data=2, mesh__fsdp=4), workdir, devices=jax.devices()[:8])


def test_eight_devices_that_split_the_parameters_have_the_losses_of_one(one_device, eight_devices):
    np.testing.assert_allclose(losses(eight_devices[0]), losses(one_device[0]), rtol=1e-5)
    assert len(losses(eight_devices[0])) == STEPS


def test_parameters_moments_and_averages_are_sharded_alike(eight_devices):
    _, state = eight_devices
    kernel = state.params["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    name, ema = next(iter(state.emas.items()))
    assert ema["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"].sharding == kernel.sharding, name
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2 and all(x.sharding == kernel.sharding for x in moments)


@pytest.fixture
def sigterm_at_5(monkeypatch):
    """The process gets SIGTERM once, while the run is at step 5; the step after it is the last one made."""
    shown = loop.Progress.update
    sent = []

    def update(self, step, loss=None):
        shown(self, step, loss)
        if step == 5 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(loop.Progress, "update", update)


def test_sigterm_saves_and_the_run_resumes_bit_for_bit(one_device, tmp_path, sigterm_at_5):
    with pytest.raises(loop.Stopped) as stopped:
        train(tiny(), tmp_path, devices=jax.devices()[:1])
    assert stopped.value.code == loop.PREEMPTED
    first = len(losses(tmp_path))
    assert 5 <= first < STEPS
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [first]
    state = train(tiny(), tmp_path, devices=jax.devices()[:1])
    assert_same_bits(state, one_device[1])
    assert losses(tmp_path) == losses(one_device[0])


@pytest.mark.slow
def test_a_checkpoint_of_8_devices_resumes_on_1_and_2(one_device, tmp_path, sigterm_at_5):
    with pytest.raises(loop.Stopped):
        train(tiny(mesh__data=2, mesh__fsdp=4), tmp_path / "1", devices=jax.devices()[:8])
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    for devices, mesh in ((1, {}), (2, {"mesh__data": 1, "mesh__fsdp": 2})):
        workdir = tmp_path / str(devices)
        state = train(tiny(**mesh), workdir, devices=jax.devices()[:devices])
        assert int(state.step) == STEPS
        np.testing.assert_allclose(losses(workdir), losses(one_device[0]), rtol=1e-5)


@pytest.mark.slow
def test_microbatches_change_nothing_but_rounding(one_device, tmp_path):
    train(tiny(optim__accumulate=4), tmp_path, devices=jax.devices()[:1])
    np.testing.assert_allclose(losses(tmp_path), losses(one_device[0]), rtol=1e-5)


def test_a_microbatch_holds_every_nth_row():
    rows = {"x": np.arange(8.0)}
    params = {"w": np.float32(1.0)}
    seen = []

    def loss(p, rows):
        jax.debug.callback(lambda x: seen.append(x.tolist()), rows["x"])
        return (p["w"] * rows["x"]).mean()

    value, grads = train_step.accumulate(
        jax.value_and_grad(loss), params, jax.tree.map(jax.numpy.asarray, rows), 2
    )
    jax.effects_barrier()
    assert sorted(seen) == [[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]]
    assert float(value) == 3.5 and float(grads["w"]) == 3.5


@pytest.fixture
def exploded(monkeypatch):
    """Weights of a new run as an update of a far too large learning rate leaves them."""
    fresh = Run.fresh_state

    def explode(self):
        state = fresh(self)
        # By numpy: jax would compile a product for each shape.
        large = jax.tree.map(lambda x: jax.device_put(1e30 * np.asarray(x), x.sharding), state.params)
        return state.replace(params=large)

    monkeypatch.setattr(Run, "fresh_state", explode)


RATE = {
    "optim__learning_rate": 1e30, "optim__warmup_steps": 0, "optim__clip_norm": 0.0, "optim__max_nonfinite": 3,
}  # fmt: skip


@pytest.mark.parametrize("how", ["weights", pytest.param("rate", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, capsys, request, monkeypatch, how
):
    if how == "weights":
        request.getfixturevalue("exploded")
        config = tiny(checkpoint__every=5)
    else:
        config = tiny(checkpoint__every=1, **RATE)
    # `main` takes all devices.
    train_on_one_device(monkeypatch)
    open_on_one_device(monkeypatch)
    assert main(config, str(tmp_path)) == loop.NONFINITE
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"not finite for {config.optim.max_nonfinite} updates" in message and "learning_rate" in message
    pipe = pipeline.load(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(pipe.params))


@pytest.fixture(scope="module")
def frozen_text(tmp_path_factory):
    """A run whose text encoder is frozen, saved at step 0: (workdir, run, what opens it)."""
    config, workdir = tiny(train_text_encoder=False), tmp_path_factory.mktemp("frozen")
    run = Run.open(config, Workdir(workdir), devices=jax.devices()[:1])
    with loop.open_checkpoints(run) as store:
        store.save(0, run.fresh_state(), run.held())
    with pytest.MonkeyPatch.context() as patch:
        open_on_one_device(patch)
        return workdir, run, pipeline.load(workdir)


def test_a_frozen_text_encoder_is_neither_trained_nor_saved_but_checked(frozen_text):
    _, run, pipe = frozen_text
    with rules.activate(run.program.mesh):
        # Traced alone: what it computes is what any run does.
        state, _ = jax.eval_shape(run.program.step, run.program.state, run.program.frozen, run.program.batch)
    assert set(state.params) == set(pipe.params) == {"backbone"}
    assert set(pipe.frozen) >= {"text_encoder"}
    other = dict(
        pipe.frozen, text_encoder=jax.tree.map(lambda x: np.asarray(x) + 1, pipe.frozen["text_encoder"])
    )
    with pytest.raises(UserError, match="other frozen weights"):
        frozen_weights.check_frozen(
            frozen_weights.frozen_hash(other),
            {"frozen_sha256": frozen_weights.frozen_hash(pipe.frozen)},
            "here",
        )


@pytest.mark.slow
def test_frozen_weights_are_those_of_the_workdir_not_of_the_processor(frozen_text, tmp_path):
    workdir, _, pipe = frozen_text
    before = pipe.frozen["text_encoder"]["embedding"]
    code = (
        "import scaling_dit, numpy, sys; pipe = scaling_dit.load(sys.argv[1]);"
        "numpy.save(sys.argv[2], pipe.frozen['text_encoder']['embedding'])"
    )
    older = {**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "JAX_COMPILATION_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", code, str(workdir), str(tmp_path / "e.npy")], env=older, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), np.asarray(before))


def test_a_start_that_failed_does_not_claim_the_workdir(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        train(tiny(optim__groups=(("nothing", 0.1, 0.0),)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_may_change_between_starts_reaches_the_saved_config(tmp_path):
    train(tiny(steps=2), tmp_path, devices=jax.devices()[:1])
    train(tiny(steps=2, sample__guidance=4.0), tmp_path, devices=jax.devices()[:1])
    assert read_config(tmp_path).sample.guidance == 4.0


@pytest.mark.slow
def test_a_finished_run_given_more_steps_is_as_if_it_had_had_them(tmp_path):
    # Of the program that other tests here compile: its rate is the same however many steps there are.
    whole = train(tiny(steps=8), tmp_path / "whole", devices=jax.devices()[:1])
    train(tiny(steps=4), tmp_path / "parts", devices=jax.devices()[:1])
    longer = train(tiny(steps=8), tmp_path / "parts", devices=jax.devices()[:1])
    assert_same_bits(longer, whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "lists",
    [
        {"eval__metrics": ["shapes_tifa"]},
        pytest.param({"optim__groups": (["backbone", 0.1, 0.0],)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lists_in_a_config_find_their_run_again(tmp_path, lists):
    config = tiny(steps=2, **lists)
    train(config, tmp_path, devices=jax.devices()[:1])
    assert int(train(config, tmp_path, devices=jax.devices()[:1]).step) == 2


def test_a_workdir_of_another_experiment_is_refused(one_device):
    with pytest.raises(UserError, match="another experiment.*optim.learning_rate"):
        train(tiny(optim__learning_rate=1.0), one_device[0])


def test_checkpoints_without_a_config_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="config.json"):
        train(tiny(), tmp_path)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="batch 6"):
        train(tiny(batch=6), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_are_on_a_remote_store_before_the_checkpoint_is(tmp_path, monkeypatch):
    def remote(metrics, tensorboard, patience):
        return MultiWriter([JsonlWriter(metrics, append=False)])

    monkeypatch.setattr(loop, "create_writer", remote)
    # As if killed.
    monkeypatch.setattr(MultiWriter, "close", lambda self: None)
    train(tiny(steps=2), tmp_path, devices=jax.devices()[:1])
    assert len(losses(tmp_path)) == 2


def test_keep_last_and_keep_every(tmp_path):
    config = tiny(steps=4, checkpoint__every=1, checkpoint__keep_last=1, checkpoint__keep_every=2)
    train(config, tmp_path, devices=jax.devices()[:1])
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 4]


def test_an_evaluation_lost_to_a_kill_is_run_again(tmp_path, monkeypatch):
    made = []

    def once(*arguments):
        """Compiled once; nothing of an evaluation stays in it."""
        if not made:
            made.append(InTraining(*arguments))
        return made[0]

    monkeypatch.setattr(start, "InTraining", once)
    config = tiny(steps=2, eval__every=2, sample__steps=2, eval__metrics=())
    train(config, tmp_path, devices=jax.devices()[:1])
    before = [row for row in read_metrics(tmp_path) if "validation/loss" in row]
    # As if killed after the save, before the evaluation.
    for segment in (tmp_path / "metrics").glob("*.jsonl"):
        lines = [
            line for line in segment.read_text().splitlines(keepends=True) if "validation/loss" not in line
        ]
        segment.write_text("".join(lines))
    assert not loop.evaluated(tmp_path, 2)
    train(config, tmp_path, devices=jax.devices()[:1])
    after = [row for row in read_metrics(tmp_path) if "validation/loss" in row]
    assert len(after) == 1 and after[0]["validation/loss"] == before[0]["validation/loss"]


@pytest.mark.slow
def test_rectified_flow_trains_and_samples(tmp_path):
    flow = {"schedule": "flow", "prediction": "flow", "time_sampling": "logit_normal", "time_shift": 2.0}
    config = tiny(
        **{f"diffusion__{name}": value for name, value in flow.items()},
        optim__learning_rate=5e-3, optim__decay="constant",
        eval__every=STEPS, eval__metrics=(), eval__grid=1, sample__sampler="heun", sample__steps=3,
    )  # fmt: skip
    train(config, tmp_path, devices=jax.devices()[:1])
    curve = losses(tmp_path)
    assert np.mean(curve[3:]) < 0.98 * np.mean(curve[:3])
    validation = [row["validation/loss"] for row in read_metrics(tmp_path) if "validation/loss" in row]
    assert len(validation) == 1 and np.isfinite(validation[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_snr": True, "prediction": "eps"},
            "'eps' does not determine the latents where no signal is left",
        ),
        ({"schedule": "flow", "prediction": "eps"}, "predict 'v', 'x0' or 'flow'"),
        ({"schedule": "flow", "zero_snr": True}, "'flow' ends without signal by itself"),
        ({"time_shift": 2.0}, "time_shift=2.0 is for diffusion.schedule 'flow', not 'scaled_linear'"),
    ],
)
def test_settings_of_diffusion_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(**{f"diffusion__{name}": value for name, value in changes.items()}), tmp_path / "new")
    assert not (tmp_path / "new").exists()

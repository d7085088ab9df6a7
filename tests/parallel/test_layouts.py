"""The state of a real run on every layout: where its parts lie, that a checkpoint moves between layouts, the step."""

import functools
import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import trees
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.parallel import rules
from scaling_dit.training import program as program_lib
from scaling_dit.training.program import StepProgram, run_mesh
from tests.support.layouts import LAYOUTS
from tests.support.uvit_golden import fill

QUICK = [("uvit", "DP8"), *((name, "FSDP2xCTX2xTP2") for name in ("uvit", "unet"))]
MESHES = {name: sizes for name, sizes in LAYOUTS.items() if name != "DP2xFSDP2xTP2"}
BACKBONES = {
    "uvit": {"hidden": 32, "depth": 2, "heads": 2, "patch": 8, "scan_layers": True},
    "unet": {
        "channels": 32,
        "channel_mult": (1, 2),
        "res_blocks": 1,
        "transformer_depth": (0, 1),
        "head_dim": 16,
    },
}


@functools.cache
def program(name, layout, accumulate=1):
    """(config, program) of a tiny run whose widths divide by every layout; layout None: one device."""
    config = config_lib.load("experiments/shapes.py:smoke")
    with config.unlocked():
        config.backbone = ConfigDict({"name": name} | BACKBONES[name])
        config.batch, config.optim.accumulate = 16, accumulate
        config.mesh = ConfigDict(LAYOUTS[layout] if layout else {})
    config = config_lib.resolve(config)
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    mesh = run_mesh(config, None if layout else jax.devices()[:1])
    return config, StepProgram.build(config, model, mesh)


@pytest.mark.parametrize(
    "name, layout",
    [
        # At once on the layout that another test here has traced as well, and without anything split.
        pytest.param(name, layout, marks=[pytest.mark.slow] * ((name, layout) not in QUICK))
        for name in BACKBONES
        for layout in MESHES
    ],
)
def test_moments_and_averages_lie_where_their_parameters_do(name, layout):
    """By the shardings that the jitted step takes and gives back."""
    _, found = program(name, layout)
    placed = {path: leaf.sharding for path, leaf in trees.by_path(found.state).items()}
    params = {path[1:]: sharding for path, sharding in placed.items() if path[0] == "params"}
    followed = 0
    for path, sharding in placed.items():
        owner = next((path[i:] for i in range(1, len(path)) if path[i:] in params), None)
        if owner is not None:
            assert sharding == params[owner], path
            followed += path[0] != "params"
    averages = len(found.state.emas)
    assert followed == (2 + averages) * len(params)
    split = sum(not sharding.is_fully_replicated for sharding in params.values())
    assert (split > len(params) / 4) == (layout != "DP8")


def test_only_transformers_run_with_their_tokens_split():
    """`context` of a UNet's run is a part of `data`, whatever its config says."""
    shapes = {name: dict(program(name, "FSDP2xCTX2xTP2")[1].mesh.shape) for name in BACKBONES}
    assert shapes["uvit"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    assert shapes["unet"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


@pytest.mark.slow
def test_a_step_is_compiled_as_its_mesh_and_the_table_of_options_say(monkeypatch):
    """Neither gathering by hand nor XLA's options change a loss, so only the program shows that they are there."""
    config, plain = program("uvit", "DP2xFSDP4")
    assert "all_gather" not in plain.lower().as_text()
    with config.copy_and_resolve_references().unlocked() as changed:
        changed.sharding.update({"gather_once": True, "sparse_core": True})
    source = open_source(changed)
    model = build_model(changed, make_tokenizer(changed, source), source)
    monkeypatch.setattr(
        program_lib.xla_flags, "options", lambda devices, sparse_core: {"xla_of_another_world": sparse_core}
    )
    lowered = StepProgram.build(changed, model, run_mesh(changed)).lower()
    assert "all_gather" in lowered.as_text()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_another_world"):
        lowered.compile()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_of_any_layout_is_read_on_any_other(tmp_path):
    """Around all five: each is written once, and read on the next."""
    names = [*MESHES, next(iter(MESHES))]
    values = fill(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_of("DP8")))
    wanted = trees.by_path(values)
    for written, reader in itertools.pairwise(names):
        state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), values, state_of(written))
        with Checkpoints(tmp_path / written) as store:
            store.save(3, state, {}, wait=True)
            target = trees.by_path(state_of(reader))
            found, _ = store.restore(3, state_of(reader))
        for path, leaf in trees.by_path(found).items():
            assert leaf.sharding == target[path].sharding
            np.testing.assert_array_equal(leaf, wanted[path])


def state_of(layout):
    return program("uvit", layout)[1].state


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_step_is_that_of_one_device():
    """Noise, loss, optimiser and averages included; with both encoders in the program.

    The step is the same code for all backbones, whose gradients have a test of their own.
    """
    results = []
    for layout in (None, "FSDP2xCTX2xTP2"):
        config, made = program("uvit", layout, accumulate=2)
        # To make one compiles for as long as half a step.
        params = fill(made.state.params)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.state)
        state = state.replace(params=params, emas=dict.fromkeys(state.emas, params))
        state, model_frozen = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding),
            (state, fill(made.frozen)),
            (made.state, made.frozen),
        )
        rng = np.random.default_rng(0)
        batch = {
            key: rng.integers(0, 2 if leaf.dtype == bool else 5, leaf.shape).astype(leaf.dtype)
            for key, leaf in made.batch.items()
            if key != "seed"
        }
        losses, step = [], made.lower().compile()
        with rules.activate(made.mesh):
            for _ in range(2):
                given = rules.to_global(batch, made.mesh, config.batch)
                given["seed"] = program_lib.place_seed(config.seed, made.mesh)
                state, metrics = step(state, model_frozen, given)
                losses.append(float(metrics["loss"]))
        results.append((losses, trees.by_path(jax.device_get(state.params))))
    (losses, params), (wanted_losses, wanted) = results[1], results[0]
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    # Adam's first steps follow the sign of a gradient, so an entry that is only rounding may move either way.
    moved = 2 * 2 * config.optim.learning_rate
    for path, value in wanted.items():
        np.testing.assert_allclose(params[path], value, atol=moved)

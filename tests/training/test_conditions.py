"""Training with image conditions: resumed bit by bit, the same on every layout, sampled from its folder."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from scaling_dit import config as config_lib
from scaling_dit import trees
from scaling_dit.cli import main as cli
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.parallel import rules
from scaling_dit.parallel.topologies import LOCAL, parse
from scaling_dit.planning import plan
from scaling_dit.training import loop
from scaling_dit.training.program import StepProgram, run_mesh
from tests.support.layouts import LAYOUTS
from tests.support.runs import assert_same_bits, losses, tiny
from tests.support.uvit_golden import fill

# Its layouts are a test of the step alone.
pytestmark = pytest.mark.usefixtures("on_one_device")

ONE = jax.devices()[:1]
RUN = {"conditioning__names": ("inpaint",), "batch": 8}
SIDE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of four steps."""
    workdir = tmp_path_factory.mktemp("conditions") / "run"
    return workdir, loop.train(tiny(steps=4, **RUN), workdir, ONE)


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit(run, tmp_path):
    workdir, whole = run
    loop.train(tiny(steps=2, **RUN), tmp_path, ONE)
    resumed = loop.train(tiny(steps=4, **RUN), tmp_path, ONE)
    assert_same_bits(resumed, whole)
    assert losses(tmp_path) == losses(workdir)
    # The kernel of the condition has left its initial value: it was trained.
    kernel = whole.params["backbone"]["condition_embed"]["inpaint"]["kernel"]
    fresh = whole.params["backbone"]["patch_embed"]["kernel"]
    assert kernel.shape[0] * 3 == fresh.shape[0] * 4


@pytest.mark.slow
def test_images_of_the_command_line_are_in_the_manifest(run, tmp_path, capsys):
    workdir, _ = run
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 8:] = 255
    for name, pixels in (
        ("image", image),
        ("mask", mask),
        ("other", 255 - image),
        ("large", np.repeat(image, 2, 0)),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    request = ["sample", f"--workdir={workdir}", "--steps=2", "--keep", "a red circle"]

    def sample(name, *more):
        given = f"--condition=inpaint:{tmp_path}/{name}.png,{tmp_path}/mask.png"
        return cli.main([*request, given, *more])

    assert sample("image") == 0 and sample("image") == 0
    (folder,) = [path for path in (workdir / "samples").iterdir() if "-keepTrue" in path.name]
    (row,) = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    assert row["keep"] is True and len(row["conditions"]["inpaint"]) == 64
    made = np.asarray(Image.open(folder / row["path"]))
    np.testing.assert_array_equal(made[:, :8], image[:, :8])
    # Another image gets a folder of its own, and is refused in this one.
    assert sample("other") == 0
    assert len([path for path in (workdir / "samples").iterdir() if "-keepTrue" in path.name]) == 2
    capsys.readouterr()
    assert sample("other", f"--out={folder}") == 2
    assert "holds images of another request (conditions differ" in capsys.readouterr().err
    assert sample("large") == 2
    assert "a mask has its image's size" in capsys.readouterr().err
    assert cli.main([*request]) == 2
    assert "keep needs a condition with a mask" in capsys.readouterr().err


@functools.cache
def program(layout, gather_once=False):
    """(config, program) of a step of a tiny U-ViT of one block on a layout; None: one device."""
    fields = {"name": "uvit", "hidden": 32, "depth": 1, "heads": 2, "patch": 8}
    overrides = [f"--config.backbone.{key}={value}" for key, value in fields.items()]
    overrides += [
        "--config.conditioning.names=('inpaint','edit')",
        "--config.conditions.inpaint.concat=token",
        "--config.conditions.edit.concat=channel",
        f"--config.sharding.gather_once={gather_once}",
        "--config.batch=16",
        "--config.optim.accumulate=2",
    ]
    config = config_lib.load("experiments/shapes.py:smoke", overrides)
    with config.copy_and_resolve_references().unlocked() as config:
        config.mesh.update(LAYOUTS[layout] if layout else {"data": 1})
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    return config, StepProgram.build(config, model, run_mesh(config, None if layout else ONE))


@functools.cache
def begun():
    """The state of one device that every layout begins with: to make one compiles as long as half a step."""
    config, made = program(None)
    return jax.device_get(made.init(jax.random.key(config.seed)))


def outcome(layout, gather_once=False):
    """(losses, parameters, learning rate) of two steps on a layout; None: one device."""
    config, made = program(layout, gather_once)
    values = begun(), fill(made.frozen)
    state, frozen = jax.tree.map(
        lambda x, leaf: jax.device_put(x, leaf.sharding), values, (made.state, made.frozen)
    )
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda leaf: rng.integers(0, 2 if leaf.dtype == bool else 5, leaf.shape).astype(leaf.dtype),
        {key: leaf for key, leaf in made.batch.items() if key != "seed"},
    )
    found = []
    lowered = made.lower()
    assert not gather_once or "all_gather" in lowered.as_text()
    step = lowered.compile()
    with rules.activate(made.mesh):
        inputs = rules.to_global(batch, made.mesh, config.batch)
        inputs["seed"] = jax.device_put(np.uint32(0), rules.whole(made.mesh))
        for _ in range(2):
            state, metrics = step(state, frozen, inputs)
            found.append(float(metrics["loss"]))
    return found, trees.by_path(jax.device_get(state.params)), config.optim.learning_rate


@functools.cache
def one_device():
    return outcome(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, gather_once",
    [
        # Split by examples alone, by all else, and gathered by hand; the other layouts have the gradients of one
        # device by the tests of every backbone.
        ("DP8", False),
        ("FSDP2xCTX2xTP2", False),
        ("DP2xFSDP4", True),
    ],
)
def test_a_whole_step_is_that_of_one_device(layout, gather_once):
    """One condition as tokens beside one as channels; what is dropped, noise, loss, optimiser and averages included."""
    wanted_losses, wanted, rate = one_device()
    found_losses, found, _ = outcome(layout, gather_once)
    np.testing.assert_allclose(found_losses, wanted_losses, rtol=1e-5)
    # Adam's first steps follow the sign of a gradient, so an entry that is only rounding may move either way.
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, atol=2 * 2 * rate)


@pytest.mark.slow
def test_a_plan_has_the_conditions_in_its_step():
    """More FLOPs and memory with them than without, on the devices here."""
    plans = []
    for names in ("()", "('inpaint',)"):
        small = ["--config.backbone.depth=1", f"--config.conditioning.names={names}"]
        config = config_lib.load("experiments/shapes.py:smoke", small)
        plans.append(plan.make(config, parse(LOCAL)))
    without, found = plans
    assert found.model_flops > without.model_flops
    assert found.memory.peak > without.memory.peak

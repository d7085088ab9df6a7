"""Every backbone computes on a mesh what it computes on one device: XLA has split products wrongly and silently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from scaling_dit import backbones, trees
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from tests.support.layouts import FIELDS, LAYOUTS
from tests.support.parity import example
from tests.support.uvit_golden import fill, run

TRANSFORMERS = ("uvit", "pixart", "large_dit", "next_dit")
# One block: compiling for eight devices takes the time.
QUICK = [("uvit", "FSDP2xCTX2xTP2", {"depth": 1})]
# Image conditions: tokens before those of the image, and channels; UNets have channels alone.
CONDITIONS = {"conditions": (("tokens", 5, "token", "shared"), ("channels", 4, "channel", "shared"))}
SCANNED = {"scan_layers": True}
# A second block compiles for as long as the first and has the same products. Scanned, there are two.
SMALLER = {name: {"depth": 1} for name in TRANSFORMERS if name != "uvit"}
SLOW = [("uvit", layout, {}) for layout in LAYOUTS]
# One family takes every layout. The others take the two that split three axes, layer by layer with conditions on the
# one and scanned on the other, and the one that most runs have; what one device computes of a mode is compiled once.
SLOW += [(name, "FSDP2xCTX2xTP2", CONDITIONS) for name in TRANSFORMERS]
SLOW += [(name, "DP2xFSDP2xTP2", SCANNED) for name in TRANSFORMERS]
SLOW += [(name, "FSDP8", SCANNED) for name in TRANSFORMERS[1:]]
# A UNet takes the layout that splits three axes and the one that most runs have. It splits no tokens, so `context`
# makes no other. Scanned and with conditions at once, for one device compiles it for as long as eight do.
for layout in ("DP2xFSDP2xTP2", "FSDP8"):
    SLOW += [
        ("unet", layout, SCANNED | {"conditions": CONDITIONS["conditions"][1:]}),
        ("unet_if", layout, {}),
    ]


@functools.cache
def backbone_and_inputs(name, modes):
    """A backbone, its inputs, and its variables as boxed shapes and as numbers."""
    modes = dict(modes)
    smaller = {} if "scan_layers" in modes else SMALLER.get(name, {})
    backbone = backbones.create(name, text_dim=16, **FIELDS[name] | smaller | modes)
    inputs = example(backbone, 4, 4, batch=8)
    if backbone.conditions:
        present = jnp.arange(8) % 3 != 1
        images = {
            name: jnp.cos(jnp.arange(8 * 16 * c)).reshape(8, 4, 4, c) for name, c, *_ in backbone.conditions
        }
        inputs += ({name: (image, present) for name, image in images.items()},)
    boxed = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)
    return backbone, inputs, boxed, fill(trees.unbox(boxed))


def outcome(name, modes, mesh=None):
    """Loss, prediction and gradients of parameters and latents as numpy, on a mesh or on one device."""
    backbone, inputs, boxed, variables = backbone_and_inputs(name, modes)

    def value_and_grads(variables, latents, *rest):
        def loss(variables, latents):
            prediction = backbone.apply(variables, latents, *rest)
            weights = jnp.cos(jnp.arange(prediction.size)).reshape(prediction.shape)
            return jnp.mean(jnp.square(prediction - weights)), prediction

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, latents)

    if mesh is None:
        return flatten(run(value_and_grads, variables, *inputs))
    inputs = jax.device_put(inputs, rules.batch_sharding(mesh))
    variables = jax.device_put(variables, rules.param_shardings(mesh, boxed))
    with rules.activate(mesh):
        return flatten(run(value_and_grads, variables, *inputs))


def flatten(result):
    (loss, prediction), (grads, grad_latents) = jax.device_get(result)
    results = {"loss": loss, "prediction": prediction, "latents": grad_latents}
    return traverse_util.flatten_dict(grads, sep="/") | results


@functools.cache
def one_device(name, modes):
    return outcome(name, modes)


@pytest.mark.parametrize(
    "name, layout, modes",
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_loss_and_gradients_are_those_of_one_device(name, layout, modes):
    modes = tuple(modes.items())
    wanted = one_device(name, modes)
    mesh = make_mesh(**LAYOUTS[layout], splits_tokens=backbones.splits_tokens(name))
    found = outcome(name, modes, mesh)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    # A gradient that is nothing but rounding, such as that of a bias before a norm, is measured by the largest.
    floor = 1e-3 * max(np.abs(value).max() for value in wanted.values())
    errors = {
        key: np.abs(found[key] - value).max() / max(np.abs(value).max(), floor)
        for key, value in wanted.items()
    }
    assert max(errors.values()) < 1e-4, {key: error for key, error in errors.items() if error >= 1e-4}


def test_the_transformers_split_tokens_and_the_unets_do_not():
    assert [name for name in FIELDS if backbones.splits_tokens(name)] == [
        "uvit", "pixart", "large_dit", "next_dit",
    ]  # fmt: skip

"""Every backbone computes on a mesh what it computes on one device: XLA has split products wrongly without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones.parity import example
from flax import traverse_util
from uvit_golden import fill

from scaling_dit import backbones, trees
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh

TRANSFORMER = {"hidden": 32, "depth": 2, "heads": 2}
UNET = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "head_dim": 16}
FIELDS = {
    "uvit": TRANSFORMER,
    "pixart": TRANSFORMER,
    "large_dit": TRANSFORMER,
    "next_dit": TRANSFORMER,
    "unet": UNET | {"transformer_depth": (0, 2)},
    "unet_if": UNET | {"attention_levels": (1,)},
}
SCANNED = [name for name in FIELDS if name != "unet_if"]
EVERY_AXIS = {"data": 2, "fsdp": 2, "tensor": 2}
CONTEXT = {"fsdp": 2, "context": 2, "tensor": 2}
QUICK = [("pixart", {}, EVERY_AXIS)]
SLOW = [(name, {}, axes) for name in FIELDS for axes in (EVERY_AXIS, CONTEXT)]
SLOW += [(name, {"scan_layers": True}, EVERY_AXIS) for name in SCANNED]


@pytest.mark.parametrize(
    "name, modes, axes",
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK],
)
def test_outputs_and_gradients_are_those_of_one_device(name, modes, axes):
    backbone = backbones.create(name, text_dim=12, **FIELDS[name], **modes)
    inputs = example(backbone, 4, 4, batch=4)
    boxed = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)
    variables = fill(trees.unbox(boxed))

    @jax.jit
    def outcome(variables, latents, *rest):
        def loss(variables, latents):
            prediction = backbone.apply(variables, latents, *rest)
            return (
                prediction * jnp.cos(jnp.arange(prediction.size)).reshape(prediction.shape)
            ).sum(), prediction

        return jax.grad(loss, (0, 1), has_aux=True)(variables, latents)

    wanted = flatten(outcome(variables, *inputs))
    mesh = make_mesh(**axes)
    inputs = jax.device_put(inputs, rules.batch_sharding(mesh))
    variables = jax.device_put(variables, rules.param_shardings(mesh, boxed))
    with rules.activate(mesh):
        found = flatten(outcome(variables, *inputs))
    floor = 1e-3 * max(
        np.abs(value).max() for value in wanted.values()
    )  # a bias before a norm has no gradient
    errors = {
        key: np.abs(found[key] - value).max() / max(np.abs(value).max(), floor)
        for key, value in wanted.items()
    }
    assert max(errors.values()) < 1e-3, {key: error for key, error in errors.items() if error >= 1e-3}


def flatten(outcome):
    (grads, grad_latents), prediction = jax.device_get(outcome)
    return traverse_util.flatten_dict(grads, sep="/") | {"latents": grad_latents, "prediction": prediction}

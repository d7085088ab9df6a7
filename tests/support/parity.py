"""Checks that every backbone passes: against torch with all weights random, and its own modes against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from scaling_dit import interop
from scaling_dit.backbones import contract
from tests.support.uvit_golden import fill, run

MODES = {
    "remat full": {"remat": "full"},
    "remat dots": {"remat": "dots"},
    "scanned": {"scan_layers": True},
    "scanned, remat dots": {"scan_layers": True, "remat": "dots"},
}


def relative(found, wanted) -> float:
    """Norm of the difference over the norm of the reference."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def randomise_(module: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Fills all parameters in place, gates and zero-initialised layers too, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, scale, generator=generator)
    return module


def example(backbone, height, width, *, length=5, batch=2, seed=0):
    """Random latents, timesteps, text and a mask that hides the last two tokens of the first caption."""
    rng = np.random.default_rng(seed)
    # Of numpy: jax compiles a program for each new shape to make an array of its own.
    return (
        rng.normal(size=(batch, height, width, backbone.in_channels)).astype("f4"),
        rng.uniform(0, 1000, batch).astype("f4"),
        rng.normal(size=(batch, length, backbone.text_dim)).astype("f4"),
        np.arange(length) < np.where(np.arange(batch) == 0, length - 2, length)[:, None],
    )


def value_and_grads(backbone, variables, inputs, *, compiled=True):
    """The prediction, and of its product with fixed random numbers the gradients of the variables and the latents."""
    latents, *rest = inputs

    def loss(variables, latents):
        prediction = backbone.apply(variables, latents, *rest)
        weights = np.random.default_rng(5).normal(size=prediction.shape).astype("f4")
        return (prediction * weights).sum(), prediction

    grad = jax.grad(loss, (0, 1), has_aux=True)
    (grads, grad_latents), prediction = (run if compiled else lambda f, *a: f(*a))(grad, variables, latents)
    return prediction, grads, grad_latents


def check_scan_remat_jit(make_backbone, inputs, modes=MODES, tolerance=1e-4, eager="gradients"):
    """Outputs and all gradients are the same eagerly, compiled, with each way to save memory, and scanned.

    Args:
      make_backbone: fields -> a backbone that has a table of names, so that layers can be stacked and taken apart.
      inputs: positional inputs of its call.
      modes: name -> the fields that make it.
      tolerance: largest difference over the largest value.
      eager: what is computed eagerly as well: "gradients", with the prediction; "prediction" alone; or "nothing".
    """
    plain = make_backbone()
    weights = interop.to_state_dict(plain, fill(contract.abstract_variables(plain, inputs)))

    def outcome(backbone, **options):
        variables = interop.load_state_dict(backbone, weights)
        prediction, grads, grad_latents = value_and_grads(backbone, variables, inputs, **options)
        return {"": prediction, "latents": grad_latents} | interop.to_state_dict(backbone, grads)

    wanted = outcome(plain, compiled=eager != "gradients")
    if eager == "prediction":
        found = plain.apply(interop.load_state_dict(plain, weights), *jax.tree.map(jnp.asarray, inputs))
        assert np.abs(found - wanted[""]).max() <= tolerance * np.abs(np.asarray(wanted[""])).max()
    # A gradient that is nothing but rounding, such as that of a key's bias, is measured by the others.
    floor = 1e-3 * max(np.abs(np.asarray(value)).max() for name, value in wanted.items() if name)
    for mode, fields in (({"compiled": {}} if eager == "gradients" else {}) | modes).items():
        found = outcome(make_backbone(**fields))
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            worst = np.abs(np.asarray(found[name]) - np.asarray(value)).max()
            assert worst <= tolerance * max(np.abs(np.asarray(value)).max(), floor), (mode, name, worst)


def check_bf16(make_backbone, inputs, limit=0.02):
    """Products in bfloat16 change the float32 prediction, and by less than `limit` of its norm."""
    full, half = make_backbone(), make_backbone(dtype="bfloat16")
    variables = fill(contract.abstract_variables(full, inputs))
    wanted, found = run(full.apply, variables, *inputs), run(half.apply, variables, *inputs)
    assert found.dtype == jnp.float32
    assert 0 < relative(found, wanted) < limit

"""Classifier-free guidance (Ho & Salimans 2022), its rescaling and its interval."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_dit.diffusion.samplers import Predict

# Whatever conditions the backbone: a pytree of arrays with a leading batch axis, such as
# {"text": tokens [B, L, D], "text_mask": bool [B, L]}.
Condition = Any
EVERYWHERE = (0.0, 1000.0)  # the interval of all timesteps


def guided(
    predict: Callable[[jax.Array, jax.Array, Condition], jax.Array],
    scale: float,
    condition: Condition,
    negative: Condition,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Predict:
    """`predict(latents, timesteps, condition)` with guidance: negative + scale * (positive - negative).

    `negative` has the structure of `condition`, with leading axis B or 1: the empty caption, or a prompt to
    steer away from. Both halves go through `predict` in one call with batch 2B; scale 1 calls it with
    `condition` alone and batch B.

    Args:
      rescale: phi in [0, 1]; how far the result goes back to the spread of the positive half (Lin et al. 2024, section
        3.4). 0 leaves it as it is.
      interval: (low, high); rows with timesteps outside [low, high] have scale 1 (Kynkäänniemi et al. 2024). The call
        is the same inside and outside, so one compiled program serves all timesteps.

    The result maps latents [B, H, W, C] and timesteps [B] to a float32 prediction.
    """
    if scale == 1.0:
        return lambda latents, timesteps: predict(latents, timesteps, condition).astype(jnp.float32)

    def both(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        pairs = jax.tree.map(_interleave, negative, condition)
        output = predict(_interleave(latents, latents), _interleave(timesteps, timesteps), pairs)
        output = output[..., : latents.shape[-1]].astype(jnp.float32)
        output = output.reshape(-1, 2, *output.shape[1:])
        positive, difference = output[:, 1], output[:, 1] - output[:, 0]
        combined = output[:, 0] + scale * difference
        if rescale:
            combined = rescaled(combined, positive, rescale)
        if tuple(interval) == EVERYWHERE:
            return combined
        inside = (timesteps >= interval[0]) & (timesteps <= interval[1])
        return jnp.where(inside.reshape(-1, *[1] * (latents.ndim - 1)), combined, positive)

    return both


def rescaled(combined: jax.Array, positive: jax.Array, phi: float) -> jax.Array:
    """`combined` [B, ...] with the standard deviation of `positive` in each row, mixed with itself by phi.

    phi combined * std(positive) / std(combined) + (1 - phi) combined (Lin et al. 2024, eq. 15 and 16).
    """
    axes = tuple(range(1, combined.ndim))
    spread = jnp.std(combined, axis=axes, keepdims=True)
    factor = jnp.std(positive, axis=axes, keepdims=True) / jnp.maximum(spread, 1e-12)
    return combined * (phi * factor + (1.0 - phi))


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows first[0], second[0], first[1], ...: if the batch is sharded, a row's halves stay on its device."""
    pairs = jnp.stack([jnp.broadcast_to(first, second.shape), second], axis=1)
    return pairs.reshape(-1, *second.shape[1:])

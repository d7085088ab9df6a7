"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_dit.diffusion.samplers import Predict

# Whatever conditions the backbone: a pytree of arrays with a leading batch axis, such as
# {"text": tokens [B, L, D], "text_mask": bool [B, L]}.
Condition = Any


def guided(
    predict: Callable[[jax.Array, jax.Array, Condition], jax.Array],
    scale: float,
    condition: Condition,
    negative: Condition,
) -> Predict:
    """`predict(latents, timesteps, condition)` with guidance: negative + scale * (positive - negative).

    `negative` has the structure of `condition`, with leading axis B or 1: the empty caption, or a prompt to
    steer away from. Both halves go through `predict` in one call with batch 2B; scale 1 calls it with
    `condition` alone and batch B.

    The result maps latents [B, H, W, C] and timesteps [B] to a float32 prediction.
    """
    if scale == 1.0:
        return lambda latents, timesteps: predict(latents, timesteps, condition).astype(jnp.float32)

    def both(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        pairs = jax.tree.map(_interleave, negative, condition)
        output = predict(_interleave(latents, latents), _interleave(timesteps, timesteps), pairs)
        output = output.astype(jnp.float32).reshape(-1, 2, *output.shape[1:])
        return output[:, 0] + scale * (output[:, 1] - output[:, 0])

    return both


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows first[0], second[0], first[1], ...: if the batch is sharded, a row's halves stay on its device."""
    pairs = jnp.stack([jnp.broadcast_to(first, second.shape), second], axis=1)
    return pairs.reshape(-1, *second.shape[1:])

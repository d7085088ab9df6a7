"""Classifier-free guidance (Ho & Salimans 2022), its rescaling and its interval; or guidance of a user's own."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from scaling_dit.components import Seam
from scaling_dit.diffusion import contract
from scaling_dit.diffusion.samplers import Predict

# Whatever conditions the backbone: a pytree of arrays with a leading batch axis, such as
# {"text": tokens [B, L, D], "text_mask": bool [B, L]}.
Condition = Any
# The interval of all timesteps.
EVERYWHERE = (0.0, 1000.0)
METHODS = ("cfg",)
SEAM = Seam("sample.guidance_method", METHODS)


class Guidance(Protocol):
    """How the predictions with and without the prompt are combined.

    `config.sample.guidance_rescale` and `guidance_interval` act on what it returns; a scale of 1 does without it.
    """

    def __call__(
        self,
        positive: jax.Array,
        negative: jax.Array,
        latents: jax.Array,
        timesteps: jax.Array,
        scale: float,
    ) -> jax.Array:
        """The prediction float32 [B, H, W, C] that the sampler goes by.

        Args:
          positive: prediction for the prompts, float32 [B, H, W, C], of the kind `config.diffusion.prediction`.
          negative: that for the empty captions.
          latents: float32 [B, H, W, C], noised.
          timesteps: float32 [B] in [0, 1000).
          scale: `config.sample.guidance`.
        """


def classifier_free(
    positive: jax.Array, negative: jax.Array, latents: jax.Array, timesteps: jax.Array, scale: float
) -> jax.Array:
    """negative + scale * (positive - negative); see `Guidance`."""
    return negative + scale * (positive - negative)


def create_guidance(name: str, fields: Mapping[str, Any]) -> Guidance:
    """The guidance called `name`, "cfg" or "package.module:Name" with its fields.

    Raises:
      UserError: unknown name or field, or a user's own that is none.
    """
    found: Guidance = SEAM.create(name, fields, lambda: classifier_free, contract.check_guidance)
    return found


def guided(
    predict: Callable[[jax.Array, jax.Array, Condition], jax.Array],
    scale: float,
    condition: Condition,
    negative: Condition,
    *,
    method: Guidance = classifier_free,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
    bare: Condition | None = None,
    bare_scale: float = 1.0,
) -> Predict:
    """`predict(latents, timesteps, condition)` with guidance: `method` of both predictions.

    `negative` has the structure of `condition`, with leading axis B or 1: the empty caption, or a prompt to
    steer away from. Both halves go through `predict` in one call with batch 2B; scale 1 calls it with
    `condition` alone and batch B, unless image conditions are guided as well.

    Args:
      predict: the backbone.
      scale: of guidance.
      condition: for the prompts.
      negative: what to steer away from.
      method: how both predictions are combined.
      rescale: phi in [0, 1]; how far the result goes back to the spread of the positive half (Lin et al. 2024,
        section 3.4). 0 leaves it as it is.
      bare: `negative` without its image conditions, with leading axis B or 1. With it and a `bare_scale` other than 1
        there are three parts of batch B in a call.
      bare_scale: of the guidance on image conditions, s_c: (s_c - 1) (negative - bare) is added to the result of
        `method`. With `classifier_free` and scale s_t that is InstructPix2Pix's (arXiv 2211.09800, eq. 3)
        bare + s_c (negative - bare) + s_t (positive - negative).
      interval: (low, high); rows with timesteps outside [low, high] have scale 1 (Kynkäänniemi et al. 2024). The call
        is the same inside and outside, so one compiled program serves all timesteps.

    The result maps latents [B, H, W, C] and timesteps [B] to a float32 prediction.
    """
    three = bare is not None and bare_scale != 1.0
    if scale == 1.0 and not three:
        return lambda latents, timesteps: predict(latents, timesteps, condition).astype(jnp.float32)

    def both(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        parts = (bare, negative, condition) if three else (negative, condition)
        together = jax.tree.map(_interleave, *parts)
        output = predict(
            _interleave(*[latents] * len(parts)), _interleave(*[timesteps] * len(parts)), together
        )
        output = output[..., : latents.shape[-1]].astype(jnp.float32)
        output = output.reshape(-1, len(parts), *output.shape[1:])
        positive, without_text = output[:, -1], output[:, -2]
        combined = positive
        if scale != 1.0:
            combined = method(positive, without_text, latents, timesteps, scale)
        if three:
            combined += (bare_scale - 1.0) * (without_text - output[:, 0])
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


def _interleave(*parts: jax.Array) -> jax.Array:
    """Rows first[0], second[0], first[1], ...: if the batch is sharded, a row's parts stay on its device.

    All are broadcast to the last.
    """
    last = parts[-1]
    together = jnp.stack([jnp.broadcast_to(part, last.shape) for part in parts], axis=1)
    return together.reshape(-1, *last.shape[1:])

"""The training loss, the error of the validation loss, and the random dropping of captions.

What a backbone predicts is in `predictions.py`, how its error is weighted in `weightings.py`. Everything here computes
in float32, whatever type the backbone returns.
"""

import jax
import jax.numpy as jnp

from scaling_dit.diffusion.predictions import Kind, expand, from_x0_eps, to_x0_eps
from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.diffusion.weightings import Weighting, loss_weight


def add_noise(schedule: Schedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Latents [B, ...] noised to timesteps [B]: alpha(t) latents + sigma(t) noise."""
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    return expand(alpha, latents) * latents + expand(sigma, latents) * noise


def diffusion_loss(
    output: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    schedule: Schedule,
    *,
    prediction: Kind = "eps",
    weighting: str | Weighting = "none",
    gamma: float = 5.0,
) -> jax.Array:
    """Training loss of each example, float32 [B]: weighted squared error, averaged over H, W and C.

    `output` [B, H, W, C or 2C] is what the backbone returned for `add_noise(schedule, latents, noise,
    timesteps)`; only its first C channels count. latents and noise [B, H, W, C], timesteps [B].

    Raises:
      UserError: unknown kind of prediction or weighting.
    """
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    target = from_x0_eps(prediction, latents, noise, alpha, sigma)
    errors = _mean_square(_first_channels(output, latents) - target)
    return loss_weight(alpha, sigma, prediction, weighting, gamma, timesteps) * errors


def eps_mse(
    output: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    schedule: Schedule,
    *,
    prediction: Kind = "eps",
) -> jax.Array:
    """Squared error of the implied noise, float32 [B], averaged over H, W and C.

    Comparable between models whatever each was trained to predict, at equal sigma / alpha whatever the schedule: the
    noise in a latent does not change when it is scaled. Shapes and errors as in `diffusion_loss`.
    """
    noisy = add_noise(schedule, latents, noise, timesteps)
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    _, eps = to_x0_eps(prediction, _first_channels(output, latents), noisy, alpha, sigma)
    return _mean_square(eps - noise)


def drop_captions(
    rng: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    empty_ids: jax.Array,
    empty_mask: jax.Array,
    rate: float,
) -> tuple[jax.Array, jax.Array]:
    """ids and mask [B, L] with a random share `rate` of the rows replaced by the empty caption's [L].

    Trains the unconditional half of guidance (Ho & Salimans 2022, section 3.2). Draw for the whole global
    batch.
    """
    dropped = jax.random.bernoulli(rng, rate, (ids.shape[0], 1))
    return jnp.where(dropped, empty_ids, ids), jnp.where(dropped, empty_mask, mask)


def _first_channels(output: jax.Array, latents: jax.Array) -> jax.Array:
    return output[..., : latents.shape[-1]].astype(jnp.float32)


def _mean_square(errors: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(errors), axis=tuple(range(1, errors.ndim)))

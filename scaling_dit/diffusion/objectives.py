"""What a backbone predicts and how its prediction is scored.

A prediction is of one kind: "eps" (the noise), "x0" (the clean latents) or "v" = alpha eps - sigma x0
(Salimans & Ho 2022, section 4). Given the noised latents all three say the same; `to_x0_eps` and
`from_x0_eps` translate.

Everything here computes in float32, whatever type the backbone returns.
"""

import jax
import jax.numpy as jnp

from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError, nearest

PREDICTIONS = ("eps", "x0", "v")
WEIGHTINGS = ("none", "min_snr")


def add_noise(schedule: Schedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Latents [B, ...] noised to timesteps [B]: alpha(t) latents + sigma(t) noise."""
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    return _expand(alpha, latents) * latents + _expand(sigma, latents) * noise


def to_x0_eps(
    prediction: str, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Clean latents and noise, both [B, ...], that a `value` [B, ...] of kind `prediction` implies.

    `noisy` [B, ...] is what the backbone saw; alpha and sigma are [B] or scalars. "eps" needs alpha > 0,
    "x0" sigma > 0.

    Raises:
      UserError: unknown kind of prediction.
    """
    alpha, sigma = _expand(alpha, noisy), _expand(sigma, noisy)
    if prediction == "eps":
        return (noisy - sigma * value) / alpha, value
    if prediction == "x0":
        return value, (noisy - alpha * value) / sigma
    if prediction == "v":
        return alpha * noisy - sigma * value, alpha * value + sigma * noisy
    raise _unknown_prediction(prediction)


def from_x0_eps(
    prediction: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """The value [B, ...] of kind `prediction` for clean latents x0 and noise eps [B, ...].

    alpha and sigma are [B] or scalars.

    Raises:
      UserError: unknown kind of prediction.
    """
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return _expand(alpha, eps) * eps - _expand(sigma, x0) * x0
    raise _unknown_prediction(prediction)


def loss_weight(snr: jax.Array, prediction: str, weighting: str, gamma: float = 5.0) -> jax.Array:
    """Factor [B] of a squared error in the space of `prediction`.

    none: 1. min_snr: min(snr, gamma) in x0 space, which is min(snr, gamma) / snr for eps and / (snr + 1) for
    v (Hang et al. 2023, section 3.4).

    Raises:
      UserError: unknown weighting or kind of prediction.
    """
    if weighting == "none":
        return jnp.ones_like(snr)
    if weighting != "min_snr":
        raise UserError(f"diffusion.weighting: unknown {weighting!r}; {nearest(weighting, WEIGHTINGS)}")
    if prediction == "eps":
        return jnp.minimum(1.0, gamma / snr)
    if prediction == "x0":
        return jnp.minimum(snr, gamma)
    if prediction == "v":
        return jnp.minimum(snr, gamma) / (snr + 1.0)
    raise _unknown_prediction(prediction)


def diffusion_loss(
    output: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    schedule: Schedule,
    *,
    prediction: str = "eps",
    weighting: str = "none",
    gamma: float = 5.0,
) -> jax.Array:
    """Training loss of each example, float32 [B]: weighted squared error, averaged over H, W and C.

    `output` [B, H, W, C or 2C] is what the backbone returned for `add_noise(schedule, latents, noise,
    timesteps)`; only its first C channels count. latents and noise [B, H, W, C], timesteps [B].

    Raises:
      UserError: unknown kind of prediction or weighting.
    """
    target = from_x0_eps(prediction, latents, noise, schedule.alpha(timesteps), schedule.sigma(timesteps))
    errors = _mean_square(_first_channels(output, latents) - target)
    return loss_weight(schedule.snr(timesteps), prediction, weighting, gamma) * errors


def eps_mse(
    output: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    schedule: Schedule,
    *,
    prediction: str = "eps",
) -> jax.Array:
    """Squared error of the implied noise, float32 [B], averaged over H, W and C.

    Comparable between models whatever each was trained to predict. Shapes and errors as in `diffusion_loss`.
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


def _expand(factor: jax.Array, like: jax.Array) -> jax.Array:
    """[B] or scalar, with axes added so that it scales `like` [B, ...]."""
    factor = jnp.asarray(factor)
    return factor.reshape(factor.shape + (1,) * (like.ndim - factor.ndim))


def _unknown_prediction(prediction: str) -> UserError:
    return UserError(f"diffusion.prediction: unknown {prediction!r}; {nearest(prediction, PREDICTIONS)}")

"""What a backbone predicts and how its prediction is scored.

A prediction is of one kind: "eps" (the noise), "x0" (the clean latents), "v" = alpha eps - sigma x0
(Salimans & Ho 2022, section 4) or "flow" = eps - x0 (Liu et al. 2023). Given the noised latents all say the
same, on any schedule; `to_x0_eps` and `from_x0_eps` translate. Only "eps" says nothing where no signal is left.

Everything here computes in float32, whatever type the backbone returns.
"""

import jax
import jax.numpy as jnp

from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError, nearest

PREDICTIONS = ("eps", "x0", "v", "flow")
WEIGHTINGS = ("none", "min_snr")


def add_noise(schedule: Schedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Latents [B, ...] noised to timesteps [B]: alpha(t) latents + sigma(t) noise."""
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    return _expand(alpha, latents) * latents + _expand(sigma, latents) * noise


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Makes sure that `prediction` is known and says what the latents are at every timestep of `schedule`.

    Raises:
      UserError: it does not.
    """
    if prediction not in PREDICTIONS:
        raise _unknown_prediction(prediction)
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise UserError(
            "diffusion.prediction 'eps' does not tell the latents where no signal is left, as with "
            "diffusion.zero_snr and schedule 'flow'; predict 'v', 'x0' or 'flow'"
        )


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
        power = alpha**2 + sigma**2  # 1 if the schedule preserves variance
        return (alpha * noisy - sigma * value) / power, (alpha * value + sigma * noisy) / power
    if prediction == "flow":
        total = alpha + sigma  # 1 on the flow schedule
        return (noisy - sigma * value) / total, (noisy + alpha * value) / total
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
    if prediction == "flow":
        return eps - x0
    raise _unknown_prediction(prediction)


def loss_weight(
    alpha: jax.Array, sigma: jax.Array, prediction: str, weighting: str, gamma: float = 5.0
) -> jax.Array:
    """Factor [B] of a squared error in the space of `prediction`, at alpha and sigma [B].

    none: 1. min_snr: min(snr, gamma) in x0 space, where snr = (alpha / sigma)^2 (Hang et al. 2023, section 3.4).
    In the other spaces it is that times the squared ratio of the errors: min(snr, gamma) / snr for eps,
    min(snr, gamma) / (snr + 1) for v on a variance-preserving schedule. For v and flow it is finite at every snr.

    Raises:
      UserError: unknown weighting or kind of prediction.
    """
    if weighting == "none":
        return jnp.ones_like(alpha)
    if weighting != "min_snr":
        raise UserError(f"diffusion.weighting: unknown {weighting!r}; {nearest(weighting, WEIGHTINGS)}")
    signal, noise = jnp.square(alpha), jnp.square(sigma)
    if prediction == "eps":
        return jnp.minimum(1.0, gamma * noise / signal)
    if prediction == "x0":
        return jnp.minimum(signal / noise, gamma)
    clipped = jnp.minimum(signal, gamma * noise)  # min(snr, gamma) sigma^2
    if prediction == "v":
        return clipped / jnp.square(signal + noise)
    if prediction == "flow":
        return clipped / jnp.square(alpha + sigma)
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
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    target = from_x0_eps(prediction, latents, noise, alpha, sigma)
    errors = _mean_square(_first_channels(output, latents) - target)
    return loss_weight(alpha, sigma, prediction, weighting, gamma) * errors


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


def _expand(factor: jax.Array, like: jax.Array) -> jax.Array:
    """[B] or scalar, with axes added so that it scales `like` [B, ...]."""
    factor = jnp.asarray(factor)
    return factor.reshape(factor.shape + (1,) * (like.ndim - factor.ndim))


def _unknown_prediction(prediction: str) -> UserError:
    return UserError(f"diffusion.prediction: unknown {prediction!r}; {nearest(prediction, PREDICTIONS)}")

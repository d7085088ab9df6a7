"""How much the squared error of each timestep counts in the training loss."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from scaling_dit.components import Seam
from scaling_dit.diffusion import contract
from scaling_dit.diffusion.predictions import PREDICTIONS, X0, Eps, Flow, Kind, Prediction, V, find_prediction
from scaling_dit.errors import UserError, nearest

WEIGHTINGS = ("none", "min_snr")
SEAM = Seam("diffusion.weighting", WEIGHTINGS)

# The quantities whose error a weight may be for: the prediction itself, or a quantity that it implies.
SPACES = ("prediction", *PREDICTIONS)
# alpha and sigma that a user's own weighting sees are at least this, so that their ratios are finite.
LEAST = 1e-4


class Weighting(Protocol):
    """The weight of each row's squared error.

    Attributes:
      space: whose error is weighted: "prediction", as the backbone returns it, or "eps", "x0", "v" or "flow", as it
        implies them. Publications state weights for one of these; the loss of another prediction is scaled accordingly.
    """

    space: str

    def __call__(self, alpha: jax.Array, sigma: jax.Array, timesteps: jax.Array) -> jax.Array:
        """Weights float32 [B], 0 or more, at alpha, sigma [B] (at least 1e-4) and timesteps [B] in [0, 1000)."""


def create_weighting(name: str, fields: Mapping[str, Any]) -> str | Weighting:
    """A weighting for `loss_weight`: the name of a built-in one as it is, a user's own made with its fields.

    Raises:
      UserError: unknown name or field, or a user's own that is none.
    """

    def check(weighting: Any, where: str) -> None:
        contract.check_weighting(weighting, SPACES, where)

    found: str | Weighting = SEAM.create(name, fields, lambda: name, check)
    return found


def loss_weight(
    alpha: jax.Array,
    sigma: jax.Array,
    prediction: Kind,
    weighting: str | Weighting,
    gamma: float = 5.0,
    timesteps: jax.Array | None = None,
) -> jax.Array:
    """Factor [B] of a squared error in the space of `prediction`, at alpha, sigma and timesteps [B].

    none: 1. min_snr: min(snr, gamma) in x0 space, where snr = (alpha / sigma)^2 (Hang et al. 2023, section 3.4).
    In the other spaces it is that times the squared ratio of the errors: min(snr, gamma) / snr for eps,
    min(snr, gamma) / (snr + 1) for v on a variance-preserving schedule. For v and flow it is finite at every snr.
    A user's own: its weight times the squared ratio of the errors in its space and in the space of `prediction`.

    Raises:
      UserError: unknown weighting or kind of prediction.
    """
    if isinstance(weighting, str) and weighting == "none":
        return jnp.ones_like(alpha)
    if isinstance(weighting, str) and weighting != "min_snr":
        raise UserError(f"diffusion.weighting: unknown {weighting!r}; {nearest(weighting, WEIGHTINGS)}")
    prediction = find_prediction(prediction)
    if not isinstance(weighting, str):
        alpha, sigma = jnp.maximum(alpha, LEAST), jnp.maximum(sigma, LEAST)
        weight = weighting(alpha, sigma, jnp.zeros_like(alpha) if timesteps is None else timesteps)
        return weight * jnp.square(error_ratio(prediction, weighting.space, alpha, sigma))
    signal, noise = jnp.square(alpha), jnp.square(sigma)
    if type(prediction) is Eps:
        return jnp.minimum(1.0, gamma * noise / signal)
    if type(prediction) is X0:
        return jnp.minimum(signal / noise, gamma)
    # min(snr, gamma) sigma^2
    clipped = jnp.minimum(signal, gamma * noise)
    if type(prediction) is V:
        return clipped / jnp.square(signal + noise)
    if type(prediction) is Flow:
        return clipped / jnp.square(alpha + sigma)
    alpha, sigma = jnp.maximum(alpha, LEAST), jnp.maximum(sigma, LEAST)
    clipped_snr = jnp.minimum(jnp.square(alpha / sigma), gamma)
    return clipped_snr * jnp.square(error_ratio(prediction, "x0", alpha, sigma))


def error_ratio(prediction: Prediction, space: str, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Error in `space`, one of `SPACES`, that an error of 1 in a prediction implies, at alpha and sigma [B]: [B].

    The noised latents are known, so it is the slope of one in the other.
    """
    if space == "prediction":
        return jnp.ones_like(alpha)
    noisy = jnp.zeros_like(alpha)
    ends = [prediction.to_x0_eps(jnp.full_like(alpha, value), noisy, alpha, sigma) for value in (0.0, 1.0)]
    low, high = (find_prediction(space).from_x0_eps(*end, alpha, sigma) for end in ends)
    return high - low

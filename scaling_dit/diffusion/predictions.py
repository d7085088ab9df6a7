"""What a backbone predicts.

A prediction is of one kind: "eps" (the noise), "x0" (the clean latents), "v" = alpha eps - sigma x0
(Salimans & Ho 2022, section 4), "flow" = eps - x0 (Liu et al. 2023), or a user's own. Given the noised latents all say
the same, on any schedule; `to_x0_eps` and `from_x0_eps` translate. Only "eps" says nothing where no signal is left.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from scaling_dit.components import Seam
from scaling_dit.diffusion import contract
from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError, nearest


class Prediction(Protocol):
    """A kind of prediction: a value that is linear in clean latents x0 and noise eps, and says both.

    Latents, noise and values are float32 [B, H, W, C]. alpha and sigma, of the schedule at each row's timestep, are
    float32 of a shape that broadcasts with them, and the noised latents are alpha x0 + sigma eps.
    """

    @property
    def needs_signal(self) -> bool:
        """Whether the value says nothing of x0 where alpha is 0, as eps; refused on schedules without it at the end."""

    def from_x0_eps(self, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """The value for x0 and eps: what the backbone is trained to return."""

    def to_x0_eps(
        self, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x0 and eps that a value implies, given the noised latents: the inverse of `from_x0_eps`."""


class Eps:
    """The noise (Ho et al. 2020); `to_x0_eps` needs alpha > 0."""

    needs_signal: ClassVar[bool] = True

    def from_x0_eps(self, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """eps."""
        return eps

    def to_x0_eps(
        self, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Prediction`."""
        return (noisy - sigma * value) / alpha, value


class X0:
    """The clean latents; `to_x0_eps` needs sigma > 0."""

    needs_signal: ClassVar[bool] = False

    def from_x0_eps(self, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """x0."""
        return x0

    def to_x0_eps(
        self, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Prediction`."""
        return value, (noisy - alpha * value) / sigma


class V:
    """Velocity, alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""

    needs_signal: ClassVar[bool] = False

    def from_x0_eps(self, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """alpha eps - sigma x0."""
        return alpha * eps - sigma * x0

    def to_x0_eps(
        self, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Prediction`."""
        # 1 if the schedule preserves variance.
        power = alpha**2 + sigma**2
        return (alpha * noisy - sigma * value) / power, (alpha * value + sigma * noisy) / power


class Flow:
    """The velocity of rectified flow, eps - x0 (Liu et al. 2023)."""

    needs_signal: ClassVar[bool] = False

    def from_x0_eps(self, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """eps - x0."""
        return eps - x0

    def to_x0_eps(
        self, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Prediction`."""
        # 1 on the flow schedule.
        total = alpha + sigma
        return (noisy - sigma * value) / total, (noisy + alpha * value) / total


_KINDS: dict[str, Prediction] = {"eps": Eps(), "x0": X0(), "v": V(), "flow": Flow()}
PREDICTIONS = tuple(_KINDS)
SEAM = Seam("diffusion.prediction", PREDICTIONS)

# A kind of prediction, or the name of a built-in one.
Kind = str | Prediction


def create_prediction(name: str, fields: Mapping[str, Any]) -> Prediction:
    """The kind of prediction called `name`, one of `PREDICTIONS` or "package.module:Name" with its fields.

    Raises:
      UserError: unknown name or field, or a user's own that is none.
    """
    found: Prediction = SEAM.create(name, fields, lambda: find_prediction(name), contract.check_prediction)
    return found


def find_prediction(kind: Kind) -> Prediction:
    """A kind of prediction from the name of a built-in one; itself if it is one.

    Raises:
      UserError: unknown name.
    """
    if not isinstance(kind, str):
        return kind
    if kind not in _KINDS:
        raise UserError(f"diffusion.prediction: unknown {kind!r}; {nearest(kind, PREDICTIONS)}")
    return _KINDS[kind]


def check_prediction(kind: Kind, schedule: Schedule) -> None:
    """Makes sure that a prediction is known and says what the latents are at every timestep of `schedule`.

    Raises:
      UserError: it does not.
    """
    if find_prediction(kind).needs_signal and schedule.zero_terminal_snr:
        name = next((name for name, known in _KINDS.items() if kind in (name, known)), type(kind).__name__)
        raise UserError(
            f"diffusion.prediction {name!r} does not determine the latents where no signal is left, as with "
            "diffusion.zero_snr and schedule 'flow'; predict 'v', 'x0' or 'flow'"
        )


def to_x0_eps(
    kind: Kind, value: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Clean latents and noise, both [B, ...], that a `value` [B, ...] of this kind implies.

    `noisy` [B, ...] is what the backbone saw; alpha and sigma are [B] or scalars. "eps" needs alpha > 0,
    "x0" sigma > 0.

    Raises:
      UserError: unknown kind of prediction.
    """
    return find_prediction(kind).to_x0_eps(value, noisy, expand(alpha, noisy), expand(sigma, noisy))


def from_x0_eps(kind: Kind, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The value [B, ...] of this kind for clean latents x0 and noise eps [B, ...].

    alpha and sigma are [B] or scalars.

    Raises:
      UserError: unknown kind of prediction.
    """
    return find_prediction(kind).from_x0_eps(x0, eps, expand(alpha, eps), expand(sigma, x0))


def expand(factor: jax.Array, like: jax.Array) -> jax.Array:
    """[B] or scalar, with axes added so that it scales `like` [B, ...]."""
    factor = jnp.asarray(factor)
    return factor.reshape(factor.shape + (1,) * (like.ndim - factor.ndim))

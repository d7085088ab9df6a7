"""Noise schedules: how much signal and noise a latent holds at each timestep.

Tables are float64 numpy, made once; they become float32 where they meet an array.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.errors import UserError, nearest

SCHEDULES = ("scaled_linear", "linear", "cosine")


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving process x_t = alpha(t) x_0 + sigma(t) eps (Ho et al. 2020, eq. 4).

    `alphas_cumprod` is float64 [T], alpha(t)^2 at the integer timesteps 0..T-1. The methods take timesteps
    of any shape, integer or fractional, and return float32 of that shape. Between integers alpha and sigma
    are interpolated linearly (alpha^2 + sigma^2 stays within 1e-4 of 1); past T-1 they keep their last
    value.
    """

    alphas_cumprod: np.ndarray

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha(self, timesteps: jax.Array) -> jax.Array:
        """Factor of the clean latents, in [0, 1]."""
        return _interpolate(np.sqrt(self.alphas_cumprod), timesteps)

    def sigma(self, timesteps: jax.Array) -> jax.Array:
        """Factor of the noise, in [0, 1]."""
        return _interpolate(np.sqrt(1.0 - self.alphas_cumprod), timesteps)

    def snr(self, timesteps: jax.Array) -> jax.Array:
        """Signal-to-noise ratio (alpha / sigma)^2."""
        return jnp.square(self.alpha(timesteps) / self.sigma(timesteps))


def make_schedule(name: str, num_timesteps: int = 1000) -> Schedule:
    """The schedule called `name`, one of `SCHEDULES`.

    Raises:
      UserError: unknown name.
    """
    return Schedule(np.cumprod(1.0 - make_betas(name, num_timesteps)))


def make_betas(name: str, num_timesteps: int = 1000) -> np.ndarray:
    """Variance added at each step, float64 [T].

    scaled_linear: square of a line from sqrt(0.00085) to sqrt(0.012) (latent diffusion, Rombach et al. 2022).
    linear: from 1e-4 to 0.02 (Ho et al. 2020, section 4).
    cosine: from alpha_bar(u) = cos((u + 0.008) / 1.008 * pi / 2)^2, at most 0.999 (Nichol & Dhariwal 2021,
    eq. 17).

    Raises:
      UserError: unknown name.
    """
    if name == "scaled_linear":
        return np.linspace(math.sqrt(0.00085), math.sqrt(0.012), num_timesteps) ** 2
    if name == "linear":
        return np.linspace(1e-4, 0.02, num_timesteps)
    if name == "cosine":
        fractions = np.arange(num_timesteps + 1) / num_timesteps
        alpha_bar = np.cos((fractions + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise UserError(f"diffusion.schedule: unknown {name!r}; {nearest(name, SCHEDULES)}")


def _interpolate(table: np.ndarray, timesteps: jax.Array) -> jax.Array:
    """`table` at `timesteps`, exact at integers, float32."""
    values = jnp.asarray(table, jnp.float32)
    position = jnp.clip(jnp.asarray(timesteps, jnp.float32), 0.0, len(table) - 1.0)
    lower = jnp.floor(position)
    index = lower.astype(jnp.int32)
    fraction = position - lower
    return (1.0 - fraction) * values[index] + fraction * values[jnp.minimum(index + 1, len(table) - 1)]

"""Noise schedules: how much signal and noise a latent holds at each timestep.

Every schedule noises as x_t = alpha(t) x_0 + sigma(t) eps. Tables are float64 numpy, made once; they become float32
where they meet an array. A schedule of a user's own is a `Schedule`, or a function that returns one, such as a
`VariancePreserving` with a table of its own (docs/own_parts.md).
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.components import Seam
from scaling_dit.diffusion.contract import check_schedule
from scaling_dit.errors import UserError, nearest

Times = TypeVar("Times", np.ndarray, jax.Array)

VP_SCHEDULES = ("scaled_linear", "linear", "cosine")
SCHEDULES = (*VP_SCHEDULES, "flow")
SEAM = Seam("diffusion.schedule", SCHEDULES)


class Schedule(abc.ABC):
    """The methods of a schedule, which training, validation and samplers use.

    The methods take timesteps of any shape, integer or fractional, in [0, num_timesteps]. The share of noise,
    sigma / alpha, rises with the timestep, and is large at the last one, because samplers start from noise alone.

    Attributes:
      continuous: whether timesteps of training and samplers are real numbers, not integers.
    """

    continuous: ClassVar[bool]

    @property
    @abc.abstractmethod
    def num_timesteps(self) -> int:
        """T = 1000: backbones see timesteps in [0, T)."""

    @property
    @abc.abstractmethod
    def zero_terminal_snr(self) -> bool:
        """Whether the noisiest latents hold no signal at all."""

    @abc.abstractmethod
    def coefficients(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma in float64, for tables made on the host."""

    @abc.abstractmethod
    def alpha(self, timesteps: jax.Array) -> jax.Array:
        """Factor of the clean latents, float32 in [0, 1]."""

    @abc.abstractmethod
    def sigma(self, timesteps: jax.Array) -> jax.Array:
        """Factor of the noise, float32 in [0, 1]."""

    @abc.abstractmethod
    def timesteps_of(self, noise_to_signal: np.ndarray) -> np.ndarray:
        """Timesteps, float64, at which sigma / alpha has these values: the inverse of `coefficients`."""


@dataclass(frozen=True, eq=False)
class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1 (Ho et al. 2020, eq. 4).

    `alphas_cumprod` is float64 [T], alpha(t)^2 at the integer timesteps 0..T-1. Between integers alpha and sigma are
    interpolated linearly (alpha^2 + sigma^2 stays within 1e-4 of 1, or 2e-4 with zero terminal SNR); past T-1 they keep
    their last value.
    """

    alphas_cumprod: np.ndarray
    continuous: ClassVar[bool] = False

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] == 0)

    def coefficients(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nodes = np.arange(self.num_timesteps)
        tables = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        return np.interp(timesteps, nodes, tables[0]), np.interp(timesteps, nodes, tables[1])

    def alpha(self, timesteps: jax.Array) -> jax.Array:
        return _interpolate(np.sqrt(self.alphas_cumprod), timesteps)

    def sigma(self, timesteps: jax.Array) -> jax.Array:
        return _interpolate(np.sqrt(1.0 - self.alphas_cumprod), timesteps)

    def timesteps_of(self, noise_to_signal: np.ndarray) -> np.ndarray:
        # As angles, because sigma / alpha is infinite where no signal is left.
        angles = np.arctan2(np.sqrt(1.0 - self.alphas_cumprod), np.sqrt(self.alphas_cumprod))
        return np.interp(np.arctan(noise_to_signal), angles, np.arange(self.num_timesteps))


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """x_t = (1 - s) x_0 + s eps with s = t / T, for any real t (Liu et al. 2023; Esser et al. 2024, eq. 13).

    `time_shift` says where training and samplers place timesteps (`shift_time`); what a timestep means stays the same.
    """

    time_shift: float = 1.0
    num_timesteps: int = 1000
    continuous: ClassVar[bool] = True
    zero_terminal_snr: ClassVar[bool] = True

    def coefficients(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = np.asarray(timesteps, np.float64) / self.num_timesteps
        return 1.0 - share, share

    def alpha(self, timesteps: jax.Array) -> jax.Array:
        return 1.0 - self.sigma(timesteps)

    def sigma(self, timesteps: jax.Array) -> jax.Array:
        return jnp.asarray(timesteps, jnp.float32) / self.num_timesteps

    def timesteps_of(self, noise_to_signal: np.ndarray) -> np.ndarray:
        return self.num_timesteps * noise_to_signal / (1.0 + noise_to_signal)


def make_schedule(
    name: str,
    num_timesteps: int = 1000,
    *,
    zero_snr: bool = False,
    time_shift: float = 1.0,
    resolution_shift: float = 1.0,
    fields: Mapping[str, Any] | None = None,
) -> Schedule:
    """The schedule called `name`, one of `SCHEDULES` or "package.module:Name".

    Args:
      name: of the schedule.
      num_timesteps: of a built-in one.
      zero_snr: rescale it so that its last timestep holds no signal (`zero_terminal_snr`); not for "flow".
      time_shift: shift of the timesteps of training and samplers towards noise; for "flow" only.
      resolution_shift: side of the images over the side that the schedule was made for (`shift_resolution`); not for
        "flow".
      fields: the fields of a user's own schedule.

    Raises:
      UserError: unknown name, an option that the schedule does not take, or a user's own that is no schedule.
    """

    def check(schedule: Any, where: str) -> None:
        check_schedule(schedule, where)
        options = (
            ("zero_snr", zero_snr, False),
            ("time_shift", time_shift, 1.0),
            ("resolution_shift", resolution_shift, 1.0),
        )
        for option, value, default in options:
            if value != default:
                raise UserError(
                    f"config.diffusion.{option}={value} is for built-in schedules, not {name!r}; leave it "
                    f"{default}, or give your schedule a field for it, under config.diffusion.schedule_fields"
                )

    def built_in() -> Schedule:
        shifts = {"time_shift": time_shift, "resolution_shift": resolution_shift}
        return _built_in(name, num_timesteps, zero_snr=zero_snr, **shifts)

    found: Schedule = SEAM.create(name, fields or {}, built_in, check)
    return found


def _built_in(
    name: str, num_timesteps: int, *, zero_snr: bool, time_shift: float, resolution_shift: float
) -> Schedule:
    if name == "flow":
        if zero_snr:
            raise UserError(
                "diffusion.zero_snr rescales a variance-preserving schedule; 'flow' ends without signal by itself: "
                "leave zero_snr False"
            )
        if resolution_shift != 1.0:
            raise UserError(
                f"diffusion.resolution_shift={resolution_shift} shifts a variance-preserving schedule; for 'flow' "
                f"leave it 1.0 and set diffusion.time_shift={resolution_shift}, which is as much noise"
            )
        return RectifiedFlow(time_shift, num_timesteps)
    if time_shift != 1.0:
        raise UserError(
            f"diffusion.time_shift={time_shift} is for diffusion.schedule 'flow', not {name!r}; leave it 1.0"
        )
    alphas_cumprod = np.cumprod(1.0 - make_betas(name, num_timesteps))
    if zero_snr:
        alphas_cumprod = zero_terminal_snr(alphas_cumprod)
    return VariancePreserving(shift_resolution(alphas_cumprod, resolution_shift))


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """`alphas_cumprod` [T] with its root shifted and scaled: the last is 0, the first stays.

    Lin et al. 2024 (arXiv 2305.08891), algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


def shift_time(share: Times, shift: float) -> Times:
    """Times in [0, 1] moved towards 1 for shift > 1: shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23)."""
    return shift * share / (1.0 + (shift - 1.0) * share)


def shift_resolution(alphas_cumprod: np.ndarray, ratio: float) -> np.ndarray:
    """`alphas_cumprod` [T] for images with `ratio` times the side: log SNR - 2 ln(ratio) at every timestep.

    Hoogeboom et al. 2023 (arXiv 2301.11093, section 3.1): averaged over as many pixels as one pixel of the smaller
    image, noise is weaker by the ratio of the sides, so a larger image (ratio > 1) needs MORE noise at each timestep
    for the same signal. sigma / alpha is multiplied by `ratio`, as `shift_time` with shift = ratio does for rectified
    flow.
    """
    # snr / ratio^2 = a / (ratio^2 (1 - a)); written so that an alpha of 0 or a ratio of 1 stays exact.
    return (
        alphas_cumprod / (alphas_cumprod + ratio**2 * (1.0 - alphas_cumprod))
        if ratio != 1
        else alphas_cumprod
    )


def make_betas(name: str, num_timesteps: int = 1000) -> np.ndarray:
    """Variance added at each step of a variance-preserving schedule, float64 [T].

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

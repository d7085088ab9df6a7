"""Where the samplers of published pipelines place their steps: timesteps and noise levels, in float64 on the host.

The settings have diffusers' names and mean what they mean there (`timestep_spacing`, `steps_offset`,
`use_karras_sigmas`, ...); `published_samplers.py` says which sampler has which. A noise level here is sigma / alpha.
"""

import dataclasses

import numpy as np

from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError

SPACINGS = ("leading", "trailing", "linspace")
# Of Karras et al. 2022, eq. 5.
_RHO = 7.0
# The signal that diffusers leaves at the last timestep of a schedule with zero terminal SNR, so that no level is
# infinite.
_LEAST_SIGNAL = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of noise levels that replaces those of the timesteps: diffusers' `use_..._sigmas` and `use_lu_lambdas`.

    Attributes:
      name: "" for none, "karras", "exponential", "beta" or "lu".
      least, most: ends of the curve; None for those of the schedule or of the timesteps.
    """

    name: str = ""
    least: float | None = None
    most: float | None = None

    def levels(self, most: float, least: float, steps: int) -> np.ndarray:
        """Noise levels, falling, [steps]."""
        most, least = self.most or most, self.least or least
        ramp = np.linspace(0.0, 1.0, steps)
        if self.name == "karras":
            ends = most ** (1 / _RHO), least ** (1 / _RHO)
            return (ends[0] + ramp * (ends[1] - ends[0])) ** _RHO
        if self.name == "beta":
            # scipy is slow to import, and few pipelines have this curve.
            from scipy import stats

            return least + stats.beta.ppf(1.0 - ramp, 0.6, 0.6) * (most - least)
        return np.exp(np.log(most) + ramp * (np.log(least) - np.log(most)))


def curve_name(settings: object) -> str:
    """The curve that the switches of a sampler choose, "" if none is on.

    Raises:
      UserError: two switches at once.
    """
    switches = {
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
        "use_lu_lambdas": "lu",
    }
    on = [switch for switch in switches if getattr(settings, switch, False)]
    if len(on) > 1:
        raise UserError(f"config.sample.sampler_fields sets {' and '.join(on)}; one curve at most can be on")
    return switches[on[0]] if on else ""


def signal(schedule: Schedule, *, exact: bool = False) -> np.ndarray:
    """alpha^2 at the timesteps 0..T-1; at least a little unless `exact`.

    Raises:
      UserError: a schedule that does not preserve variance, for which these samplers are not defined.
    """
    alpha, sigma = schedule.coefficients(np.arange(float(schedule.num_timesteps)))
    if not np.allclose(alpha**2 + sigma**2, 1.0, atol=1e-6):
        raise UserError(
            "config.sample.sampler is of a published pipeline and needs a schedule that preserves variance; choose "
            "ddim, euler, heun or dpmpp_2m for this one"
        )
    return alpha**2 if exact else np.maximum(alpha**2, _LEAST_SIGNAL)


def levels_of(signals: np.ndarray) -> np.ndarray:
    """sigma / alpha of alpha^2."""
    return np.sqrt((1.0 - signals) / signals)


def spaced(spacing: str, offset: int, total: int, steps: int) -> np.ndarray:
    """Timesteps of DDIM, DDPM and PNDM, and of Euler and Heun before "linspace" is rounded, falling, [steps].

    Raises:
      UserError: unknown spacing, or steps out of range.
    """
    check_spacing(spacing, total, steps)
    if spacing == "linspace":
        return np.linspace(0.0, total - 1.0, steps)[::-1]
    if spacing == "leading":
        return np.minimum(np.arange(steps)[::-1] * float(total // steps) + offset, total - 1.0)
    return np.round(total - np.arange(steps) * (total / steps)) - 1.0


def check_spacing(spacing: str, total: int, steps: int) -> None:
    """Makes sure that a spacing is known and that so many steps can be taken.

    Raises:
      UserError: otherwise.
    """
    if spacing not in SPACINGS:
        raise UserError(
            f"config.sample.sampler_fields.timestep_spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}"
        )
    if not 1 <= steps < total:
        raise UserError(f"sample.steps={steps}: this sampler needs 1 to {total - 1} steps")


def timesteps_of(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Timesteps, real numbers, of noise levels, interpolated in their logarithm between those of the schedule."""
    return np.interp(np.log(np.maximum(levels, 1e-10)), np.log(table), np.arange(len(table)))

"""The table of DPM-Solver and DPM-Solver++ of orders 1 to 3, with noise or without, as diffusers computes them.

Lu et al. 2022 (arXiv 2206.00927 and 2211.01095). With lambda = log(alpha / sigma) and h = lambda' - lambda, each step
is exact in the linear part of the equation, and takes the prediction, or its Taylor series in lambda from earlier ones,
in the other part: of the clean latents ("++"), or of the noise.
"""

from typing import Protocol

import numpy as np

from scaling_dit.diffusion import noise_levels
from scaling_dit.diffusion.linear_table import Linear, new_table
from scaling_dit.diffusion.noise_levels import Curve
from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
SOLVERS = ("midpoint", "heun")
# With fewer steps than this, `lower_order_final` takes effect.
_FEW = 15


class Settings(Protocol):
    """The fields of `published_samplers.DpmSolver` that are read here."""

    @property
    def timestep_spacing(self) -> str: ...

    @property
    def steps_offset(self) -> int: ...

    @property
    def solver_order(self) -> int: ...

    @property
    def algorithm_type(self) -> str: ...

    @property
    def solver_type(self) -> str: ...

    @property
    def lower_order_final(self) -> bool: ...

    @property
    def euler_at_final(self) -> bool: ...

    @property
    def final_sigmas_type(self) -> str: ...

    @property
    def lambda_min_clipped(self) -> float: ...

    @property
    def cosine(self) -> bool: ...


def table(settings: Settings, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
    """The rows of all steps.

    Raises:
      UserError: unknown settings, or those that diffusers refuses together.
    """
    _check(settings)
    times, levels = _placed(settings, schedule, steps)
    alpha = 1 / np.sqrt(1 + levels**2)
    sigma = alpha * levels
    with np.errstate(divide="ignore"):
        lambdas = -np.log(levels)
    columns = {name: np.zeros(steps) for name in ("keep", "value", "noise", "first", "second")}
    for i in range(steps):
        order = _order(settings, i, steps)
        keep, weights, noise = _step(settings, order, alpha[i : i + 2], sigma[i : i + 2], lambdas, i)
        columns["keep"][i], columns["noise"][i] = keep, noise
        for name, weight in zip(("value", "first", "second"), weights, strict=True):
            columns[name][i] = weight
    clean = settings.algorithm_type.endswith("++")
    ones, zeros = np.ones(steps), np.zeros(steps)
    value = columns.pop("value")
    return new_table(
        times, alpha[:-1], sigma[:-1], **columns,
        x0=value if clean else zeros, eps=zeros if clean else value,
        value_x0=ones if clean else zeros, value_eps=zeros if clean else ones,
    )  # fmt: skip


def _check(settings: Settings) -> None:
    choices = {
        "algorithm_type": ALGORITHMS,
        "solver_type": SOLVERS,
        "solver_order": (1, 2, 3),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    for name, right in choices.items():
        if getattr(settings, name) not in right:
            raise UserError(
                f"config.sample.sampler_fields.{name} is {getattr(settings, name)!r}; it must be one of "
                f"{', '.join(map(str, right))}"
            )
    if not settings.algorithm_type.endswith("++") and settings.final_sigmas_type == "zero":
        raise UserError(
            f"config.sample.sampler_fields: algorithm_type {settings.algorithm_type} needs final_sigmas_type sigma_min"
        )
    if settings.algorithm_type == "sde-dpmsolver" and settings.solver_order == 3:
        raise UserError(
            "config.sample.sampler_fields: algorithm_type sde-dpmsolver needs solver_order 1 or 2"
        )


def _order(settings: Settings, step: int, steps: int) -> int:
    few = settings.lower_order_final and steps < _FEW
    if step == steps - 1 and (settings.euler_at_final or few or settings.final_sigmas_type == "zero"):
        return 1
    if step == steps - 2 and few:
        return min(settings.solver_order, step + 1, 2)
    return min(settings.solver_order, step + 1)


def _placed(settings: Settings, schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [S] as the model sees them, and noise levels [S + 1]."""
    total, spacing = schedule.num_timesteps, settings.timestep_spacing
    times: np.ndarray
    noise_levels.check_spacing(spacing, total, steps)
    all_levels = noise_levels.levels_of(noise_levels.signal(schedule))
    last = total - int(np.searchsorted(-np.log(all_levels)[::-1], settings.lambda_min_clipped))
    if spacing == "linspace":
        times = np.round(np.linspace(0.0, last - 1.0, steps + 1))[:0:-1]
    elif spacing == "leading":
        times = np.arange(1, steps + 1)[::-1] * float(last // (steps + 1)) + settings.steps_offset
    else:
        times = np.round(last - np.arange(steps) * (total / steps)) - 1.0
    name = noise_levels.curve_name(settings)
    if name:
        levels = Curve(name).levels(all_levels[-1], all_levels[0], steps)
        times = noise_levels.timesteps_of(levels, all_levels)
        # Else they are cut below, and the first one lies under the last timestep by a rounding error there.
        rounded = name in ("karras", "lu") and not settings.cosine
        times = np.round(times) if rounded else times - 1e-6
    else:
        levels = np.interp(times, np.arange(total), all_levels)
    end = all_levels[0] if settings.final_sigmas_type == "sigma_min" else 0.0
    # diffusers hands whole numbers to the model.
    return np.trunc(times), np.append(levels, end)


def _step(
    settings: Settings, order: int, alphas: np.ndarray, sigmas: np.ndarray, lambdas: np.ndarray, i: int
) -> tuple[float, tuple[float, float, float], float]:
    """Factors of the latents, of this prediction and the two before, and of fresh noise."""
    (alpha, alpha_next), (sigma, sigma_next) = alphas, sigmas
    clean, noisy = settings.algorithm_type.endswith("++"), settings.algorithm_type.startswith("sde-")
    h = float(lambdas[i + 1] - lambdas[i])
    # The integrals of the exponential times 1, (lambda' - lambda) / h and its square: `rate` is its exponent.
    rate = (-h if clean else h) * (2.0 if noisy and clean else 1.0)
    if clean:
        keep = sigma_next / sigma * (np.exp(-h) if noisy else 1.0)
        scale, noise = -alpha_next, sigma_next * np.sqrt(-np.expm1(-2 * h))
    else:
        keep = alpha_next / alpha
        scale, noise = -sigma_next * (2.0 if noisy else 1.0), sigma_next * np.sqrt(np.expm1(2 * h))
    zeroth = scale * np.expm1(rate)
    noise = float(noise) if noisy else 0.0
    if order == 1:
        return float(keep), (zeroth, 0.0, 0.0), noise
    midpoint = order == 2 and settings.solver_type == "midpoint"
    first_order = zeroth / 2 if midpoint else scale * (np.expm1(rate) / rate - 1.0)
    back = (lambdas[i] - lambdas[i - 1]) / h
    if order == 2:
        # D1 = (m0 - m1) / back
        return float(keep), (zeroth + first_order / back, -first_order / back, 0.0), noise
    further = (lambdas[i - 1] - lambdas[i - 2]) / h
    # The sign of the half is diffusers'.
    half = 0.5 if clean and noisy else -0.5
    second_order = scale * ((np.expm1(rate) - rate) / rate**2 + half)
    # Of D1_0 = (m0 - m1) / back and D1_1 = (m1 - m2) / further.
    share = 1 / (back + further)
    of_near = first_order * (1 + back * share) + second_order * share
    of_far = -first_order * back * share - second_order * share
    near, far = of_near / back, of_far / further
    return float(keep), (zeroth + near, far - near, -far), noise

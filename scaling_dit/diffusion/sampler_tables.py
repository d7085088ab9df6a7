"""The coefficients of a sampler's trajectory, in float64 on the host.

Every sampler here goes from (alpha, sigma) to (alpha', sigma') as alpha' x0 + sigma' eps, plus a correction of second
order. In the coordinates x / alpha with time sigma / alpha that first part is Euler's step, and DDIM's; on the straight
line of rectified flow it is Euler's step in s. So samplers differ in their timesteps, their end and the correction.
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from scaling_dit.diffusion.schedules import RectifiedFlow, Schedule, shift_time
from scaling_dit.diffusion.time_sampling import largest_timestep
from scaling_dit.errors import UserError

Column = TypeVar("Column", np.ndarray, jax.Array)


class Table(NamedTuple, Generic[Column]):
    """One row a step, noisiest first: each [S], or [] in one row."""

    # What the backbone sees.
    timesteps: Column
    alpha: Column
    sigma: Column
    timesteps_next: Column
    alpha_next: Column
    sigma_next: Column
    # Factor of the sampler's second-order term; 0 = a step of first order.
    correction: Column


def leading(total: int, steps: int) -> np.ndarray:
    """Multiples of total // steps, plus 1: 981, 961, ..., 1 for 50 of 1000, as Stable Diffusion samples.

    Counts that do not divide start lower than the noisiest timestep.
    """
    return np.arange(steps)[::-1] * float(total // steps) + 1.0


def trailing(total: int, steps: int) -> np.ndarray:
    """From the noisiest timestep on: 999, 979, ..., 19 for 50 of 1000 (Lin et al. 2024, table 2)."""
    return np.round(total - np.arange(steps) * (total / steps)) - 1.0


def linspace(total: int, steps: int) -> np.ndarray:
    """Evenly from the noisiest timestep towards 0, which is left out: 999, 979, ..., 20 for 50 of 1000."""
    return np.round(np.linspace(0.0, total - 1.0, steps + 1))[:0:-1]


def ddim_table(schedule: Schedule, steps: int) -> Table[np.ndarray]:
    """DDIM (Song et al. 2021): leading timesteps, trailing with zero terminal SNR; the last step goes to timestep 0.

    This is diffusers' DDIMScheduler with steps_offset=1 and set_alpha_to_one=False. Where steps do not divide T, each
    step goes to the next timestep, diffusers' trailing ones to T // steps lower. On rectified flow, which has no noise
    at timestep 0, the timesteps are T, T - T / steps, ..., T / steps before the time shift.

    Raises:
      UserError: steps is not in 1..T-1.
    """
    _check_steps("ddim", schedule, steps)
    if isinstance(schedule, RectifiedFlow):
        return _rows(schedule, _shifted(schedule, 1.0 - np.arange(steps) / steps), end=(1.0, 0.0))
    alpha, sigma = schedule.coefficients(np.zeros(()))
    return _rows(schedule, _leading_or_trailing(schedule, steps), end=(float(alpha), float(sigma)))


def euler_table(schedule: Schedule, steps: int) -> Table[np.ndarray]:
    """Euler's method to clean latents: diffusers' EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler.

    Leading timesteps with offset 1, trailing with zero terminal SNR. On rectified flow: from T to the first training
    timestep, 1 shifted, evenly; then all shifted, so the last twice, as diffusers does.

    Raises:
      UserError: steps is not in 1..T-1.
    """
    _check_steps("euler", schedule, steps)
    return _rows(schedule, _euler_timesteps(schedule, steps), end=(1.0, 0.0))


def heun_table(schedule: Schedule, steps: int) -> Table[np.ndarray]:
    """Heun's method (Karras et al. 2022, algorithm 1 without churn) at the timesteps of `euler_table`.

    The step averages the derivatives at both ends. Both lie on the line through the first-order result, so they differ
    by a multiple of x0 - x0': the correction is (s - s') / 2 of that in x / alpha for a variance-preserving schedule
    (s = sigma / alpha), in x for rectified flow. The last step, to no noise, is of first order, as is a first step from
    no signal, where s is infinite. This is diffusers' HeunDiscreteScheduler or FlowMatchHeunDiscreteScheduler.

    Raises:
      UserError: steps is not in 1..T-1.
    """
    _check_steps("heun", schedule, steps)
    table = _rows(schedule, _euler_timesteps(schedule, steps), end=(1.0, 0.0))
    if isinstance(schedule, RectifiedFlow):
        here, there, scale = table.sigma, table.sigma_next, np.ones(steps)
    else:
        here, there = _noise_to_signal(table.alpha, table.sigma), table.sigma_next / table.alpha_next
        scale = table.alpha_next
    inner = (there > 0) & np.isfinite(here)
    correction = np.zeros(steps)
    correction[inner] = scale[inner] * (here[inner] - there[inner]) / (2 * there[inner])
    return table._replace(correction=correction)


def dpmpp_2m_table(schedule: Schedule, steps: int) -> Table[np.ndarray]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): diffusers' DPMSolverMultistepScheduler of order 2.

    Its settings are algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero" and "linspace",
    which is trailing with zero terminal SNR; on rectified flow use_flow_sigmas=True: evenly from T - 1 to 0, which is
    left out, then shifted. The first and the last step are of first order. With lambda = log(alpha / sigma) and
    h = lambda' - lambda the correction is the factor alpha' (1 - exp(-h)) h / (2 h of the step before) of x0 less the
    step's before.

    Raises:
      UserError: steps is not in 1..T-1.
    """
    _check_steps("dpmpp_2m", schedule, steps)
    total = schedule.num_timesteps
    if isinstance(schedule, RectifiedFlow):
        timesteps = _shifted(schedule, (1.0 - 1.0 / total) * (1.0 - np.arange(steps) / steps))
    else:
        timesteps = (trailing if schedule.zero_terminal_snr else linspace)(total, steps)
    table = _rows(schedule, timesteps, end=(1.0, 0.0))
    # Without its last entry, whose lambda' is infinite; without signal -lambda is, and h / h of the step before is 0.
    lambdas = -np.log(_noise_to_signal(table.alpha, table.sigma))
    h = np.diff(lambdas)
    correction = np.zeros(steps)
    correction[1:-1] = table.alpha_next[1:-1] * -np.expm1(-h[1:]) * h[1:] / (2 * h[:-1])
    return table._replace(correction=correction)


def _check_steps(sampler: str, schedule: Schedule, steps: int) -> None:
    most = schedule.num_timesteps - 1
    if not 1 <= steps <= most:
        raise UserError(f"sample.steps={steps}: {sampler} needs 1 to {most} steps")


def _leading_or_trailing(schedule: Schedule, steps: int) -> np.ndarray:
    return (trailing if schedule.zero_terminal_snr else leading)(schedule.num_timesteps, steps)


def _euler_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    if not isinstance(schedule, RectifiedFlow):
        return _leading_or_trailing(schedule, steps)
    last = float(shift_time(np.array(1.0 / schedule.num_timesteps), schedule.time_shift))
    return _shifted(schedule, np.linspace(1.0, last, steps))


def _shifted(schedule: RectifiedFlow, share: np.ndarray) -> np.ndarray:
    return shift_time(share, schedule.time_shift) * schedule.num_timesteps


def _rows(schedule: Schedule, timesteps: np.ndarray, end: tuple[float, float]) -> Table[np.ndarray]:
    """Steps of first order from each of `timesteps` [S] to the next, the last to (alpha, sigma) = `end`."""
    alpha, sigma = schedule.coefficients(timesteps)
    seen = np.minimum(timesteps, largest_timestep(schedule.num_timesteps))
    return Table(
        timesteps=seen,
        alpha=alpha,
        sigma=sigma,
        timesteps_next=np.append(seen[1:], 0.0),
        alpha_next=np.append(alpha[1:], end[0]),
        sigma_next=np.append(sigma[1:], end[1]),
        correction=np.zeros(len(timesteps)),
    )


def _noise_to_signal(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """sigma / alpha, infinite where there is no signal."""
    return np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha > 0)

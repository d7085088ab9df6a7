"""The samplers of published pipelines, with every setting of their diffusers schedulers.

`import` sets one of these as `config.sample.sampler`, with the settings as `config.sample.sampler_fields`, where the
built-in samplers are not exactly what the pipeline's scheduler does. Each class computes what the class of diffusers
0.42.1 in `SCHEDULERS` does: fields have its names, and the trajectories are equal in tests/diffusion.

All of them are linear: the next latents are a sum of the present ones, the clean latents and the noise that the model
sees, up to three earlier predictions, and fresh noise. A sampler is a table of these factors.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.diffusion import dpm_solver, noise_levels
from scaling_dit.diffusion.linear_table import Linear, new_table
from scaling_dit.diffusion.noise_levels import Curve
from scaling_dit.diffusion.samplers import Denoise
from scaling_dit.diffusion.schedules import Schedule


class Held(NamedTuple):
    """What a step hands to the next one: earlier predictions [3, B, H, W, C], keys [B], and the number of the step."""

    earlier: jax.Array
    keys: jax.Array
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class Published:
    """What all have in common: the step, and where the timesteps lie.

    Some have `clip_sample` and `clip_sample_range`, which clip the clean latents, and `thresholding`,
    `dynamic_thresholding_ratio` and `sample_max_value`: dynamic thresholding of each image (Saharia et al. 2022,
    section 2.3), which replaces clipping.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0

    # Whether the noise is computed again from clipped clean latents.
    refits_noise: ClassVar[bool] = False

    @property
    def adds_noise(self) -> bool:
        """Whether steps add fresh noise."""
        return False

    def init(self, noise: jax.Array, keys: jax.Array) -> Held:
        """See `samplers.Sampler`."""
        return Held(jnp.zeros((3, *noise.shape), noise.dtype), keys, jnp.zeros((), jnp.int32))

    def step(
        self, denoise: Denoise, latents: jax.Array, held: Held, row: Linear[jax.Array]
    ) -> tuple[jax.Array, Held]:
        """See `samplers.Sampler`; one model call."""
        latents = row.scale * latents
        x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
        clipped = self._clipped(x0)
        if self.refits_noise and clipped is not x0:
            eps = (latents - row.alpha * clipped) / row.sigma
        value = row.value_x0 * clipped + row.value_eps * eps
        after = row.keep * latents + row.x0 * clipped + row.eps * eps
        for factor, earlier in zip((row.first, row.second, row.third), held.earlier, strict=True):
            after += factor * earlier
        if self.adds_noise:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, held.number))(held.keys)
            after += row.noise * jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        moved = jnp.concatenate([value[None], held.earlier[:-1]])
        earlier = jnp.where(row.remember > 0, moved, held.earlier)
        return after, Held(earlier, held.keys, held.number + 1)

    def _clipped(self, x0: jax.Array) -> jax.Array:
        """The clean latents, clipped as the fields say that a sampler has."""
        fields: dict[str, Any] = vars(self)
        if fields.get("thresholding"):
            most = jnp.quantile(
                jnp.abs(x0).reshape(len(x0), -1), fields["dynamic_thresholding_ratio"], axis=1
            )
            # As torch.clamp, whose upper bound wins.
            most = jnp.minimum(jnp.maximum(most, 1.0), fields["sample_max_value"])
            most = most.reshape(-1, *[1] * (x0.ndim - 1))
            return jnp.clip(x0, -most, most) / most
        if fields.get("clip_sample"):
            return jnp.clip(x0, -fields["clip_sample_range"], fields["clip_sample_range"])
        return x0


@dataclasses.dataclass(frozen=True)
class Ddim(Published):
    """diffusers' DDIMScheduler, with eta = 0 as pipelines call it."""

    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        total = schedule.num_timesteps
        signals = noise_levels.signal(schedule, exact=True)
        times = np.round(noise_levels.spaced(self.timestep_spacing, self.steps_offset, total, steps))
        after = _signal_at(signals, times - total // steps, 1.0 if self.set_alpha_to_one else signals[0])
        now = signals[times.astype(int)]
        return new_table(times, np.sqrt(now), np.sqrt(1 - now), x0=np.sqrt(after), eps=np.sqrt(1 - after))


@dataclasses.dataclass(frozen=True)
class Ddpm(Published):
    """diffusers' DDPMScheduler with a fixed variance: ancestral sampling (Ho et al. 2020, algorithm 2)."""

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    @property
    def adds_noise(self) -> bool:
        """See `Published`."""
        return True

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        signals = noise_levels.signal(schedule, exact=True)
        spaced = noise_levels.spaced(self.timestep_spacing, self.steps_offset, schedule.num_timesteps, steps)
        times = np.round(spaced)
        now = signals[times.astype(int)]
        after = np.append(now[1:], 1.0)
        beta = 1 - now / after
        variance = np.maximum((1 - after) / (1 - now) * beta, 1e-20)
        if self.variance_type == "fixed_large":
            variance = beta
        return new_table(
            times, np.sqrt(now), np.sqrt(1 - now),
            x0=np.sqrt(after) * beta / (1 - now),
            keep=np.sqrt(now / after) * (1 - after) / (1 - now),
            noise=np.where(times > 0, np.sqrt(variance), 0.0),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pndm(Published):
    """diffusers' PNDMScheduler with `skip_prk_steps`: linear multistep steps alone, the second timestep twice.

    `prediction_type` is the pipeline's, because earlier predictions are combined as the model made them.
    """

    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`; steps + 1 rows, unless there is one step only."""
        total, signals = schedule.num_timesteps, noise_levels.signal(schedule)
        spaced = noise_levels.spaced(self.timestep_spacing, self.steps_offset, total, steps)
        times = np.round(spaced)
        seen = np.concatenate([times[:2], times[1:]]) if steps > 1 else times
        start, end = seen.copy(), seen - total // steps
        if steps > 1:
            start[1], end[1] = seen[1] + total // steps, seen[1]
        final = 1.0 if self.set_alpha_to_one else signals[0]
        now, after = (
            _signal_at(signals, np.minimum(start, total - 1.0), final),
            _signal_at(signals, end, final),
        )
        keep = np.sqrt(after / now)
        change = -(after - now) / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
        factors = np.array(
            [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
        )
        weights = np.concatenate([factors, np.tile([55 / 24, -59 / 24, 37 / 24, -9 / 24], (len(seen), 1))])
        weights = weights[: len(seen)]
        if self.prediction_type == "v_prediction":
            keep = keep + change * np.sqrt(1 - now)
            change = change * np.sqrt(now)
        weights = weights * change[:, None]
        if steps > 1:
            # The second row starts from the first latents again: those of now, less what the first row added.
            weights[1, 1] -= keep[1] / keep[0] * weights[0, 0]
            keep[1] /= keep[0]
        seen_signal = signals[np.clip(seen, 0, total - 1).astype(int)]
        alpha, sigma = np.sqrt(seen_signal), np.sqrt(1 - seen_signal)
        v = self.prediction_type == "v_prediction"
        value_x0, value_eps = (-sigma, alpha) if v else (np.zeros(len(seen)), np.ones(len(seen)))
        return new_table(
            seen, alpha, sigma, keep=keep, x0=weights[:, 0] * value_x0, eps=weights[:, 0] * value_eps,
            first=weights[:, 1], second=weights[:, 2], third=weights[:, 3],
            value_x0=value_x0, value_eps=value_eps, remember=(np.arange(len(seen)) != 1).astype(float),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Euler(Published):
    """diffusers' EulerDiscreteScheduler without churn."""

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    # 0 for the end of the timesteps.
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    final_sigmas_type: str = "zero"

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        times, levels, last, scale = _euler_levels(self, schedule, steps)
        after = np.append(levels[1:], last if self.final_sigmas_type == "sigma_min" else 0.0)
        alpha = 1 / np.sqrt(1 + after**2)
        return new_table(times, *_factors(levels), x0=alpha, eps=alpha * after, scale=scale)


@dataclasses.dataclass(frozen=True)
class EulerAncestral(Published):
    """diffusers' EulerAncestralDiscreteScheduler."""

    timestep_spacing: str = "linspace"

    @property
    def adds_noise(self) -> bool:
        """See `Published`."""
        return True

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        times, levels, _, scale = _euler_levels(self, schedule, steps)
        after = np.append(levels[1:], 0.0)
        up = after * np.sqrt(1 - (after / levels) ** 2)
        down = np.sqrt(after**2 - up**2)
        alpha = 1 / np.sqrt(1 + after**2)
        return new_table(times, *_factors(levels), x0=alpha, eps=alpha * down, noise=alpha * up, scale=scale)


@dataclasses.dataclass(frozen=True)
class Heun(Published):
    """diffusers' HeunDiscreteScheduler: two rows a step, but one for the last."""

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    refits_noise: ClassVar[bool] = True

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        times, levels, _, scale = _euler_levels(self, schedule, steps)
        after = np.append(levels[1:], 0.0)
        alpha = 1 / np.sqrt(1 + after**2)
        # A row of Euler's, then one at its end that exchanges half of its derivative.
        half = alpha * (after - levels) / 2
        rows = [np.repeat(column, 2)[:-1] for column in (alpha, alpha * after, half)]
        euler = np.arange(2 * steps - 1) % 2 == 0
        return new_table(
            np.repeat(times, 2)[1:], *_factors(np.repeat(levels, 2)[1:]),
            keep=np.where(euler, 0.0, 1.0), x0=np.where(euler, rows[0], 0.0),
            eps=np.where(euler, rows[1], rows[2]), first=np.where(euler, 0.0, -rows[2]),
            scale=np.append(scale[:1], np.ones(2 * steps - 2)),
            value_eps=np.ones(2 * steps - 1),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DpmSolver(Published):
    """diffusers' DPMSolverMultistepScheduler, of all orders and algorithms."""

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    # Such as -1e9 for none.
    lambda_min_clipped: float = -1e9
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    # Whether the schedule is diffusers' squaredcos_cap_v2, whose timesteps are not rounded.
    cosine: bool = False
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    refits_noise: ClassVar[bool] = True

    @property
    def adds_noise(self) -> bool:
        """See `Published`."""
        return self.algorithm_type.startswith("sde-")

    def table(self, schedule: Schedule, steps: int) -> Linear[np.ndarray]:
        """See `samplers.Sampler`."""
        return dpm_solver.table(self, schedule, steps)


# Our class -> diffusers'.
SCHEDULERS: dict[type[Published], str] = {
    Ddim: "DDIMScheduler",
    Ddpm: "DDPMScheduler",
    Pndm: "PNDMScheduler",
    Euler: "EulerDiscreteScheduler",
    EulerAncestral: "EulerAncestralDiscreteScheduler",
    Heun: "HeunDiscreteScheduler",
    DpmSolver: "DPMSolverMultistepScheduler",
}


def _signal_at(signals: np.ndarray, times: np.ndarray, final: float) -> np.ndarray:
    """alpha^2 at integer timesteps; `final` before the first."""
    inside = signals[np.clip(times, 0, len(signals) - 1).astype(int)]
    return np.where(times >= 0, inside, final)


def _factors(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of noise levels."""
    alpha = 1 / np.sqrt(1 + levels**2)
    return alpha, alpha * levels


def _euler_levels(
    sampler: Any, schedule: Schedule, steps: int
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Timesteps, noise levels, the level of timestep 0, and the scale of the latents before each step.

    Where the timesteps are not "leading", diffusers starts from noise of the largest level, without the signal that
    goes with it: at our scale, noise times sigma.
    """
    total = schedule.num_timesteps
    table = noise_levels.levels_of(noise_levels.signal(schedule))
    times = noise_levels.spaced(sampler.timestep_spacing, sampler.steps_offset, total, steps)
    levels = np.interp(times, np.arange(total), table)
    name = noise_levels.curve_name(sampler)
    if name:
        ends = (getattr(sampler, "sigma_min", 0.0) or None, getattr(sampler, "sigma_max", 0.0) or None)
        levels = Curve(name, *ends).levels(levels[0], levels[-1], steps)
        times = noise_levels.timesteps_of(levels, table)
    scale = np.ones(steps)
    if sampler.timestep_spacing != "leading":
        scale[0] = _factors(levels[:1])[1][0]
    return times, levels, float(table[0]), scale

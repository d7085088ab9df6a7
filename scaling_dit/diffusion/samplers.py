"""From noise to latents: a sampler is a table of coefficients and a step that `sample` scans over it."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.diffusion.objectives import to_x0_eps
from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError, nearest

# (latents [B, H, W, C], timesteps float32 [B]) -> prediction [B, H, W, C or 2C]
Predict = Callable[[jax.Array, jax.Array], jax.Array]
# (latents [B, H, W, C], timestep [], alpha [], sigma []) -> clean latents and noise, both [B, H, W, C]
Denoise = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


Column = TypeVar("Column", np.ndarray, jax.Array)


class Sampler(NamedTuple):
    """`table(schedule, steps)` is a tuple of float64 [S]; `step(denoise, latents, row)` the next latents."""

    table: Callable[[Schedule, int], Any]
    step: Callable[[Denoise, jax.Array, Any], jax.Array]


class DdimTable(NamedTuple, Generic[Column]):
    """Coefficients of a DDIM trajectory, noisiest step first: each [S], or [] in one row."""

    timesteps: Column
    alpha: Column
    sigma: Column
    alpha_next: Column
    sigma_next: Column


def ddim_table(schedule: Schedule, steps: int) -> DdimTable[np.ndarray]:
    """Leading spacing with offset 1: 981, 961, ..., 1 for 50 of 1000 steps, as Stable Diffusion samples.

    The step length is num_timesteps // steps, so counts that do not divide start lower than the noisiest
    timestep. Each step goes to the timestep one step length lower, the last one to timestep 0 (not to alpha
    = 1). This is diffusers' DDIMScheduler with timestep_spacing="leading", steps_offset=1,
    set_alpha_to_one=False.

    Raises:
      UserError: steps is not in 1..num_timesteps-1.
    """
    total = schedule.num_timesteps
    if not 1 <= steps < total:
        raise UserError(f"sample.steps={steps}: ddim needs 1 to {total - 1} steps")
    stride = total // steps
    timesteps = np.arange(steps)[::-1] * stride + 1
    here = schedule.alphas_cumprod[timesteps]
    there = schedule.alphas_cumprod[np.maximum(timesteps - stride, 0)]
    return DdimTable(
        timesteps.astype(np.float64), np.sqrt(here), np.sqrt(1 - here), np.sqrt(there), np.sqrt(1 - there)
    )


def ddim_step(denoise: Denoise, latents: jax.Array, row: DdimTable[jax.Array]) -> jax.Array:
    """One deterministic step (Song et al. 2021, eq. 12 with eta = 0)."""
    x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
    return row.alpha_next * x0 + row.sigma_next * eps


SAMPLERS = {"ddim": Sampler(ddim_table, ddim_step)}


def sample(
    predict: Predict,
    noise: jax.Array,
    schedule: Schedule,
    *,
    sampler: str = "ddim",
    steps: int = 50,
    prediction: str = "eps",
    clip: bool = False,
) -> jax.Array:
    """Latents float32 [B, H, W, C], a pure function (to be jitted) of standard normal `noise` of that shape.

    `predict` is the backbone with everything but latents and timesteps bound (see `guidance.guided`),
    `prediction` what it predicts. `clip` keeps the clean latents of every step within [-1, 1], which suits
    pixels, not VAE latents.

    Raises:
      UserError: unknown sampler or kind of prediction, or a number of steps the sampler cannot take.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sample.sampler: unknown {sampler!r}; {nearest(sampler, SAMPLERS)}")
    chosen = SAMPLERS[sampler]
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), chosen.table(schedule, steps))
    denoise = make_denoise(predict, prediction=prediction, clip=clip)
    latents, _ = jax.lax.scan(
        lambda latents, row: (chosen.step(denoise, latents, row), None), noise.astype(jnp.float32), rows
    )
    return latents


def make_denoise(predict: Predict, *, prediction: str = "eps", clip: bool = False) -> Denoise:
    """`predict` as a function that splits latents at one timestep into clean latents and noise, float32.

    A clipped x0 gives the noise that goes with it, so that alpha x0 + sigma eps is the input still (as
    guided diffusion does; diffusers: use_clipped_model_output=True).
    """

    def denoise(
        latents: jax.Array, timestep: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        output = predict(latents, jnp.full(latents.shape[:1], timestep, jnp.float32))
        value = output[..., : latents.shape[-1]].astype(jnp.float32)
        x0, eps = to_x0_eps(prediction, value, latents, alpha, sigma)
        if clip:
            x0, eps = to_x0_eps("x0", jnp.clip(x0, -1.0, 1.0), latents, alpha, sigma)
        return x0, eps

    return denoise

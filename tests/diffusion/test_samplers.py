"""DDIM against diffusers on an analytic model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from scaling_dit.diffusion.samplers import SAMPLERS, ddim_table, make_denoise, sample
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.errors import UserError

KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISE = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


def model(x, t):
    """A smooth function of latents and time, in jax."""
    return 0.3 * x + 0.1 * jnp.sin(3 * x + t[:, None, None, None] / 100)


def reference_trajectory(steps, prediction, clip=False, schedule=SCALED_LINEAR, dtype=torch.float32):
    scheduler = DDIMScheduler(
        **schedule,
        prediction_type=KINDS[prediction],
        clip_sample=clip,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.to(dtype), dim=0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    x, trajectory = torch.tensor(NOISE, dtype=dtype), []
    for t in scheduler.timesteps:
        output = 0.3 * x + 0.1 * torch.sin(3 * x + t / 100)
        x = scheduler.step(output, t, x, use_clipped_model_output=clip).prev_sample
        trajectory.append(x.numpy())
    return scheduler.timesteps.numpy(), np.stack(trajectory)


def our_trajectory(steps, prediction, clip=False, schedule="scaled_linear"):
    """Every latent on the way, from the same table and step that `sample` scans."""
    table = ddim_table(make_schedule(schedule), steps)
    denoise = make_denoise(model, prediction=prediction, clip=clip)
    x, trajectory = jnp.asarray(NOISE), []
    step = jax.jit(lambda x, row: SAMPLERS["ddim"].step(denoise, x, row))
    for index in range(steps):
        x = step(x, jax.tree.map(lambda column: jnp.float32(column[index]), table))  # noqa: B023
        trajectory.append(np.asarray(x))
    return table.timesteps, np.stack(trajectory)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_trajectory_equals_diffusers(steps, prediction):
    expected_times, expected = reference_trajectory(steps, prediction)
    times, trajectory = our_trajectory(steps, prediction)
    np.testing.assert_array_equal(times, expected_times)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)
    final = sample(
        model, jnp.asarray(NOISE), make_schedule("scaled_linear"), steps=steps, prediction=prediction
    )
    np.testing.assert_allclose(final, expected[-1], rtol=0, atol=2e-5)


def test_clipped_trajectory_equals_diffusers():
    _, expected = reference_trajectory(20, "eps", clip=True)
    _, free = reference_trajectory(20, "eps")
    assert np.abs(expected[-1] - free[-1]).max() > 0.1
    _, trajectory = our_trajectory(20, "eps", clip=True)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)
    final = sample(model, jnp.asarray(NOISE), make_schedule("scaled_linear"), steps=20, clip=True)
    np.testing.assert_allclose(final, expected[-1], rtol=0, atol=2e-5)


def test_cosine_trajectory_of_a_clean_prediction_equals_diffusers():
    # In float64: with so little noise near t = 0, float32 costs the reference two digits of 1 - alpha_bar.
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    _, expected = reference_trajectory(20, "x0", schedule=cosine, dtype=torch.float64)
    _, trajectory = our_trajectory(20, "x0", schedule="cosine")
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 600, 999])
def test_timesteps_equal_diffusers_where_steps_do_not_divide(steps):
    scheduler = DDIMScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(
        ddim_table(make_schedule("scaled_linear"), steps).timesteps, scheduler.timesteps
    )


def test_table_of_fifty_steps():
    schedule = make_schedule("scaled_linear")
    table = ddim_table(schedule, 50)
    np.testing.assert_array_equal(table.timesteps, np.arange(981, 0, -20))
    np.testing.assert_array_equal(table.alpha_next[:-1], table.alpha[1:])
    np.testing.assert_allclose(table.alpha_next[-1] ** 2, schedule.alphas_cumprod[0])
    np.testing.assert_allclose(table.alpha**2 + table.sigma**2, 1.0)
    assert all(column.dtype == np.float64 for column in table)


def test_a_perfect_model_ends_at_the_data():
    data = jnp.tanh(jnp.asarray(NOISE[::-1]))
    final = sample(lambda x, t: data, jnp.asarray(NOISE), make_schedule("cosine"), steps=10, prediction="x0")
    # What is left is the noise of timestep 0, where the last step ends.
    np.testing.assert_allclose(final, data, atol=0.05)


def test_predictions_use_the_first_channels_and_see_a_time_per_row():
    seen = []

    def wide(x, t):
        seen.append((t.shape, t.dtype))
        output = model(x, t).astype(jnp.bfloat16)
        return jnp.concatenate([output, jnp.full_like(output, jnp.nan)], axis=-1)

    final = sample(wide, jnp.asarray(NOISE), make_schedule("scaled_linear"), steps=5)
    assert seen == [((2,), jnp.float32)]  # traced once, whatever the number of steps
    assert final.dtype == jnp.float32
    assert bool(jnp.isfinite(final).all())


def test_mistakes_are_told_in_one_line():
    schedule = make_schedule("scaled_linear")
    for steps in (0, 1000):
        with pytest.raises(UserError, match=f"sample.steps={steps}: ddim needs 1 to 999 steps"):
            sample(model, jnp.asarray(NOISE), schedule, steps=steps)
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        sample(model, jnp.asarray(NOISE), schedule, sampler="dim")
    with pytest.raises(UserError, match="did you mean 'eps'"):
        sample(model, jnp.asarray(NOISE), schedule, prediction="epsi")

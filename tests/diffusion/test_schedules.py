"""Noise schedules against diffusers, and at fractional timesteps."""

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler

from scaling_dit.diffusion.schedules import SCHEDULES, make_betas, make_schedule
from scaling_dit.errors import UserError

REFERENCE = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_diffusers(name):
    reference = DDIMScheduler(**REFERENCE[name])
    schedule = make_schedule(name)
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.num_timesteps == 1000
    np.testing.assert_allclose(make_betas(name), reference.betas.numpy(), rtol=1e-6, atol=1e-9)
    # diffusers multiplies up in float32, hence the wider tolerance.
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=1e-4)


def test_known_values_of_scaled_linear():
    schedule = make_schedule("scaled_linear")
    np.testing.assert_allclose(schedule.alphas_cumprod[[0, 999]], [0.99915, 0.00466], atol=5e-6)


def test_cosine_follows_its_closed_form_and_clips():
    betas, schedule = make_betas("cosine"), make_schedule("cosine")
    assert betas[-1] == 0.999
    assert (betas[:-1] < 0.999).all()

    def alpha_bar(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    times = np.arange(999)
    expected = alpha_bar((times + 1) / 1000) / alpha_bar(0)
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected, rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_table_is_exact_at_integers(name):
    schedule = make_schedule(name)
    times = jnp.arange(1000)
    alphas_cumprod = schedule.alphas_cumprod
    np.testing.assert_array_equal(schedule.alpha(times), np.sqrt(alphas_cumprod).astype(np.float32))
    np.testing.assert_array_equal(schedule.sigma(times), np.sqrt(1 - alphas_cumprod).astype(np.float32))
    np.testing.assert_allclose(schedule.snr(times), alphas_cumprod / (1 - alphas_cumprod), rtol=1e-5)
    assert schedule.snr(times).dtype == jnp.float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_fractional_times_lie_between_and_keep_the_variance(name):
    schedule = make_schedule(name)
    times = np.random.default_rng(0).uniform(0, 999, 500).astype(np.float32)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    assert (alpha <= schedule.alpha(np.floor(times))).all()
    assert (alpha >= schedule.alpha(np.ceil(times))).all()
    np.testing.assert_allclose(jnp.square(alpha) + jnp.square(sigma), 1.0, atol=1e-4)
    halves = schedule.alpha(np.array([10.5, 500.5]))
    expected = (schedule.alpha(np.array([10, 500])) + schedule.alpha(np.array([11, 501]))) / 2
    np.testing.assert_allclose(halves, expected, rtol=1e-6)


def test_times_past_the_last_keep_its_value_and_shapes_are_kept():
    schedule = make_schedule("cosine")
    assert schedule.alpha(jnp.float32(999.9)) == schedule.alpha(jnp.int32(999))
    assert schedule.sigma(jnp.zeros((2, 3))).shape == (2, 3)


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match="unknown 'cosin'; did you mean 'cosine'"):
        make_schedule("cosin")

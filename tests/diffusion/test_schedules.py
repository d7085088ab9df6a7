"""Noise schedules against diffusers, and at fractional timesteps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from scaling_dit.diffusion.sampler_tables import ddim_table
from scaling_dit.diffusion.schedules import (
    VP_SCHEDULES,
    RectifiedFlow,
    make_betas,
    make_schedule,
    shift_resolution,
    shift_time,
    zero_terminal_snr,
)
from scaling_dit.diffusion.weightings import loss_weight
from scaling_dit.errors import UserError
from tests.support.uvit_golden import run

REFERENCE = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", VP_SCHEDULES)
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


def of_device(schedule, times):
    """Alpha and sigma by one program, of numpy."""
    return jax.device_get(run(lambda times: (schedule.alpha(times), schedule.sigma(times)), times))


@pytest.mark.parametrize("name", VP_SCHEDULES)
def test_table_is_exact_at_integers(name):
    schedule = make_schedule(name)
    alpha, sigma = of_device(schedule, np.arange(1000))
    alphas_cumprod = schedule.alphas_cumprod
    np.testing.assert_array_equal(alpha, np.sqrt(alphas_cumprod).astype(np.float32))
    np.testing.assert_array_equal(sigma, np.sqrt(1 - alphas_cumprod).astype(np.float32))
    assert alpha.dtype == sigma.dtype == jnp.float32
    for ours, on_device in zip(schedule.coefficients(np.arange(1000)), (alpha, sigma), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, on_device, rtol=1e-6)


@pytest.mark.parametrize("name", VP_SCHEDULES)
def test_fractional_times_lie_between_and_keep_the_variance(name):
    schedule = make_schedule(name)
    times = np.random.default_rng(0).uniform(0, 999, 500).astype(np.float32)
    alpha, sigma = of_device(schedule, times)
    assert (alpha <= of_device(schedule, np.floor(times))[0]).all()
    assert (alpha >= of_device(schedule, np.ceil(times))[0]).all()
    np.testing.assert_allclose(np.square(alpha) + np.square(sigma), 1.0, atol=1e-4)
    halves, whole = of_device(schedule, np.array([10.5, 500.5])), of_device(schedule, np.array([10, 500]))
    halves, expected = halves[0], (whole[0] + of_device(schedule, np.array([11, 501]))[0]) / 2
    np.testing.assert_allclose(halves, expected, rtol=1e-6)


def test_times_past_the_last_keep_its_value_and_shapes_are_kept():
    schedule = make_schedule("cosine")
    assert schedule.alpha(jnp.float32(999.9)) == schedule.alpha(jnp.int32(999))
    assert jax.eval_shape(schedule.sigma, jnp.zeros((2, 3))).shape == (2, 3)


@pytest.mark.parametrize("name", VP_SCHEDULES)
def test_zero_terminal_snr_equals_diffusers(name):
    schedule = make_schedule(name, zero_snr=True)
    # In float64.
    expected = rescale_zero_terminal_snr(torch.tensor(make_betas(name)))
    np.testing.assert_allclose(1 - expected, ratios(schedule.alphas_cumprod), rtol=1e-9, atol=1e-12)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.zero_terminal_snr
    assert schedule.alpha(jnp.int32(999)) == 0 and schedule.sigma(jnp.int32(999)) == 1
    plain = make_schedule(name)
    assert not plain.zero_terminal_snr
    np.testing.assert_allclose(schedule.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-12)
    np.testing.assert_array_equal(zero_terminal_snr(plain.alphas_cumprod), schedule.alphas_cumprod)
    times = np.random.default_rng(1).uniform(0, 999, 500).astype(np.float32)
    power = sum(map(np.square, of_device(schedule, times)))
    np.testing.assert_allclose(power, 1.0, atol=2e-4)


def ratios(alphas_cumprod):
    return np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])


def test_flow_is_a_straight_line_at_any_time():
    schedule = make_schedule("flow")
    assert schedule == RectifiedFlow() and schedule.continuous and schedule.zero_terminal_snr
    times = np.array([0.0, 0.25, 300.0, 999.5, 1000.0])
    np.testing.assert_allclose(schedule.sigma(times), times / 1000, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha(times), 1 - times / 1000, atol=1e-7)
    alpha, sigma = schedule.coefficients(times)
    np.testing.assert_array_equal((alpha, sigma), (1 - times / 1000, times / 1000))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_time_shift_equals_diffusers_and_its_inverse(shift):
    # Of 1, 0.999, ..., 0.001.
    reference = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.numpy()
    shares = np.arange(1000, 0, -1) / 1000
    np.testing.assert_allclose(shift_time(shares, shift), reference, rtol=1e-5)
    np.testing.assert_allclose(shift_time(shift_time(shares, shift), 1 / shift), shares, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "zero_snr"),
    [*((name, zero) for name in VP_SCHEDULES for zero in (False, True)), ("flow", False)],
)
def test_times_of_equal_noise(name, zero_snr):
    schedule = make_schedule(name, zero_snr=zero_snr)
    times = np.arange(999.0)
    alpha, sigma = schedule.coefficients(times)
    np.testing.assert_allclose(schedule.timesteps_of(sigma / alpha), times, rtol=0, atol=1e-6)
    # Whatever the schedule, the latents found differ from the reference's by their scale alone.
    alpha, sigma = make_schedule("scaled_linear").coefficients(np.arange(5, 1000.0))
    found = schedule.timesteps_of(sigma / alpha)
    assert (found >= 0).all() and (found < 1000).all()
    alpha_of_found, sigma_of_found = of_device(schedule, found)
    ours = sigma_of_found / alpha_of_found
    np.testing.assert_allclose(ours, sigma / alpha, rtol=2e-3)


def test_options_of_another_schedule_are_refused():
    with pytest.raises(UserError, match="'flow' ends without signal by itself"):
        make_schedule("flow", zero_snr=True)
    with pytest.raises(UserError, match="time_shift=3.0 is for diffusion.schedule 'flow', not 'linear'"):
        make_schedule("linear", time_shift=3.0)
    with pytest.raises(UserError, match="'flow' leave it 1.0 and set diffusion.time_shift=2.0"):
        make_schedule("flow", resolution_shift=2.0)


@pytest.mark.parametrize("name", VP_SCHEDULES)
@pytest.mark.parametrize("ratio", [0.5, 2.0, 4.0])
def test_a_larger_image_has_more_noise_at_the_same_timestep(name, ratio):
    """log SNR + 2 ln(base / side), in both directions: the sign must not be the other one."""
    plain, shifted = make_schedule(name), make_schedule(name, resolution_shift=ratio)
    times = np.arange(1000.0)

    def log_snr(schedule):
        alpha, sigma = schedule.coefficients(times)
        return 2 * np.log(alpha / sigma)

    moved = log_snr(shifted) - log_snr(plain)
    np.testing.assert_allclose(moved, 2 * np.log(1.0 / ratio), atol=1e-9)
    sigmas = shifted.coefficients(times)[1], plain.coefficients(times)[1]
    assert (np.sign(sigmas[0] - sigmas[1]) == np.sign(ratio - 1)).all()
    back = shift_resolution(shifted.alphas_cumprod, 1 / ratio)
    np.testing.assert_allclose(back, plain.alphas_cumprod, rtol=1e-9)
    # What rectified flow's shift does to the ratio of noise and signal.
    shares = plain.coefficients(times)[1] / sum(plain.coefficients(times))
    alpha, sigma = shifted.coefficients(times)
    np.testing.assert_allclose(sigma / (alpha + sigma), shift_time(shares, ratio), rtol=1e-9)


def test_a_shift_keeps_the_ends_and_the_loss_weights_follow():
    zero = make_schedule("scaled_linear", zero_snr=True, resolution_shift=2.0)
    assert zero.alphas_cumprod[-1] == 0 and zero.zero_terminal_snr
    same = make_schedule("linear", resolution_shift=1.0).alphas_cumprod
    np.testing.assert_array_equal(same, make_schedule("linear").alphas_cumprod)
    plain, shifted = make_schedule("cosine"), make_schedule("cosine", resolution_shift=2.0)
    times = np.arange(50, 950, 50)
    weight = run(lambda t: loss_weight(shifted.alpha(t), shifted.sigma(t), "eps", "min_snr"), times)
    snr = (plain.alphas_cumprod / (1 - plain.alphas_cumprod))[times] / 4
    np.testing.assert_allclose(weight, np.minimum(snr, 5) / snr, rtol=1e-4)
    # A sampler starts from the same timestep, with more noise.
    tables = [ddim_table(schedule, 10) for schedule in (plain, shifted)]
    np.testing.assert_array_equal(tables[0].timesteps, tables[1].timesteps)
    ratios = [table.sigma / table.alpha for table in tables]
    np.testing.assert_allclose(ratios[1], 2 * ratios[0], rtol=1e-6)


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match="unknown config.diffusion.schedule 'cosin'; did you mean 'cosine'"):
        make_schedule("cosin")

"""Conversions between predictions, loss weights, losses and caption drop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_dit.diffusion import objectives
from scaling_dit.diffusion.predictions import PREDICTIONS, check_prediction, from_x0_eps, to_x0_eps
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.diffusion.time_sampling import sample_timesteps
from scaling_dit.diffusion.weightings import loss_weight
from scaling_dit.errors import UserError
from tests.support.uvit_golden import run

SCHEDULE = make_schedule("scaled_linear")


def make_batch(seed, batch=4):
    rng = np.random.default_rng(seed)
    latents, noise = rng.normal(size=(2, batch, 2, 2, 3)).astype(np.float32)
    times = rng.integers(0, 1000, batch).astype(np.int32)
    return latents, noise, times


def levels(schedule, times):
    """Alpha and sigma by one program, of numpy."""
    return jax.device_get(run(lambda times: (schedule.alpha(times), schedule.sigma(times)), times))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 1.47), st.floats(0.7, 1.0), st.sampled_from(PREDICTIONS))
def test_conversions_are_inverse(seed, angle, scale, prediction):
    """On any schedule: scale is 1 where variance is preserved, less on the straight line of flow."""
    x0, eps, _ = make_batch(seed)
    alpha, sigma = np.float32(scale * np.cos(angle)), np.float32(scale * np.sin(angle))
    noisy = alpha * x0 + sigma * eps
    value = from_x0_eps(prediction, x0, eps, alpha, sigma)
    back_x0, back_eps = to_x0_eps(prediction, value, noisy, alpha, sigma)
    np.testing.assert_allclose(back_x0, x0, atol=2e-5)
    np.testing.assert_allclose(back_eps, eps, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_wrong_value_still_explains_the_noisy_latents(prediction):
    x0, eps, times = make_batch(1)
    alpha, sigma = levels(SCHEDULE, times)
    noisy = run(lambda *batch: objectives.add_noise(SCHEDULE, *batch), x0, eps, times)
    other_x0, other_eps = jax.device_get(
        run(lambda *given: to_x0_eps(prediction, *given), x0 * eps, noisy, alpha, sigma)
    )
    expand = (slice(None), None, None, None)
    np.testing.assert_allclose(alpha[expand] * other_x0 + sigma[expand] * other_eps, noisy, atol=2e-5)


def test_noised_latents_and_velocity_equal_diffusers():
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, eps, times = make_batch(2, batch=16)
    x0_t, eps_t, times_t = (torch.tensor(np.array(a)) for a in (x0, eps, times))
    noisy = run(lambda *batch: objectives.add_noise(SCHEDULE, *batch), x0, eps, times)
    np.testing.assert_allclose(noisy, reference.add_noise(x0_t, eps_t, times_t.long()), atol=1e-5)
    velocity = run(lambda *given: from_x0_eps("v", *given), x0, eps, *levels(SCHEDULE, times))
    np.testing.assert_allclose(velocity, reference.get_velocity(x0_t, eps_t, times_t.long()), atol=1e-5)


def test_min_snr_weights_equal_diffusers():
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    times = np.arange(1000)
    snr = compute_snr(reference, torch.tensor(times)).numpy()
    alpha, sigma = levels(SCHEDULE, times)
    clipped = np.minimum(snr, 5.0)
    expected = {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}
    for prediction, right in expected.items():
        weight, plain = run(
            lambda *levels, kind=prediction: (
                loss_weight(*levels, kind, "min_snr", 5.0),
                loss_weight(*levels, kind, "none"),
            ),
            *(alpha, sigma),
        )
        # The reference takes 1 - alpha_bar in float32, which costs it digits at small t.
        np.testing.assert_allclose(weight, right, rtol=3e-4)
        np.testing.assert_array_equal(plain, 1.0)


def test_min_snr_weights_are_finite_without_signal_and_without_noise():
    alpha, sigma = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
    expected = {"eps": [1, 0], "x0": [0, 5], "v": [0, 0], "flow": [0, 0]}
    for prediction in PREDICTIONS:
        weight = loss_weight(alpha, sigma, prediction, "min_snr", 5.0)
        np.testing.assert_array_equal(weight, expected[prediction])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_a_weighted_mean_per_example_over_the_first_channels(prediction):
    x0, eps, times = make_batch(3)
    target = np.array(from_x0_eps(prediction, x0, eps, SCHEDULE.alpha(times), SCHEDULE.sigma(times)))
    errors = np.random.default_rng(4).normal(size=target.shape).astype(np.float32)
    output = jnp.concatenate([target + errors, 100.0 + errors], axis=-1)
    loss = objectives.diffusion_loss(
        output, x0, eps, times, SCHEDULE, prediction=prediction, weighting="min_snr", gamma=3.0
    )
    weight = loss_weight(SCHEDULE.alpha(times), SCHEDULE.sigma(times), prediction, "min_snr", 3.0)
    np.testing.assert_allclose(loss, np.asarray(weight) * np.square(errors).mean((1, 2, 3)), rtol=1e-4)
    assert loss.shape == (4,) and loss.dtype == jnp.float32


@pytest.mark.parametrize("schedule", [SCHEDULE, make_schedule("flow")])
def test_min_snr_makes_all_predictions_one_loss(schedule):
    """An error seen in any of the spaces weighs the same: that is what the formulas are for."""
    x0, eps, times = make_batch(5)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    noisy = objectives.add_noise(schedule, x0, eps, times)
    guess_x0, guess_eps = to_x0_eps("v", x0 + eps, noisy, alpha, sigma)
    losses = [
        objectives.diffusion_loss(
            from_x0_eps(prediction, guess_x0, guess_eps, alpha, sigma),
            *(x0, eps, times, schedule),
            prediction=prediction,
            weighting="min_snr",
        )
        for prediction in PREDICTIONS
    ]
    for other in losses[1:]:
        np.testing.assert_allclose(losses[0], other, rtol=1e-3)


def test_losses_are_float32_for_a_bfloat16_backbone():
    x0, eps, times = make_batch(6)
    loss = objectives.diffusion_loss(eps.astype(jnp.bfloat16), x0, eps, times, SCHEDULE)
    assert loss.dtype == jnp.float32
    assert (loss > 0).all() and (loss < 1e-4).all()


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eps_mse_does_not_depend_on_the_kind_of_prediction(prediction, name):
    x0, eps, times = make_batch(7)
    schedule = make_schedule(name)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    noisy = objectives.add_noise(schedule, x0, eps, times)
    guess = eps + 0.3
    output = from_x0_eps(prediction, to_x0_eps("eps", guess, noisy, alpha, sigma)[0], guess, alpha, sigma)
    doubled = jnp.concatenate([output, output + 7], axis=-1)
    error = objectives.eps_mse(doubled, x0, eps, times, schedule, prediction=prediction)
    np.testing.assert_allclose(error, 0.09, rtol=1e-3)


def test_dropped_rows_hold_the_empty_caption():
    batch, length = 4000, 5
    ids = (np.arange(batch)[:, None] + np.arange(10, 10 + length)).astype(np.int32)
    mask = np.ones((batch, length), bool)
    empty_ids = np.array([1, 2, 0, 0, 0], np.int32)
    empty_mask = np.array([True, True, False, False, False])

    def drop(rate):
        given = jax.random.key(0), ids, mask, empty_ids, empty_mask
        return jax.device_get(run(lambda *given: objectives.drop_captions(*given, rate), *given))

    new_ids, new_mask = drop(0.1)
    dropped = (new_ids == empty_ids).all(1)
    # Five standard deviations.
    assert abs(dropped.mean() - 0.1) < 0.025
    np.testing.assert_array_equal(new_ids[~dropped], ids[~dropped])
    np.testing.assert_array_equal(new_mask[dropped], np.broadcast_to(empty_mask, (dropped.sum(), length)))
    assert new_mask[~dropped].all()
    for rate in (0.0, 1.0):
        none_or_all, _ = drop(rate)
        assert (none_or_all == (empty_ids if rate else ids)).all()


def test_eps_mse_of_one_guess_is_equal_where_the_noise_is():
    """A guess of the clean latents scores the same on flow as on scaled_linear, at timesteps of equal noise."""
    x0, eps, times = make_batch(9)
    flow = make_schedule("flow")
    found = flow.timesteps_of(SCHEDULE.sigma(times) / SCHEDULE.alpha(times))
    scores = [
        objectives.eps_mse(0.9 * x0, x0, eps, at, schedule, prediction="x0")
        for schedule, at in ((SCHEDULE, times), (flow, found))
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


def test_the_best_constant_answer_of_flow_is_learned():
    """Clean latents c everywhere: the flow seen at s is eps - c = (x - c) / s, so c is what minimises the loss."""
    schedule, right = make_schedule("flow"), jnp.array([0.5, -1.0, 0.25])

    def loss_fn(guess, key):
        time_key, noise_key = jax.random.split(key)
        times = sample_timesteps(time_key, 64, "logit_normal", schedule)
        latents = jnp.broadcast_to(right, (64, 2, 2, 3))
        noise = jax.random.normal(noise_key, latents.shape)
        noisy = objectives.add_noise(schedule, latents, noise, times)
        output = (noisy - guess) / schedule.sigma(times)[:, None, None, None]
        losses = objectives.diffusion_loss(
            output, latents, noise, times, schedule, prediction="flow", weighting="min_snr"
        )
        return losses.mean()

    update = jax.jit(jax.value_and_grad(loss_fn))
    guess, losses = jnp.zeros(3), []
    for step in range(60):
        loss, grads = update(guess, jax.random.key(step))
        guess -= 0.5 * grads
        losses.append(float(loss))
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose(guess, right, atol=0.02)


def test_eps_is_refused_where_no_signal_is_left():
    for schedule in (make_schedule("cosine", zero_snr=True), make_schedule("flow")):
        with pytest.raises(
            UserError, match="'eps' does not determine the latents where no signal is left"
        ) as error:
            check_prediction("eps", schedule)
        assert "\n" not in str(error.value)
        for prediction in set(PREDICTIONS) - {"eps"}:
            check_prediction(prediction, schedule)
    check_prediction("eps", SCHEDULE)


def test_unknown_names_tell_the_nearest():
    x0, eps, times = make_batch(8)
    with pytest.raises(UserError, match="diffusion.prediction: unknown 'epss'; did you mean 'eps'"):
        objectives.diffusion_loss(eps, x0, eps, times, SCHEDULE, prediction="epss")
    with pytest.raises(UserError, match="diffusion.prediction: unknown 'w'"):
        objectives.eps_mse(eps, x0, eps, times, SCHEDULE, prediction="w")
    with pytest.raises(UserError, match="did you mean 'min_snr'"):
        objectives.diffusion_loss(eps, x0, eps, times, SCHEDULE, weighting="minsnr")

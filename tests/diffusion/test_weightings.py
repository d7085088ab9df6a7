"""Weights of a user's own: in whose space they hold, and the built-in ones as one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.diffusion.objectives import diffusion_loss
from scaling_dit.diffusion.predictions import PREDICTIONS, create_prediction, find_prediction, from_x0_eps
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.diffusion.weightings import create_weighting, error_ratio, loss_weight
from scaling_dit.errors import UserError

ALPHA = jnp.array([0.999, 0.8, 0.5, 0.02])
SIGMA = jnp.sqrt(1 - jnp.square(ALPHA))


class MinSnr:
    """min(snr, gamma) in x0 space, as the built-in one, written as a user would."""

    space = "x0"

    def __init__(self, gamma=5.0):
        self.gamma = gamma

    def __call__(self, alpha, sigma, timesteps):
        return jnp.minimum((alpha / sigma) ** 2, self.gamma)


class Mix:
    """x0 - eps / 2."""

    needs_signal = False

    def from_x0_eps(self, x0, eps, alpha, sigma):
        return x0 - eps / 2

    def to_x0_eps(self, value, noisy, alpha, sigma):
        eps = (noisy - alpha * value) / (sigma + alpha / 2)
        return value + eps / 2, eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weight_in_x0_space_is_scaled_to_the_prediction(prediction):
    own = create_weighting(f"{__name__}:MinSnr", {"gamma": 3.0})
    found = loss_weight(ALPHA, SIGMA, prediction, own, timesteps=jnp.zeros(4))
    np.testing.assert_allclose(found, loss_weight(ALPHA, SIGMA, prediction, "min_snr", 3.0), rtol=1e-4)


@pytest.mark.parametrize("space", PREDICTIONS)
def test_the_same_errors_weigh_the_same_whatever_is_predicted(space):
    """Outputs of four kinds that imply the same latents have the same loss, for a weight in any one space."""

    class One:
        def __call__(self, alpha, sigma, timesteps):
            return jnp.ones_like(alpha)

    one = One()
    one.space = space
    schedule, times = make_schedule("scaled_linear"), jnp.array([10, 300, 700, 990])
    x0, eps, wrong = (jax.random.normal(jax.random.key(i), (4, 2, 2, 3)) for i in range(3))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    noisy = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    wrong_x0 = x0 + 0.1 * wrong
    wrong_eps = (noisy - alpha[:, None, None, None] * wrong_x0) / sigma[:, None, None, None]
    losses = [
        diffusion_loss(
            from_x0_eps(kind, wrong_x0, wrong_eps, alpha, sigma), x0, eps, times, schedule,
            prediction=kind, weighting=one,
        )
        for kind in (*map(find_prediction, PREDICTIONS), Mix())
    ]  # fmt: skip
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=2e-3)


def test_min_snr_serves_a_prediction_of_ones_own():
    own = create_prediction(f"{__name__}:Mix", {})
    # x0 = value + eps / 2 with eps = (noisy - alpha value) / (sigma + alpha / 2): the slope of x0 in the value.
    slope = 1 - ALPHA / (2 * SIGMA + ALPHA)
    np.testing.assert_allclose(error_ratio(own, "x0", ALPHA, SIGMA), slope, rtol=1e-4)
    expected = np.minimum((ALPHA / SIGMA) ** 2, 5.0) * slope**2
    np.testing.assert_allclose(loss_weight(ALPHA, SIGMA, own, "min_snr"), expected, rtol=1e-4)


def test_ratios_of_alpha_and_sigma_stay_finite_at_both_ends():
    ends = jnp.array([0.0, 1.0])
    for prediction in ("x0", "v", "flow"):
        weight = loss_weight(ends, 1 - ends, prediction, MinSnr(), timesteps=jnp.array([1000.0, 0.0]))
        assert bool(jnp.isfinite(weight).all())


def test_names():
    assert create_weighting("min_snr", {}) == "min_snr"
    with pytest.raises(
        UserError, match="unknown config.diffusion.weighting 'minsnr'; did you mean 'min_snr'"
    ):
        create_weighting("minsnr", {})
    with pytest.raises(UserError, match=r"weighting '.*:MinSnr' has no field 'gama'; did you mean 'gamma'"):
        create_weighting(f"{__name__}:MinSnr", {"gama": 1.0})

"""Distribution of sampled timesteps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.diffusion.schedules import VariancePreserving, make_schedule
from scaling_dit.diffusion.time_sampling import TIME_SAMPLINGS, largest_timestep, sample_timesteps
from scaling_dit.errors import UserError
from tests.support.uvit_golden import run

VP, FLOW = make_schedule("scaled_linear"), make_schedule("flow")


def draw(seed, *arguments, **options):
    """Timesteps of numpy, drawn by one program."""
    return np.asarray(run(lambda key: sample_timesteps(key, *arguments, **options), jax.random.key(seed)))


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
def test_integers_in_range_and_reproducible(name):
    times = draw(0, 4096, name, VP)
    assert times.shape == (4096,)
    assert times.dtype == jnp.int32
    assert int(times.min()) >= 0 and int(times.max()) <= 999
    np.testing.assert_array_equal(times, draw(0, 4096, name, VP))
    assert not np.array_equal(times, draw(1, 4096, name, VP))


@pytest.mark.parametrize("batch", [1, 7, 64, 1000, 2048])
def test_stratified_has_one_time_in_each_stratum(batch):
    times = np.sort(draw(batch, batch, "stratified", VP))
    lower = np.floor(np.arange(batch) * 1000 / batch + 1e-6)
    upper = np.ceil(np.arange(1, batch + 1) * 1000 / batch - 1e-6)
    assert (times >= lower).all()
    assert (times <= np.minimum(upper, 999)).all()


def test_stratified_reaches_every_integer_evenly():
    """2,000 batches of 8, short of 16 timesteps: each integer is hit equally often, at any row."""
    short = VariancePreserving(np.linspace(0.9, 0.1, 16))
    keys = jax.random.split(jax.random.key(0), 2000)
    times = np.asarray(run(jax.vmap(lambda key: sample_timesteps(key, 8, "stratified", short)), keys))
    counts = np.stack([np.bincount(times[:, row], minlength=16) for row in range(8)])
    assert counts.sum() == 16_000
    # Expected 125 per row and integer, standard deviation 11.
    assert counts.min() > 125 - 55 and counts.max() < 125 + 55
    np.testing.assert_allclose(counts.sum(0), 1000, atol=110)


def test_any_shard_of_a_stratified_batch_is_unbiased():
    keys = jax.random.split(jax.random.key(1), 400)
    times = np.asarray(run(jax.vmap(lambda key: sample_timesteps(key, 32, "stratified", VP)), keys))
    for shard in (times[:, :8], times[:, 24:], times[:, 0::4], times[:, 3::4]):
        # Five standard errors.
        assert abs(shard.mean() - 499.5) < 25
    # Against 51 for independent draws.
    assert times.mean(axis=1).std() < 3


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
def test_flow_times_are_real_numbers_below_the_last(name):
    times = draw(0, 4096, name, FLOW, location=3.0, scale=4.0)
    assert times.shape == (4096,)
    assert times.dtype == jnp.float32
    # A wide logit-normal rounds to 999.99994 often.
    assert (times % 1 != 0).mean() > 0.7
    assert times.min() >= 0 and times.max() < 1000
    last = np.float32(largest_timestep(1000))
    assert last < 1000 == np.nextafter(last, np.float32(2000))


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_the_logit_of_logit_normal_times_is_normal(schedule):
    times = draw(3, 40_000, "logit_normal", schedule, location=-0.5, scale=0.8)
    assert times.dtype == (np.float32 if schedule.continuous else np.int32)
    # The middle of what was cut off.
    share = (times + (0 if schedule.continuous else 0.5)) / 1000
    logits = np.log(share / (1 - share))
    # Five standard errors.
    assert abs(logits.mean() + 0.5) < 0.02
    assert abs(logits.std() - 0.8) < 0.015
    # Closed form of a share: P(z < 0) for z normal(-0.5, 0.8) is Phi(0.625) = 0.734.
    assert abs((times < 500).mean() - 0.734) < 0.012


def test_the_shift_moves_each_draw_by_its_formula():
    shifted = make_schedule("flow", time_shift=3.0)
    for name in TIME_SAMPLINGS:
        plain = draw(5, 512, name, FLOW).astype(np.float64) / 1000
        moved = draw(5, 512, name, shifted)
        np.testing.assert_allclose(moved, 1000 * 3 * plain / (1 + 2 * plain), rtol=1e-5)


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match="did you mean 'stratified'"):
        sample_timesteps(jax.random.key(0), 4, "stratify", VP)


class Halves:
    """Timesteps of a user's own: half of them beyond both ends."""

    def __call__(self, rng, batch, schedule):
        return jnp.linspace(-0.5, 1.5, batch) * schedule.num_timesteps


def test_timesteps_of_a_users_own_stay_in_range_and_are_shifted():
    own = Halves()
    found = draw(0, 5, own, VP)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [0, 0, 500, 999, 999])
    shifted = draw(0, 5, own, make_schedule("flow", time_shift=3.0))
    np.testing.assert_allclose(shifted[:3], [0, 0, 750])
    assert shifted.dtype == jnp.float32 and float(shifted.max()) < 1000

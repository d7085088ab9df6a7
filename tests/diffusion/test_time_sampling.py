"""Distribution of sampled timesteps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.diffusion.time_sampling import TIME_SAMPLINGS, sample_timesteps
from scaling_dit.errors import UserError


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
def test_integers_in_range_and_reproducible(name):
    times = sample_timesteps(jax.random.key(0), 4096, name)
    assert times.shape == (4096,)
    assert times.dtype == jnp.int32
    assert int(times.min()) >= 0 and int(times.max()) <= 999
    np.testing.assert_array_equal(times, sample_timesteps(jax.random.key(0), 4096, name))
    assert not np.array_equal(times, sample_timesteps(jax.random.key(1), 4096, name))


@pytest.mark.parametrize("batch", [1, 7, 64, 1000, 2048])
def test_stratified_has_one_time_in_each_stratum(batch):
    times = np.sort(sample_timesteps(jax.random.key(batch), batch, "stratified"))
    lower = np.floor(np.arange(batch) * 1000 / batch + 1e-6)
    upper = np.ceil(np.arange(1, batch + 1) * 1000 / batch - 1e-6)
    assert (times >= lower).all()
    assert (times <= np.minimum(upper, 999)).all()


def test_stratified_reaches_every_integer_evenly():
    """2,000 batches of 8, short of 16 timesteps: each integer is hit equally often, at any row."""
    keys = jax.random.split(jax.random.key(0), 2000)
    times = jax.vmap(lambda key: sample_timesteps(key, 8, "stratified", num_timesteps=16))(keys)
    counts = np.stack([np.bincount(times[:, row], minlength=16) for row in range(8)])
    assert counts.sum() == 16_000
    # Expected 125 per row and integer, standard deviation 11.
    assert counts.min() > 125 - 55 and counts.max() < 125 + 55
    np.testing.assert_allclose(counts.sum(0), 1000, atol=110)


def test_any_shard_of_a_stratified_batch_is_unbiased():
    keys = jax.random.split(jax.random.key(1), 400)
    times = np.asarray(jax.vmap(lambda key: sample_timesteps(key, 32, "stratified"))(keys))
    for shard in (times[:, :8], times[:, 24:], times[:, 0::4], times[:, 3::4]):
        assert abs(shard.mean() - 499.5) < 25  # five standard errors
    assert times.mean(axis=1).std() < 3  # against 51 for independent draws


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match="did you mean 'stratified'"):
        sample_timesteps(jax.random.key(0), 4, "stratify")

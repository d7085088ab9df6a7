"""Which timesteps a training batch is noised to."""

import jax
import jax.numpy as jnp

from scaling_dit.errors import UserError, nearest

TIME_SAMPLINGS = ("uniform", "stratified")


def sample_timesteps(rng: jax.Array, batch: int, name: str, num_timesteps: int = 1000) -> jax.Array:
    """Timesteps of one global batch, int32 [batch] in 0..num_timesteps-1; each row alone is uniform.

    uniform: independent draws.
    stratified: [0, num_timesteps) is cut into `batch` equal strata and each gets one draw, which lowers the
    variance of the loss (Kingma et al. 2021, appendix I.1, with independent offsets). Strata are dealt to
    rows at random, so that any shard or microbatch is unbiased too. Draw for the whole global batch, then
    split.

    Raises:
      UserError: unknown name.
    """
    if name == "uniform":
        return jax.random.randint(rng, (batch,), 0, num_timesteps, jnp.int32)
    if name == "stratified":
        order_rng, offset_rng = jax.random.split(rng)
        strata = jax.random.permutation(order_rng, batch)
        offsets = jax.random.uniform(offset_rng, (batch,))
        times = jnp.floor((strata + offsets) * (num_timesteps / batch)).astype(jnp.int32)
        # In float32 the last stratum's upper end can round to num_timesteps.
        return jnp.minimum(times, num_timesteps - 1)
    raise UserError(f"diffusion.time_sampling: unknown {name!r}; {nearest(name, TIME_SAMPLINGS)}")

"""Which timesteps a training batch is noised to."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.components import Seam
from scaling_dit.diffusion import contract
from scaling_dit.diffusion.schedules import RectifiedFlow, Schedule, shift_time
from scaling_dit.errors import UserError, nearest

TIME_SAMPLINGS = ("uniform", "stratified", "logit_normal")
SEAM = Seam("diffusion.time_sampling", TIME_SAMPLINGS)


class TimeSampling(Protocol):
    """Timesteps of a user's own choice."""

    def __call__(self, rng: jax.Array, batch: int, schedule: Schedule) -> jax.Array:
        """Timesteps [batch] in [0, T), real numbers, T = `schedule.num_timesteps`; all chance comes from the key `rng`.

        They are drawn for the whole global batch. The program then applies the schedule's time shift, if it has one,
        and rounds them down for a schedule that is not continuous.
        """


def create_time_sampling(name: str, fields: Mapping[str, Any], schedule: Schedule) -> str | TimeSampling:
    """What `sample_timesteps` takes: the name of a built-in one as it is, a user's own made with its fields.

    Raises:
      UserError: unknown name or field, or a user's own that is none.
    """

    def check(sampling: Any, where: str) -> None:
        contract.check_time_sampling(sampling, schedule, where)

    found: str | TimeSampling = SEAM.create(name, fields, lambda: name, check)
    return found


def sample_timesteps(
    rng: jax.Array,
    batch: int,
    name: str | TimeSampling,
    schedule: Schedule,
    *,
    location: float = 0.0,
    scale: float = 1.0,
) -> jax.Array:
    """Timesteps of one global batch, [batch] in [0, T): int32, or float32 for a continuous schedule.

    uniform: independent draws.
    stratified: [0, T) is cut into `batch` equal strata and each gets one draw, which lowers the variance of the loss
    (Kingma et al. 2021, appendix I.1, with independent offsets). Strata are dealt to rows at random, so that any shard
    or microbatch is unbiased too. Draw for the whole global batch, then split.
    logit_normal: T sigmoid(z), z normal with mean `location` and standard deviation `scale` (Esser et al. 2024,
    section 3.1), more of the middle.
    A `TimeSampling`: as it says.

    The schedule's time shift, if it has one, is applied last.

    Raises:
      UserError: unknown name.
    """
    total = schedule.num_timesteps
    if not isinstance(name, str):
        return _within(jnp.maximum(jnp.asarray(name(rng, batch, schedule), jnp.float32), 0.0), schedule)
    if name == "uniform" and not schedule.continuous:
        return jax.random.randint(rng, (batch,), 0, total, jnp.int32)
    if name == "uniform":
        times = jax.random.uniform(rng, (batch,)) * total
    elif name == "stratified":
        order_rng, offset_rng = jax.random.split(rng)
        strata = jax.random.permutation(order_rng, batch)
        offsets = jax.random.uniform(offset_rng, (batch,))
        times = (strata + offsets) * (total / batch)
    elif name == "logit_normal":
        times = jax.nn.sigmoid(location + scale * jax.random.normal(rng, (batch,))) * total
    else:
        raise UserError(f"diffusion.time_sampling: unknown {name!r}; {nearest(name, TIME_SAMPLINGS)}")
    return _within(times, schedule)


def _within(times: jax.Array, schedule: Schedule) -> jax.Array:
    """Times in [0, T] shifted as the schedule says, then within [0, T) in its type."""
    total = schedule.num_timesteps
    if isinstance(schedule, RectifiedFlow):
        times = shift_time(times / total, schedule.time_shift) * total
    # In float32 the upper end can round to T.
    if schedule.continuous:
        return jnp.minimum(times, largest_timestep(total))
    return jnp.minimum(jnp.floor(times).astype(jnp.int32), total - 1)


def largest_timestep(num_timesteps: int) -> float:
    """The float32 just below T: backbones see timesteps in [0, T)."""
    return float(np.nextafter(np.float32(num_timesteps), np.float32(0)))

"""A batch or a model beyond the memory is refused with its size, before anything is allocated."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.errors import UserError
from scaling_dit.training import memory


class Program:
    """A step: images of 1,000 bytes each, split over the devices, and a state of `state` bytes on each device."""

    def __init__(self, batch, state):
        mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        self.batch = {"images": jax.ShapeDtypeStruct((batch, 1000), jnp.uint8, sharding=split)}
        self.state = {"params": jax.ShapeDtypeStruct((state,), jnp.uint8, sharding=whole)}


def test_what_fits_passes():
    memory.check_fits(800, 8, 800, Program(800, 10), memory=10 * 800 * 1000)


@pytest.mark.parametrize(
    "prefetch, rows, state, available, message",
    [
        (
            8,
            8000,
            10,
            79_000_000,
            "batch is 8000: 10 batches of 8000 rows, which this process reads ahead, take 0.1",
        ),
        (
            998,
            800,
            10,
            799_000_000,
            "1000 batches of 800 rows, which this process reads ahead, take 0.8 GB of",
        ),
        (
            1,
            8,
            10**9,
            7 * 10**9,
            "the state of the run takes 1.0 GB and its part of a batch 0.0 GB, of 0.9 GB",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_size(prefetch, rows, state, available, message):
    with pytest.raises(UserError) as error:
        memory.check_fits(8000, prefetch, rows, Program(8000, state), memory=available)
    assert message in str(error.value)


def test_the_memory_of_this_host():
    assert 2**28 < memory.host_memory() < 2**60
    assert sum(memory.device_memory(80 * 10**9).values()) == 80 * 10**9

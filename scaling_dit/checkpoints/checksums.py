"""Checksums of arrays: the same for every sharding, summed where the arrays lie.

Each element gives a number that mixes its bits with its position; a checksum is the sum of these numbers modulo 2^32,
twice with different mixing. Sums need no order, so every device sums what it holds, XLA adds the partial sums, and no
array is gathered or copied to the host. A single changed element always changes a checksum, for the mixing is one to
one; several changed elements leave it as it was once in 2^64.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

# Odd constants of the two sums: 2^32 over the golden ratio, and a prime of xxHash.
_SEEDS = (0x9E3779B9, 0x85EBCA77)


def checksums(arrays: Mapping[Any, Any]) -> dict[Any, str]:
    """The checksum of each array, 16 hexadecimal digits, under the same keys.

    All processes that hold parts of the arrays call it, and get the same.

    Args:
      arrays: jax arrays, or what `jnp.asarray` takes.
    """
    summed = {}
    for key, array in arrays.items():
        summed[key] = _sum(jnp.asarray(array))
        # Programs that do not depend on each other, each with a collective, may wait for each other for ever on CPUs,
        # whose devices share a few threads. Other devices run them in order, and sum all before any is read.
        if jax.default_backend() == "cpu":
            jax.block_until_ready(summed[key])
    return {key: "".join(f"{int(part):08x}" for part in jax.device_get(pair)) for key, pair in summed.items()}


def params_hash(arrays: Mapping[str, Any]) -> str:
    """sha256 over path, dtype, shape and checksum of each array; the same for every sharding."""
    sums = checksums(arrays)
    lines = [
        f"{name} {arrays[name].dtype} {list(arrays[name].shape)} {sums[name]}\n" for name in sorted(arrays)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.partial(jax.jit, inline=True)
def _sum(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums, uint32 []; scalars, so that they are whole on every device."""
    words = _words(array)
    first, second = (_mix(words ^ (_positions(words.shape) * jnp.uint32(seed))) for seed in _SEEDS)
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second * jnp.uint32(3) + first, dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32, with one more axis where an element has more than 32 bits."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    width = min(array.dtype.itemsize * 8, 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """The place of each element in the whole array, modulo 2^32, from 1 on; made where the element lies."""
    place = jnp.ones(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return place


def _mix(words: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, a one-to-one map of uint32."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


# Keys of the object in which a checkpoint keeps its checksums; older checkpoints hold `extra` alone.
_EXTRA, _ARRAYS, _SEAL = "extra", "arrays", "sha256"


@dataclasses.dataclass(frozen=True)
class Sealed:
    """What a checkpoint holds beside its arrays.

    Attributes:
      extra: a JSON object.
      arrays: name of an array -> its kind, such as "float32[16, 8]", and its checksum; None in a checkpoint of an
        older version, which has none.
    """

    extra: dict[str, Any]
    arrays: dict[str, tuple[str, str]] | None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object with a hash of itself."""
        content = {
            _EXTRA: self.extra,
            _ARRAYS: {name: list(pair) for name, pair in (self.arrays or {}).items()},
        }
        return content | {_SEAL: _digest(content)}

    @classmethod
    def from_json(cls, saved: Any) -> Self:
        """What `to_json` gave, or the `extra` of an older version.

        Raises:
          ValueError: it was changed since.
        """
        if not isinstance(saved, dict):
            raise ValueError("extra is no JSON object")
        # One changed bit cannot change all three names.
        if not {_EXTRA, _ARRAYS, _SEAL} & saved.keys():
            return cls(saved, None)
        content = {key: value for key, value in saved.items() if key != _SEAL}
        if saved.get(_SEAL) != _digest(content):
            raise ValueError("its checksums have changed since they were written")
        return cls(saved[_EXTRA], {name: (kind, total) for name, (kind, total) in saved[_ARRAYS].items()})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

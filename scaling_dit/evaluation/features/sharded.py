"""Runs a network over the devices of this process: rows are split, parameters whole on each, one compilation."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Sharded:
    """A pure function of parameters and arrays of B rows, which returns an array of B rows.

    Rows are computed `batch` at a time, rounded up to the number of local devices; the last ones are filled up with
    zeros. So the shapes that are compiled do not depend on how many rows a call has. Processes work by themselves: each
    scores its own parts of an evaluation.

    Args:
      function: params, array [batch, ...], ... -> array [batch, ...].
      params: numpy or jax arrays.
      batch: rows at once.
    """

    def __init__(self, function: Callable[..., jax.Array], params: Any, batch: int) -> None:
        mesh = _mesh()
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._batch = -(-batch // mesh.size) * mesh.size
        # Parameters that are there already, of `placed`, are not copied.
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._run = jax.jit(function, out_shardings=self._rows)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """The function's rows for the arrays' rows."""
        pieces = []
        for start in range(0, len(arrays[0]), self._batch):
            some = [array[start : start + self._batch] for array in arrays]
            count = len(some[0])
            filled = [
                np.concatenate([x, np.zeros((self._batch - count, *x.shape[1:]), x.dtype)]) for x in some
            ]
            placed = [jax.device_put(x, self._rows) for x in filled]
            # A TPU's default rounds factors of float32 products to bfloat16, which would show in a score.
            with jax.default_matmul_precision("float32"):
                pieces.append(np.asarray(self._run(self._params, *placed))[:count])
        return np.concatenate(pieces)


# Of the towers of one command.
@functools.lru_cache(maxsize=3)
def placed(load: Callable[..., Any], *arguments: Any) -> Any:
    """What `load` reads from a file of weights, whole on each device of this process, read once for all its users."""
    return jax.device_put(load(*arguments), NamedSharding(_mesh(), PartitionSpec()))


def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",))


class Latest:
    """A function of images that keeps its last two results: metrics that share it are given the same images in turn.

    Two, for a metric asks for the generated images of a batch and then for the real ones. Images are recognised by a
    hash of their pixels, so that results are the function's, whoever calls.

    Args:
      function: images [B, H, W, 3] -> rows [B, ...].
    """

    _KEPT = 2

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self._function = function
        self._results: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The function's rows, which must not be changed."""
        pixels = hashlib.sha256(np.ascontiguousarray(images).data).digest()
        key = (images.shape, images.dtype.str, pixels)
        found = self._results.pop(key, None)
        if found is None:
            found = self._function(images)
            found.flags.writeable = False
        self._results[key] = found
        while len(self._results) > self._KEPT:
            del self._results[next(iter(self._results))]
        return found

"""Distances between two sets of features that need all of them: KID, CMMD and MIND, in bounded memory.

Every function reads features block by block from a `FeatureTable` and computes in float64. Random choices repeat
torch-fidelity's for the same seed, so that the numbers are its numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.evaluation.features.tables import FeatureTable

# Rows [N, D] and [M, D] -> similarities [N, M].
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Values in memory at once of a kernel matrix or of projections: 32 MiB.
_AT_ONCE = 2**22
# Rows of a block of a kernel matrix.
_ROWS = 1024

# Of CMMD (arXiv 2401.09603, section 4): the bandwidth, and the factor that makes it readable.
SIGMA = 10.0
SCALE = 1000.0


def kid(one: FeatureTable, other: FeatureTable, *, subsets: int, size: int, seed: int) -> np.ndarray:
    """The unbiased squared MMD of each of `subsets` pairs of subsets: float64 [subsets] (arXiv 1801.01401).

    The kernel is (x.y / D + 1)^3. KID is the mean; the standard deviation stands beside it in papers. Memory holds two
    subsets, whatever the number of images.

    Raises:
      UserError: fewer images than a subset needs.
    """
    fewest = min(len(one), len(other))
    if not 2 <= size <= fewest:
        raise UserError(
            f"kid: subset_size is {size}, with {len(one)} images and {len(other)} of the reference; it must be from 2 "
            f"to {fewest}"
        )
    rng = np.random.RandomState(seed)
    found = np.empty(subsets)
    for i in range(subsets):
        x = one.take(rng.choice(len(one), size, replace=False)).astype(np.float64)
        y = other.take(rng.choice(len(other), size, replace=False)).astype(np.float64)
        xx, yy, xy = cubic(x, x), cubic(y, y), cubic(x, y)
        same = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        found[i] = same / (size * (size - 1)) - 2 * xy.mean()
    return found


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel of KID, (x.y / D + 1)^3, of all pairs of rows: [N, D], [M, D] -> [N, M]."""
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def cmmd(one: FeatureTable, other: FeatureTable, *, other_mean: float | None = None) -> float:
    """1000 times the biased squared MMD with the kernel exp(-|x - y|^2 / (2 10^2)) (arXiv 2401.09603, eq. 4).

    Exact: the sum over all pairs, N^2 of them. Kernel values lie near 1, and their means differ little, so that
    float64 sums of exp(...) - 1 are taken.

    Args:
      one: features of generated images; CLIP's, of length 1 each.
      other: features of the reference.
      other_mean: `kernel_mean(other, other)`, if it is known.
    """
    between = kernel_mean(other, other) if other_mean is None else other_mean
    return SCALE * (kernel_mean(one, one) + between - 2 * kernel_mean(one, other))


def kernel_mean(one: FeatureTable, other: FeatureTable) -> float:
    """The mean of exp(-|x - y|^2 / (2 10^2)) - 1 over all pairs."""
    total = 0.0
    for i, rows in enumerate(one.blocks(_ROWS)):
        x = rows.astype(np.float64)
        for j, others in enumerate(other.blocks(_ROWS)):
            # Of a set with itself half the pairs are enough.
            if one is other and j < i:
                continue
            values = nearness(x, others.astype(np.float64))
            total += float(values.sum()) * (2 if one is other and j > i else 1)
    return total / (len(one) * len(other))


def nearness(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel of CMMD minus 1, exp(-|x - y|^2 / (2 10^2)) - 1, of all pairs of rows: [N, D], [M, D] -> [N, M]."""
    # In place: one array of this size is enough.
    exponents: np.ndarray = x @ y.T
    exponents *= 2
    exponents -= (x**2).sum(1)[:, None] + (y**2).sum(1)
    exponents /= 2 * SIGMA**2
    return np.expm1(exponents, out=exponents)


def mind(one: FeatureTable, other: FeatureTable, *, directions: int, seed: int) -> float:
    """The distance of `sliced`."""
    return sliced(one, other, directions=directions, seed=seed)[0]


def sliced(one: FeatureTable, other: FeatureTable, *, directions: int, seed: int) -> tuple[float, np.ndarray]:
    """3 D times the mean over random directions of the squared difference of sorted projections (arXiv 2605.06797).

    The larger set is cut to a random subset as large as the other. Projections are sorted some directions at a time, so
    that memory holds some 4 million of them.

    Returns:
      the distance, and the influence of each image of `one` that was taken: float64 [n], see `transported`.
    """
    generator = TorchGenerator(seed)
    count = min(len(one), len(other))
    chosen = []
    for table in (one, other):
        order = generator.permutation(len(table))[:count] if len(table) > count else np.arange(count)
        # Sorting the projections makes the order of the subset irrelevant.
        chosen.append((table, np.sort(order)))
    units = generator.normal((directions, one.width)).astype(np.float64)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    some = max(1, _AT_ONCE // count)
    total, influences = 0.0, np.zeros(count)
    for start in range(0, directions, some):
        mine, theirs = (_projections(table, order, units[start : start + some]) for table, order in chosen)
        theirs.sort(axis=1)
        for projected, real in zip(mine, theirs, strict=True):
            order = np.argsort(projected)
            projected = projected[order]
            total += float(((projected - real) ** 2).mean())
            influences += transported(projected, real, order)
    factor = 3 * one.width / directions
    return factor * total, factor * influences


def transported(mine: np.ndarray, theirs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The influence of each image on the mean squared distance of sorted projections: float64 [n], images in order.

    Up to a constant it is Kantorovich's potential, whose slope at a projection x is 2 (x - T(x)), for the projection
    T(x) of the same rank (del Barrio and Loubes 2019, theorem 4.1).

    Args:
      mine: sorted projections of the generated images [n].
      theirs: sorted projections of the real ones [n].
      order: what sorted `mine`: the number of the image at each rank.
    """
    slopes = 2 * (mine - theirs)
    rises = np.diff(mine) * (slopes[1:] + slopes[:-1]) / 2
    potential = np.empty(len(mine))
    potential[order] = np.concatenate([[0.0], np.cumsum(rises)])
    return potential


def _projections(table: FeatureTable, order: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The projections of the rows `order` (ascending) on each direction: float64 [directions, rows]."""
    found = np.empty((len(units), len(order)))
    start = seen = 0
    for block in table.blocks():
        end = int(np.searchsorted(order, start + len(block)))
        rows = block[order[seen:end] - start].astype(np.float64)
        found[:, seen:end] = units @ rows.T
        start, seen = start + len(block), end
    return found


class TorchGenerator:
    """`torch.randperm` and `torch.randn` of a CPU generator with a seed, without torch.

    Both draw 32-bit words of the Mersenne Twister that numpy has too.
    """

    def __init__(self, seed: int) -> None:
        self._words: Any = np.random.RandomState(seed)

    def _draw(self, count: int) -> np.ndarray:
        return self._words.randint(0, 2**32, count, dtype=np.uint32)

    def permutation(self, count: int) -> np.ndarray:
        """`torch.randperm(count)`: int64 [count]."""
        order = np.arange(count)
        for i, word in enumerate(self._draw(max(count - 1, 0))):
            other = i + int(word) % (count - i)
            order[i], order[other] = order[other], order[i]
        return order

    def normal(self, shape: tuple[int, int]) -> np.ndarray:
        """`torch.randn(shape)` in float32, by Box and Muller's transform of 16 values at a time; at least 16 values.

        The last bits may differ from torch's, whose logarithm and cosine are its own.
        """
        count = shape[0] * shape[1]
        uniform = self._uniform(count)
        whole = count // 16 * 16
        values = np.empty(count, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            # The last 16 are drawn anew and overlap the ones before.
            values[-16:] = _box_muller(self._uniform(16))
        return values.reshape(shape)

    def _uniform(self, count: int) -> np.ndarray:
        return (self._draw(count) & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - pairs[:, 0]))
    angle = np.float32(2 * np.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

"""Intervals of distances between two sets, from what each generated image adds to the distance.

A distance d of n images moves by psi(x) / n, to first order, when one of them is replaced by x: psi is its influence
function. So the standard error of d is std(psi) / sqrt(n) (van der Vaart 1998, section 20.2). The real images count as
fixed, as they are for all models that are compared with them, and a bias that shrinks with n, such as FID's, is in the
distance and not in the interval. A bootstrap would need the distance itself hundreds of times.
"""

import numpy as np

from scaling_dit.evaluation.features import kernels
from scaling_dit.evaluation.features.moments import Gaussian
from scaling_dit.evaluation.features.tables import FeatureTable

# Images of either side that psi is estimated with: enough for two digits of a standard error.
SEEN = 4096
# Of a normal distribution, the quantile of a two-sided interval of 95 %.
_Z = 1.959963984540054
# Eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-10


def interval(distance: float, influences: np.ndarray, count: int, extra: float = 0.0) -> list[float] | None:
    """[low, high], a 95 % interval of a distance; None of a single image, which has no spread.

    Args:
      distance: of `count` generated images.
      influences: psi of some of them, float64 [m].
      count: n.
      extra: variance of the distance besides, such as that of random subsets.
    """
    if len(influences) < 2:
        return None
    error = float(np.sqrt(influences.var(ddof=1) / count + extra))
    return [distance - _Z * error, distance + _Z * error]


def kernel(
    one: FeatureTable, other: FeatureTable, seed: int, similarity: kernels.Kernel, scale: float = 1.0
) -> np.ndarray:
    """psi of a squared MMD: 2 scale (mean_j k(x, x_j) - mean_j k(x, y_j)), for at most SEEN images."""
    rng = np.random.default_rng(seed)
    x, y = _some(one, rng), _some(other, rng)
    own = similarity(x, x)
    # Not an image with itself.
    alike = (own.sum(1) - np.diagonal(own)) / max(len(x) - 1, 1)
    return 2 * scale * (alike - similarity(x, y).mean(1))


def gaussian(ours: FeatureTable, one: Gaussian, real: Gaussian, seed: int) -> np.ndarray:
    """psi of a Frechet distance, for at most SEEN images.

    2 (m1 - m2) . (x - m1) + (x - m1)^T A (x - m1) - tr(A S1), where A = I - S2^(1/2) (S2^(1/2) S1 S2^(1/2))^(-1/2)
    S2^(1/2) is the derivative with respect to S1.
    """
    values, vectors = np.linalg.eigh(real.root @ one.covariance @ real.root)
    kept = values > _ROUNDING * values[-1]
    half = real.root @ vectors[:, kept]
    derivative = np.eye(len(values)) - (half / np.sqrt(values[kept])) @ half.T
    x = _some(ours, np.random.default_rng(seed)) - one.mean
    bent = np.einsum("nd,nd->n", x @ derivative, x) - np.trace(derivative @ one.covariance)
    return 2 * x @ (one.mean - real.mean) + bent


def _some(table: FeatureTable, rng: np.random.Generator) -> np.ndarray:
    """At most SEEN random rows in their order: float64 [m, D]."""
    return table.take(np.sort(rng.permutation(len(table))[:SEEN])).astype(np.float64)

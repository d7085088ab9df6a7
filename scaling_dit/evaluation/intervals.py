"""Bootstrap intervals over images, in bounded memory."""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
# Counts in memory at once: 32 MiB. Up to some 2000 images this is all of them.
_AT_ONCE = 2**22


def resamples(count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` images is in each resample: int64 [some, count], RESAMPLES rows in all.

    The rows do not depend on how many are given at once.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(count, 1 / count)
    some = min(RESAMPLES, max(1, _AT_ONCE // count))
    for start in range(0, RESAMPLES, some):
        yield rng.multinomial(count, shares, size=min(some, RESAMPLES - start))


def percentiles(values: np.ndarray) -> list[float]:
    """[low, high] that hold 95 % of the values of all resamples."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def mean_interval(values: np.ndarray, seed: int) -> list[float]:
    """The percentile bootstrap's 95 % interval of the mean of `values` [N]."""
    means = [counts @ values / len(values) for counts in resamples(len(values), seed)]
    return percentiles(np.concatenate(means))

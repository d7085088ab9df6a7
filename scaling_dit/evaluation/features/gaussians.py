"""The result of a Frechet distance: at all images, at several numbers of them, extrapolated, with an interval."""

from typing import Any

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.evaluation.features import influence, moments
from scaling_dit.evaluation.features.moments import Gaussian, frechet
from scaling_dit.evaluation.features.tables import FeatureTable
from scaling_dit.evaluation.intervals import percentiles

# The least share of the images of which a distance is computed for the extrapolation.
_LEAST = 0.2


def check_fields(metric: str, points: int, resamples: int) -> None:
    """Checks the fields of a metric of this kind.

    Raises:
      UserError: a field out of range.
    """
    if points < 0 or points == 1:
        raise UserError(
            f"metrics.{metric}.points is {points}; it must be 0 or at least 2, to lay a line through"
        )
    if resamples < 0:
        raise UserError(f"metrics.{metric}.resamples is {resamples}; it must be 0 or more")


def compare(
    name: str, ours: FeatureTable, real: Gaussian, seed: int, *, points: int, resamples: int
) -> dict[str, Any]:
    """The result of a metric; see `metrics/fid.py` for `points` and `resamples`.

    The subsets are random, each drawn without replacement, as in arXiv 1911.07023. The distance of all images is the
    last point. Computing one costs the eigenvalues of a matrix [D, D].

    With more images than twice the features there is an interval of other generated images (`influence.py`), or with
    `resamples` a bootstrap interval. With fewer, the distance's bias is larger than what an interval would tell.
    """
    everything = np.ones(len(ours), np.int64)
    fitted = _fitted(ours, everything)
    distance = frechet(fitted, real)
    result: dict[str, Any] = {"scalars": {name: distance}}
    rng = np.random.default_rng(seed)
    if points:
        sizes = np.unique(np.linspace(max(2, _LEAST * len(ours)), len(ours), points).astype(int))
        curve = []
        for size in sizes[:-1]:
            chosen = np.zeros(len(ours), np.int64)
            chosen[rng.choice(len(ours), size, replace=False)] = 1
            curve.append((int(size), _distance(ours, chosen, real)))
        curve.append((len(ours), distance))
        result["by_number"] = [{"n": size, name: value} for size, value in curve]
        if len(curve) > 1:
            result["scalars"][f"{name}_infinity"] = moments.extrapolate(*zip(*curve, strict=True))
    if resamples:
        shares = np.full(len(ours), 1 / len(ours))
        drawn = [_distance(ours, rng.multinomial(len(ours), shares), real) for _ in range(resamples)]
        result["interval"] = percentiles(np.array(drawn))
    elif len(ours) > 2 * ours.width:
        psi = influence.gaussian(ours, fitted, real, seed)
        result["interval"] = influence.interval(distance, psi, len(ours))
    return result


def _distance(ours: FeatureTable, counts: np.ndarray, real: Gaussian) -> float:
    return frechet(_fitted(ours, counts), real)


def _fitted(ours: FeatureTable, counts: np.ndarray) -> Gaussian:
    """The Gaussian of the images, each taken as often as `counts` says."""
    state, start = moments.empty(ours.width), 0
    for block in ours.blocks():
        state = moments.merge(state, moments.of(block, counts[start : start + len(block)]))
        start += len(block)
    return Gaussian.of(state)

"""Least sums of Huber losses for many weightings of the same points at once, as a bootstrap needs."""

from collections.abc import Callable

import numpy as np

# [R, K] vectors -> (residuals of every point, [R, N]; their derivatives by each of the K values, [R, N, K]).
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Of all points of all fits in one step: what a step holds in memory grows with this, not with the study.
_MOST_RESIDUALS = 400_000
# Where no step lowers a sum any more, not even one this much shorter than a Newton step.
_SHORTEST = 1e10


def minimize(
    model: Model,
    start: np.ndarray,
    weights: np.ndarray,
    delta: float,
    tolerance: float = 1e-8,
    most_steps: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """The vector of least summed Huber loss for each row of weights, [R, K], and whether it was reached, bool [R].

    scipy's `least_squares(loss="huber")` finds the same sums (the tests compare them) one row after the other, in ten
    to twenty times the time. This is Levenberg's method with two matrices that the Huber loss has anyway: its own
    second derivative, of the residuals below `delta` alone, and that of iteratively reweighted least squares, which
    counts every residual and never overshoots. The more of the second is added, the shorter and the safer the step.
    Rows whose least sum lies in a long valley, as where a value falls towards minus infinity, may need more steps than
    they are given.

    Args:
      model: residuals and derivatives at some vectors.
      start: where all rows begin, [K].
      weights: how often each point counts, [R, N]; at least 0.
      delta: the residual from which on a loss grows linearly.
      tolerance: a row ends with the first step that lowers its sum by less than this share.
      most_steps: steps after which a row ends where it is, and counts as not reached.
    """
    rows = max(1, _MOST_RESIDUALS // max(1, weights.shape[1]))
    parts = [
        _minimize(model, start, weights[first : first + rows], delta, tolerance, most_steps)
        for first in range(0, len(weights), rows)
    ]
    if not parts:
        return np.empty((0, len(start))), np.empty(0, bool)
    vectors, reached = zip(*parts, strict=True)
    return np.concatenate(vectors), np.concatenate(reached)


def _minimize(
    model: Model, start: np.ndarray, weights: np.ndarray, delta: float, tolerance: float, most_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.tile(np.asarray(start, float), (len(weights), 1))
    residuals, slopes = model(vectors)
    sums = _sums(residuals, weights, delta)
    damping = np.full(len(weights), 1e-3)
    # Rows that are not done.
    left = np.arange(len(weights))
    for _ in range(most_steps):
        if not len(left):
            break
        steps = _steps(residuals, slopes, weights[left], delta, damping[left])
        # A step too long may overflow; its sum is then no number, and it is not taken.
        with np.errstate(over="ignore", invalid="ignore"):
            tried = vectors[left] + steps
            new_residuals, new_slopes = model(tried)
            new_sums = _sums(new_residuals, weights[left], delta)
        lower = new_sums < sums[left]
        # A step that much damping shortened says nothing of how far the least sum is.
        small = lower & (sums[left] - new_sums <= tolerance * sums[left]) & (damping[left] < 1)
        stuck = ~lower & (damping[left] > _SHORTEST)
        vectors[left[lower]], sums[left[lower]] = tried[lower], new_sums[lower]
        residuals[lower], slopes[lower] = new_residuals[lower], new_slopes[lower]
        damping[left] = np.where(lower, np.maximum(damping[left] / 5, 1e-9), damping[left] * 10)
        going = ~(small | stuck)
        left, residuals, slopes = left[going], residuals[going], slopes[going]
    reached = np.ones(len(weights), bool)
    reached[left] = False
    return vectors, reached


def _sums(residuals: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    scaled = np.abs(residuals) / delta
    return np.sum(weights * np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5), axis=1)


def _steps(
    residuals: np.ndarray, slopes: np.ndarray, weights: np.ndarray, delta: float, damping: np.ndarray
) -> np.ndarray:
    scaled = np.abs(residuals) / delta
    reweighted = weights / np.maximum(scaled, 1)
    counted = weights * (scaled <= 1) + damping[:, None] * reweighted
    transposed = slopes.transpose(0, 2, 1)
    matrix = (transposed * counted[:, None]) @ slopes
    gradient = transposed @ (reweighted * residuals)[:, :, None]
    # In units of each value's own curvature; one that no point depends on stays where it is.
    diagonal = np.diagonal(matrix, axis1=1, axis2=2)
    unit = np.sqrt(np.maximum(diagonal, 1e-30 * diagonal.max(axis=1, keepdims=True) + np.finfo(float).tiny))
    matrix = matrix / (unit[:, :, None] * unit[:, None, :]) + 1e-10 * np.eye(slopes.shape[2])
    return -(np.linalg.solve(matrix, gradient / unit[:, :, None]) / unit[:, :, None])[:, :, 0]

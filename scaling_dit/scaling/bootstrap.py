"""Resampling by run: intervals of values fitted to the points of several runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from scaling_dit.errors import UserError

LEVEL = 0.9
RESAMPLES = 200


def resample_runs(
    runs: Sequence[object] | np.ndarray | None, points: int, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Indices of points, int [M], for each bootstrap sample: whole runs are drawn with replacement.

    The points of one run (its checkpoints) share its seed and its data order, so they are not independent samples.

    Args:
      runs: the run that each point belongs to, [points]; each point is a run of its own if None.
      points: how many points there are.
      resamples: bootstrap samples to draw.
      seed: of the draws.

    Raises:
      UserError: `runs` does not name one run for each point.
    """
    rng = np.random.default_rng(seed)
    if runs is None:
        for _ in range(resamples):
            yield rng.integers(0, points, points)
        return
    if len(runs) != points:
        raise UserError(f"runs names {len(runs)} runs for {points} points; give one name for each point")
    _, inverse = np.unique(np.asarray(runs).astype(str), return_inverse=True)
    members = [np.flatnonzero(inverse == run) for run in range(inverse.max() + 1)]
    for _ in range(resamples):
        drawn = rng.integers(0, len(members), len(members))
        yield np.concatenate([members[run] for run in drawn])


def counts(samples: Iterable[np.ndarray], points: int) -> np.ndarray:
    """How often each bootstrap sample holds each point, [samples, points]."""
    return np.stack([np.bincount(indices, minlength=points) for indices in samples])


def intervals(
    found: Iterable[Mapping[str, float] | None], level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Percentile intervals, by name, of the values that were fitted to each bootstrap sample.

    None stands for a sample that cannot be fitted, such as one that holds one size only; it is left out.

    Raises:
      UserError: more than half of the samples cannot be fitted.
    """
    found = list(found)
    rows = [values for values in found if values is not None]
    if len(rows) * 2 < len(found) or not rows:
        raise UserError(
            f"{len(found) - len(rows)} of {len(found)} bootstrap samples cannot be fitted; "
            "add runs of more sizes and budgets"
        )
    tails = [50 * (1 - level), 50 * (1 + level)]
    ends = {name: np.percentile([row[name] for row in rows], tails) for name in rows[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

"""How far a fitted law may be trusted beyond its points: each size is left out, and predicted from the others."""

import dataclasses
import math

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.scaling.parametric import NoDependence, fit_parametric
from scaling_dit.scaling.points import Runs, Values, positive

# A prediction of a held-out size may be off by this share of its loss.
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Held:
    """One size left out of a fit of loss over parameters and samples, and predicted by it.

    Attributes:
      params: of the size.
      beyond: its parameters over the largest of the others; at most 1 for a size within their range.
      compute_beyond: its largest params x samples over the largest of the others.
      error: predicted over measured loss minus 1, at its most samples, the mean over runs; infinite where the
        others show no law.
    """

    params: float
    beyond: float
    compute_beyond: float
    error: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """Predictions of every size by a law that was fitted without it.

    Attributes:
      held: by rising size.
      factor: how far beyond the largest compute studied the law may be used: as far as the prediction of the largest
        size reached, if that was right within TOLERANCE; else 1.
    """

    held: tuple[Held, ...]
    factor: float


def leave_one_size_out(params: Values, samples: Values, losses: Values, runs: Runs = None) -> Audit:
    """Fits the law without each size in turn and predicts it.

    Args:
      params, samples, losses, runs: as in `fit_parametric`.

    Raises:
      UserError: fewer than three sizes, or too few points.
    """
    n, d, y = positive(params=params, samples=samples, losses=losses)
    sizes = np.unique(n)
    if len(sizes) < 3:
        raise UserError(
            f"an audit leaves one size out; the study has {len(sizes)} sizes, and it needs at least 3"
        )
    names = None if runs is None else np.asarray(runs).astype(str)
    held = []
    for size in sizes:
        out = n == size
        last = out & (d == d[out].max())
        try:
            law = fit_parametric(n[~out], d[~out], y[~out], None if names is None else names[~out])
        except NoDependence:
            error = math.inf
        else:
            error = float(law(n[last], d[last]).mean() / y[last].mean() - 1)
        compute = float((n[out] * d[out]).max() / (n[~out] * d[~out]).max())
        held.append(Held(float(size), float(size / n[~out].max()), compute, error))
    largest = held[-1]
    trusted = abs(largest.error) <= TOLERANCE
    return Audit(tuple(held), max(1.0, largest.compute_beyond) if trusted else 1.0)

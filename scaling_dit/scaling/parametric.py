"""Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): one surface of loss over parameters and samples."""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy import optimize

from scaling_dit.errors import UserError
from scaling_dit.scaling import bootstrap, huber
from scaling_dit.scaling.points import Interval, Runs, Values, positive

# Of log residuals, as in Hoffmann et al. 2022, appendix D.3.
HUBER_DELTA = 1e-3
# A term that makes less of every loss than this is not seen in the points; an exponent beyond the other is no power law
# of a loss that anyone has measured, but a step between two sizes.
LEAST_SHARE, LARGEST_EXPONENT = 1e-4, 5.0


class NoDependence(UserError):
    """The points do not show how the loss falls with parameters, or with samples."""


@dataclasses.dataclass(frozen=True)
class ParametricLaw:
    """loss = E + A / params^alpha + B / samples^beta (Hoffmann et al. 2022, equation 2).

    Attributes:
      E: loss that neither more parameters nor more samples lower.
      A, alpha: how it falls with parameters. B, beta: how it falls with samples.
      points: number of points the law rests on. error: root mean square of the log residuals.
      warnings: what a reader must know before using the law.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    points: int
    error: float
    warnings: tuple[str, ...] = ()
    _data: tuple[np.ndarray, np.ndarray, np.ndarray, Any] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def __call__(self, params: Values, samples: Values) -> np.ndarray:
        """The loss at these numbers of parameters and samples, elementwise."""
        n, d = np.asarray(params, float), np.asarray(samples, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """90 % intervals of E, A, B, alpha and beta, by bootstrap over runs."""
        return self.bootstrap()

    def bootstrap(
        self, resamples: int = bootstrap.RESAMPLES, level: float = bootstrap.LEVEL, seed: int = 0
    ) -> dict[str, Interval]:
        """Intervals of the five values from `resamples` bootstrap samples of whole runs."""
        assert self._data is not None
        n, d, losses, runs = self._data
        start = _to_vector(self.E, self.A, self.B, self.alpha, self.beta)

        counts = bootstrap.counts(bootstrap.resample_runs(runs, len(n), resamples, seed), len(n))
        can = (_different(n, counts) >= 2) & (_different(d, counts) >= 2)
        # From the fit of all points.
        vectors = iter(_refit(start, n, d, losses, counts[can]))
        return bootstrap.intervals((_from_vector(next(vectors)) if one else None for one in can), level)

    def optimum(self, compute: Values, flops_per: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """(parameters, samples) of least loss where compute = flops_per x parameters x samples."""
        budget = np.asarray(compute, float) / flops_per
        total = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / total)
        params = scale * budget ** (self.beta / total)
        return params, budget / params


def fit_parametric(params: Values, samples: Values, losses: Values, runs: Runs = None) -> ParametricLaw:
    """Approach 3: E, A, B, alpha and beta by the Huber loss of log residuals.

    For fixed exponents the law is linear in E, A and B, so a grid over the exponents with non-negative least squares
    inside finds the basin; all five are then polished together. The Huber losses are summed, not averaged: averaging
    makes optimizers stop early (Besiroglu et al. 2024, arXiv 2404.10102).

    Args:
      params: parameters of each point, [N]; positive.
      samples: training samples of each point, [N]; positive.
      losses: loss of each point, [N]; positive.
      runs: the run each point belongs to, [N]; intervals draw whole runs. Each point is a run by itself if None.

    Raises:
      UserError: fewer than six points, fewer than two sizes or sample counts, or values that are not positive numbers.
      NoDependence: the loss does not fall with one of both.
    """
    n, d, y = positive(params=params, samples=samples, losses=losses)
    if len(y) < 6:
        raise UserError(f"fit_parametric has five unknowns and {len(y)} points; give at least six")
    for name, values in (("params", n), ("samples", d)):
        if len(np.unique(values)) < 2:
            raise UserError(
                f"fit_parametric: all points have the same {name}, so its exponent cannot be fitted; "
                f"add runs of other {name}"
            )
    vector = _polish(_search(n, d, y), n, d, y)
    predicted, shares = _surface(vector, np.log(n), np.log(d))
    _check_terms(vector, shares.max(axis=1))
    fitted = _from_vector(vector)
    residuals = predicted - np.log(y)
    law = ParametricLaw(
        **fitted,
        points=len(y),
        error=float(np.sqrt(np.mean(residuals**2))),
        warnings=tuple(_parametric_warnings(fitted, n, d)),
        _data=(n, d, y, None if runs is None else np.asarray(runs).astype(str)),
    )
    return law


def _check_terms(vector: np.ndarray, shares: np.ndarray) -> None:
    """Raises NoDependence unless both terms fall with their axis and make a part of some loss.

    Where the points do not depend on an axis, the optimizer leaves its exponent anywhere.
    """
    for name, exponent, share in (("params", vector[3], shares[1]), ("samples", vector[4], shares[2])):
        if share < LEAST_SHARE or not 0 < exponent < LARGEST_EXPONENT:
            raise NoDependence(
                f"fit_parametric: the points do not show how the loss falls with {name} (exponent {exponent:.3g}, "
                f"a share of the loss of at most {share:.1g}); add runs of other {name}, or more seeds"
            )


def _parametric_warnings(fitted: dict[str, float], n: np.ndarray, d: np.ndarray) -> list[str]:
    warnings = []
    for name, values in (("params", n), ("samples", d)):
        if len(np.unique(values)) < 3:
            warnings.append(f"only two values of {name}: these points do not separate its exponent from E")
    if fitted["alpha"] < 1e-3 or fitted["beta"] < 1e-3:
        warnings.append("an exponent is near 0: the points show no dependence on that axis")
    return warnings


def _search(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A start near the best basin: exponents from a grid, then Nelder-Mead, with E, A and B solved for inside."""

    def solve(exponents: np.ndarray) -> tuple[float, np.ndarray]:
        alpha, beta = exponents
        if not (1e-3 < alpha < 3 and 1e-3 < beta < 3):
            return np.inf, np.zeros(3)
        # Scaled so that no column underflows; residuals are relative, as the logarithm's are.
        columns = np.stack([np.ones_like(n), (n / n.min()) ** -alpha, (d / d.min()) ** -beta], axis=1)
        solution, norm = optimize.nnls(columns / y[:, None], np.ones_like(y))
        return norm, solution

    grid = np.geomspace(0.03, 1.6, 13)
    best = min(((solve(np.array([a, b]))[0], a, b) for a in grid for b in grid), key=lambda row: row[0])
    found = optimize.minimize(
        lambda x: solve(x)[0],
        np.array(best[1:]),
        method="Nelder-Mead",
        options={"xatol": 1e-5, "fatol": 1e-12, "maxiter": 300},
    ).x
    alpha, beta = found
    e, a, b = solve(found)[1]
    floor = 1e-12 * y.min()
    return _to_vector(
        max(e, floor), max(a, floor) * n.min() ** alpha, max(b, floor) * d.min() ** beta, alpha, beta
    )


def _polish(start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The least summed Huber loss of log residuals from a start; vector (log E, log A, log B, alpha, beta)."""
    model = _model(n, d, y)
    return optimize.least_squares(
        lambda vector: model(vector)[0],
        start,
        jac=lambda vector: model(vector)[1],
        loss="huber",
        f_scale=HUBER_DELTA,
        x_scale="jac",
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
        max_nfev=200,
    ).x


def _refit(start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """As `_polish`, for each of several bootstrap samples, given by how often each holds each point; [R, 5]."""
    vectors, reached = huber.minimize(_model(n, d, y), start, counts, HUBER_DELTA)
    for row in np.flatnonzero(~reached):
        held = np.repeat(np.arange(len(n)), counts[row])
        vectors[row] = _polish(vectors[row], n[held], d[held], y[held])
    return vectors


def _model(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> huber.Model:
    """Log residuals at a vector, or at several, and their derivatives."""
    log_n, log_d, log_y = np.log(n), np.log(d), np.log(y)

    def model(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted, shares = _surface(vector, log_n, log_d)
        floor, by_params, by_samples = np.moveaxis(shares, -2, 0)
        slopes = [floor, by_params, by_samples, -log_n * by_params, -log_d * by_samples]
        return predicted - log_y, np.stack(slopes, axis=-1)

    return model


def _surface(vector: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logarithm of the loss, [..., points]; the share that each of the three terms has of it, [..., 3, points]).

    In logarithms, for a fit on its way may pass vectors whose terms overflow. scipy's logsumexp and softmax do the same
    in three times the time, which is most of a bootstrap's.

    Args:
      vector: log E, log A, log B, alpha and beta, [..., 5]. log_n, log_d: of each point, [points].
    """
    e, a, b, alpha, beta = np.moveaxis(np.asarray(vector)[..., None], -2, 0)
    terms = np.empty((*np.shape(vector)[:-1], 3, len(log_n)))
    terms[..., 0, :], terms[..., 1, :], terms[..., 2, :] = e, a - alpha * log_n, b - beta * log_d
    largest = terms.max(axis=-2, keepdims=True)
    parts = np.exp(terms - largest)
    total = parts.sum(axis=-2, keepdims=True)
    return (largest + np.log(total))[..., 0, :], parts / total


def _different(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many different values each sample holds, [R], by how often it holds each point, [R, N]."""
    kinds, kind = np.unique(values, return_inverse=True)
    held = np.zeros((len(counts), len(kinds)), bool)
    rows, places = np.nonzero(counts)
    held[rows, kind[places]] = True
    return held.sum(axis=1)


def _to_vector(e: float, a: float, b: float, alpha: float, beta: float) -> np.ndarray:
    # A term that a fit drives to 0 underflows, and its logarithm would be no start for another fit.
    logs = np.log(np.maximum([e, a, b], np.finfo(float).tiny))
    return np.array([*logs, alpha, beta])


def _from_vector(vector: np.ndarray) -> dict[str, float]:
    # A factor of a bootstrap sample may overflow: the end of its interval is then infinite.
    with np.errstate(over="ignore"):
        e, a, b = map(float, np.exp(vector[:3]))
    return {"E": e, "A": a, "B": b, "alpha": float(vector[3]), "beta": float(vector[4])}

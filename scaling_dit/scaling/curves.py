"""Laws of one variable: power laws, and forms that saturate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize

from scaling_dit.errors import UserError
from scaling_dit.scaling import bootstrap
from scaling_dit.scaling.points import Interval, Runs, Values, positive

_MIN_POINTS = 4


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted law y(x) of one variable.

    Attributes:
      form: "power", "floor" or "ceiling"; `power_law` and `saturating` say what they are.
      values: the fitted values by name.
      points: number of points the law rests on.
      r2: share of the variance of log y (of y for "ceiling") that the law explains.
      warnings: what a reader must know before using the law.
      span: the least and the largest x of the points.
    """

    form: str
    values: dict[str, float]
    points: int
    r2: float
    warnings: tuple[str, ...] = ()
    span: tuple[float, float] = (0.0, 0.0)
    _refit: Callable[[np.ndarray], dict[str, float] | None] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    _runs: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __call__(self, x: Values) -> np.ndarray:
        """y at these x, elementwise."""
        return _FORMS[self.form](np.asarray(x, float), **self.values)

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """90 % intervals of `values`, by bootstrap over runs."""
        return self.bootstrap()

    def band(
        self, x: Values, resamples: int = 100, level: float = bootstrap.LEVEL, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) ends of y at these x, [N] each, from bootstrap samples of whole runs."""
        assert self._refit is not None
        xs = np.asarray(x, float)
        refits = map(self._refit, bootstrap.resample_runs(self._runs, self.points, resamples, seed))
        drawn = [_FORMS[self.form](xs, **values) for values in refits if values is not None]
        low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)], axis=0)
        return low, high

    def bootstrap(
        self, resamples: int = bootstrap.RESAMPLES, level: float = bootstrap.LEVEL, seed: int = 0
    ) -> dict[str, Interval]:
        """Intervals of `values` from `resamples` bootstrap samples of whole runs."""
        assert self._refit is not None
        samples = bootstrap.resample_runs(self._runs, self.points, resamples, seed)
        return bootstrap.intervals(map(self._refit, samples), level)


def power(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """A x^b."""
    return a * x**b


def floor(x: np.ndarray, e: float, k: float, b: float) -> np.ndarray:
    """Falls to e: e + k x^-b."""
    return e + k * x**-b


def ceiling(x: np.ndarray, e: float, k: float, b: float) -> np.ndarray:
    """Rises to 1 - e: 1 - e - k x^-b."""
    return 1.0 - e - k * x**-b


_FORMS: dict[str, Callable[..., np.ndarray]] = {"power": power, "floor": floor, "ceiling": ceiling}


def power_law(x: Values, y: Values, runs: Runs = None) -> Curve:
    """y = a x^b, by least squares of log y.

    Args:
      x: parameters, samples or FLOPs of each point, [N]; positive.
      y: loss or metric of each point, [N]; positive.
      runs: the run each point belongs to, [N].

    Raises:
      UserError: fewer than four points, fewer than three different x, or values that are not positive numbers.
    """
    x, y = positive(x=x, y=y)
    _check_spread("power_law", x)
    log_x, log_y = np.log(x), np.log(y)

    def fit(indices: np.ndarray) -> dict[str, float] | None:
        if len(np.unique(x[indices])) < 2:
            return None
        b, a = np.polyfit(log_x[indices], log_y[indices], 1)
        # It may overflow in a bootstrap sample: the end of its interval is then infinite.
        with np.errstate(over="ignore"):
            return {"a": float(np.exp(a)), "b": float(b)}

    values = fit(np.arange(len(x)))
    assert values is not None
    return _made("power", values, x, log_y, np.log(power(x, **values)), fit, runs)


def saturating(x: Values, y: Values, form: str = "ceiling", runs: Runs = None) -> Curve:
    """A power law on top of a limit, which more of x cannot pass.

    "ceiling" is for a score in [0, 1], such as TIFA: y = 1 - e - k x^-b. "floor" is for a loss: y = e + k x^-b. For a
    fixed exponent both are linear, so the exponent is searched with non-negative least squares inside.

    Args:
      x: parameters, samples or FLOPs of each point, [N]; positive.
      y: score or loss of each point, [N]; positive, at most 1 for "ceiling".
      form: "ceiling" or "floor".
      runs: the run each point belongs to, [N].

    Raises:
      UserError: another form, fewer than four points, fewer than three different x, or values out of range.
    """
    if form not in ("ceiling", "floor"):
        raise UserError(f"saturating: form is {form!r}; it must be 'ceiling' or 'floor'")
    x, y = positive(x=x, y=y)
    if form == "ceiling" and (y > 1).any():
        raise UserError(f"saturating: y holds {y.max():g}; a score with form 'ceiling' must be at most 1")
    _check_spread("saturating", x)
    falling = 1.0 - y if form == "ceiling" else y
    scale = x.min()
    # Least squares over points are weighted least squares over the means of those at one x: seeds share theirs, so a
    # bootstrap of a thousand runs has few of them.
    places, place = np.unique(x, return_inverse=True)

    def fit(indices: np.ndarray) -> dict[str, float] | None:
        counts = np.bincount(place[indices], minlength=len(places))
        held = counts > 0
        if held.sum() < 3:
            return None
        totals = np.bincount(place[indices], weights=falling[indices], minlength=len(places))
        roots, at = np.sqrt(counts[held]), places[held] / scale
        target = roots * (totals[held] / counts[held])

        def solve(b: float) -> tuple[float, np.ndarray]:
            solution, norm = optimize.nnls(np.stack([roots, roots * at**-b], axis=1), target)
            return norm, solution

        grid = np.geomspace(0.01, 4.0, 25)
        near = int(np.argmin([solve(b)[0] for b in grid]))
        low, high = grid[max(near - 1, 0)], grid[min(near + 1, len(grid) - 1)]
        b = optimize.minimize_scalar(
            lambda value: solve(value)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
        ).x
        e, k = solve(b)[1]
        return {"e": float(e), "k": float(k * scale**b), "b": float(b)}

    values = fit(np.arange(len(x)))
    assert values is not None
    curve = _made(form, values, x, y, _FORMS[form](x, **values), fit, runs)
    if values["b"] < 0.011 or values["b"] > 3.9:
        warning = (
            f"the exponent {values['b']:.3g} is at the end of the range searched: the points show no bend"
        )
        curve = dataclasses.replace(curve, warnings=(*curve.warnings, warning))
    return curve


def _check_spread(name: str, x: np.ndarray) -> None:
    if len(x) < _MIN_POINTS:
        raise UserError(f"{name} has {len(x)} points; give at least {_MIN_POINTS}")
    different = len(np.unique(x))
    if different < 3:
        raise UserError(f"{name} has {different} different x; a curve needs at least 3")


def _made(
    form: str,
    values: dict[str, float],
    x: np.ndarray,
    seen: np.ndarray,
    fitted: np.ndarray,
    refit: Callable[[np.ndarray], dict[str, float] | None],
    runs: Runs,
) -> Curve:
    spread = float(np.sum((seen - seen.mean()) ** 2))
    r2 = 1.0 - float(np.sum((seen - fitted) ** 2)) / spread if spread else 1.0
    warnings = []
    if x.max() / x.min() < 4:
        warnings.append(f"x spans a factor of {x.max() / x.min():.2g} only; do not extrapolate from it")
    names = None if runs is None else np.asarray(runs).astype(str)
    span = float(x.min()), float(x.max())
    return Curve(form, values, len(x), r2, tuple(warnings), span, refit, names)

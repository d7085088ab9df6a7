"""Approaches 1 and 2 of Hoffmann et al. 2022 (arXiv 2203.15556), and frontiers of cost against value."""

import dataclasses

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.scaling.curves import Curve, power_law
from scaling_dit.scaling.points import Values, numbers, positive

# Half the width of a grid, in octaves of parameters, within which a parabola fits a profile well.
WIDEST = 1.0
# How far the middle of a grid may lie from its minimum, in octaves.
FARTHEST = 0.5
_MIN_SIZES = 3


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Least loss at each of several budgets, and how the best size grows with the budget.

    Attributes:
      budgets: FLOPs, [M]. best_params: parameters of least loss at each, [M]. best_losses: that loss, [M].
      law: best_params = a budget^b.
      warnings: budgets whose grids are wide or off the middle, where a parabola is biased.
    """

    budgets: np.ndarray
    best_params: np.ndarray
    best_losses: np.ndarray
    law: Curve
    warnings: tuple[str, ...] = ()


def isoflop(params: Values, flops: Values, losses: Values) -> IsoFlop:
    """Approach 2: at each budget a parabola of loss over log parameters, then a power law through the minima.

    A parabola fits a profile near its minimum only. On grids wider than +-1 octave, or with the minimum off the middle,
    the best size is biased even without noise where alpha and beta differ (arXiv 2603.22339): such grids are warned of.

    Args:
      params: parameters of each point, [N]. flops: training FLOPs of each point, [N]; points of one budget have equal
        values up to 1 %. losses: loss of each point, [N].

    Raises:
      UserError: fewer than three budgets of at least three sizes with a minimum among them.
    """
    n, c, y = positive(params=params, flops=flops, losses=losses)
    warnings: list[str] = []
    found = []
    for rows in _budgets(c):
        budget, sizes = float(np.exp(np.log(c[rows]).mean())), np.log2(n[rows])
        if len(np.unique(sizes)) < _MIN_SIZES:
            warnings.append(f"{budget:.3g} FLOPs: left out, it has fewer than {_MIN_SIZES} sizes")
            continue
        curvature, slope, height = np.polyfit(sizes - sizes.mean(), y[rows], 2)
        if curvature <= 0:
            warnings.append(f"{budget:.3g} FLOPs: left out, its losses have no minimum")
            continue
        shift = -slope / (2 * curvature)
        centre = sizes.mean() + shift
        if not sizes.min() <= centre <= sizes.max():
            warnings.append(f"{budget:.3g} FLOPs: left out, its minimum lies outside the sizes tried")
            continue
        warnings += _grid_warnings(budget, sizes, centre)
        found.append((budget, 2.0**centre, height - slope**2 / (4 * curvature)))
    if len(found) < 3:
        reasons = f" ({'; '.join(warnings)})" if warnings else ""
        raise UserError(f"isoflop has {len(found)} budgets with a minimum; it needs at least 3{reasons}")
    budgets, best, least = map(np.array, zip(*found, strict=True))
    law = power_law(budgets, best) if len(found) > 3 else _through(budgets, best)
    return IsoFlop(budgets, best, least, law, tuple(warnings))


def _through(x: np.ndarray, y: np.ndarray) -> Curve:
    """A power law through three points, which `power_law` would refuse."""
    b, a = np.polyfit(np.log(x), np.log(y), 1)
    values = {"a": float(np.exp(a)), "b": float(b)}
    return Curve("power", values, len(x), float("nan"), ("three budgets only: no interval",))


def _budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Indices of the points of each budget: values within 1 % of one another are one budget."""
    order = np.argsort(flops, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(flops[order])) > 0.01) + 1
    return np.split(order, breaks)


def _grid_warnings(budget: float, sizes: np.ndarray, centre: float) -> list[str]:
    half, off = (sizes.max() - sizes.min()) / 2, abs(sizes.max() + sizes.min() - 2 * centre) / 2
    warnings = []
    if half > WIDEST * 1.01:
        warnings.append(
            f"{budget:.3g} FLOPs: sizes span +-{half:.2g} octaves; a parabola is biased beyond +-{WIDEST:g}"
        )
    if off > FARTHEST:
        warnings.append(
            f"{budget:.3g} FLOPs: the minimum lies {off:.2g} octaves off the middle of the sizes, which biases it"
        )
    return warnings


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The least loss reached with each compute, over all runs.

    Attributes:
      points: indices of the points on the frontier, by rising FLOPs, [K].
      flops, losses, params: those points, [K].
      law: loss = a flops^b along the frontier. size_law: params = a flops^b along it.
    """

    points: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    params: np.ndarray
    law: Curve
    size_law: Curve


def envelope(flops: Values, losses: Values, params: Values) -> Envelope:
    """Approach 1: the points that no other point beats with at most as much compute, and power laws through them.

    Raises:
      UserError: fewer than four points lie on the frontier.
    """
    c, y, n = positive(flops=flops, losses=losses, params=params)
    points = pareto(c, -y)
    if len(points) < 4:
        raise UserError(
            f"envelope has {len(points)} points on the frontier; it needs at least 4: evaluate at more steps, "
            "or add budgets"
        )
    return Envelope(
        points,
        c[points],
        y[points],
        n[points],
        power_law(c[points], y[points]),
        power_law(c[points], n[points]),
    )


def pareto(cost: Values, value: Values) -> np.ndarray:
    """Indices of the points that no other beats: less cost with at least the value; by rising cost.

    Args:
      cost: the smaller the better, [N]. value: the larger the better, [N].

    Raises:
      UserError: they are no numbers, or differ in length.
    """
    costs, values = numbers("cost", cost), numbers("value", value)
    if len(costs) != len(values):
        raise UserError(f"{len(costs)} costs and {len(values)} values; give one of each for every point")
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    ahead = np.concatenate([[True], values[order][1:] > best[:-1]])
    return order[ahead]

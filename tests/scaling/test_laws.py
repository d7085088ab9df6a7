"""Laws recover what made their points, and say where they are biased or cannot be fitted."""

import time

import numpy as np
import pytest

from scaling_dit.errors import UserError
from scaling_dit.scaling import laws, parametric
from scaling_dit.scaling.bootstrap import resample_runs

# Besiroglu et al. 2024 (arXiv 2404.10102), their refit of the points of Hoffmann et al. 2022.
CHINCHILLA = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
SYMMETRIC = {"E": 1.8172, "A": 482.01, "B": 482.01, "alpha": 0.31, "beta": 0.31}
ASYMMETRIC = {"E": 1.8172, "A": 482.01, "B": 22.0, "alpha": 0.465, "beta": 0.155}


def surface(params, samples, truth=CHINCHILLA):
    return truth["E"] + truth["A"] / params ** truth["alpha"] + truth["B"] / samples ** truth["beta"]


def points(sizes=35, counts=7):
    grid = np.meshgrid(np.geomspace(4e7, 1.6e10, sizes), np.geomspace(1e9, 3e11, counts), indexing="ij")
    return (axis.ravel() for axis in grid)


@pytest.mark.parametrize("truth", [CHINCHILLA, SYMMETRIC, ASYMMETRIC])
def test_a_surface_without_noise_is_recovered(truth):
    n, d = points()
    law = laws.fit_parametric(n, d, surface(n, d, truth))
    assert {name: getattr(law, name) for name in truth} == pytest.approx(truth, rel=1e-4)
    assert law(n, d) == pytest.approx(surface(n, d, truth), rel=1e-8)
    assert law.points == 245 and law.error < 1e-8 and law.warnings == ()


def test_a_surface_is_fitted_in_a_fifth_of_a_second_and_resampled_200_times_in_five():
    n, d = points()
    losses = surface(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.005, len(n)))
    # Of the processor, at its best: other work on the machine takes its share.
    seconds = []
    for _ in range(3):
        began = time.process_time()
        law = laws.fit_parametric(n, d, surface(n, d))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.2, seconds
    law = laws.fit_parametric(n, d, losses)
    began = time.process_time()
    assert len(law.bootstrap(resamples=200)) >= 5
    assert time.process_time() - began < 5


def test_the_best_split_of_a_budget_is_the_least_on_its_line():
    n, d = points()
    law = laws.fit_parametric(n, d, surface(n, d))
    best, samples = law.optimum(6e20)
    assert best * samples * 6 == pytest.approx(6e20)
    line = best * np.geomspace(0.5, 2, 401)
    assert line[np.argmin(law(line, 1e20 / line))] == pytest.approx(best, rel=0.005)


def test_an_interval_holds_the_truth_and_widens_with_noise():
    n, d = points(12, 5)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, len(n))
    widths = []
    for scale in (0.002, 0.01):
        law = laws.fit_parametric(n, d, surface(n, d) * np.exp(scale * noise))
        found = law.bootstrap(resamples=60)
        assert found["E"][0] <= CHINCHILLA["E"] <= found["E"][1]
        widths.append(found["alpha"][1] - found["alpha"][0])
    assert widths[1] > 2 * widths[0]


def test_outliers_do_not_move_the_surface():
    n, d = points(12, 5)
    losses = surface(n, d)
    losses[[3, 30]] *= 1.5
    assert laws.fit_parametric(n, d, losses).alpha == pytest.approx(CHINCHILLA["alpha"], rel=0.02)


def test_runs_are_drawn_whole():
    runs = np.repeat(["a", "b", "c"], [1, 2, 3])
    sizes = set()
    for indices in resample_runs(runs, 6, resamples=50):
        drawn = runs[indices]
        sizes.add(len(drawn))
        for name, count in (("a", 1), ("b", 2), ("c", 3)):
            assert (drawn == name).sum() % count == 0
    assert len(sizes) > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1e6] * 6, range(1, 7), [3.0] * 6), "all points have the same params"),
        ((range(1, 7), [1e6] * 6, [3.0] * 6), "all points have the same samples"),
        ((range(1, 6), range(1, 6), [3.0] * 5), "five unknowns and 5 points"),
        ((range(1, 7), range(1, 7), [3, 3, 3, float("nan"), 3, 3]), r"losses\[3\] is nan"),
        ((range(0, 6), range(1, 7), [3.0] * 6), r"params\[0\] is 0"),
        ((range(1, 7), range(1, 8), [3.0] * 6), "differ in number"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        laws.fit_parametric(*map(list, arguments))


@pytest.mark.parametrize("missing", ["params", "samples"])
@pytest.mark.parametrize("against", [0.0, 0.3])
def test_points_that_do_not_fall_with_an_axis_give_no_law(missing, against):
    """Losses that stay on one axis, or rise along it, as those of too short runs of larger models do."""
    n, d = np.repeat([4e5, 1e6], 8), np.tile(np.geomspace(1e3, 6e4, 8), 2)
    other, own = (d, n) if missing == "params" else (n, d)
    losses = (0.01 + 30 * other**-0.5) * (own / own.min()) ** against
    with pytest.raises(UserError, match=f"do not show how the loss falls with {missing}"):
        laws.fit_parametric(n, d, losses)


def test_a_fit_that_passes_terms_that_overflow_is_silent():
    start = np.array([0.0, 5000.0, 1.0, 0.5, 0.5])
    with np.errstate(over="raise"):
        found = parametric._polish(start, *np.array([[1e5, 1e6, 1e7], [1e3, 1e4, 1e5], [3.0, 2.0, 1.0]]))
    assert np.isfinite(found).all()


def test_few_sizes_are_warned_of():
    n, d = np.repeat([1e7, 1e8], 4), np.tile(np.geomspace(1e6, 1e9, 4), 2)
    law = laws.fit_parametric(n, d, surface(n, d))
    assert any("only two values of params" in warning for warning in law.warnings)


def iso_points(truth, half, off=0.0, sizes=9):
    """Points of seven budgets on grids of `half` octaves around the best size times 2^off."""
    law = laws.ParametricLaw(**truth, points=0, error=0)
    budgets = np.geomspace(1e18, 1e21, 7)
    best, _ = law.optimum(budgets)
    rows = [
        (size, budget, float(law(size, budget / 6 / size)))
        for budget, middle in zip(budgets, best, strict=True)
        for size in middle * 2 ** (off + np.linspace(-half, half, sizes))
    ]
    return (*map(np.array, zip(*rows, strict=True)), best)


@pytest.mark.parametrize("truth", [CHINCHILLA, SYMMETRIC, ASYMMETRIC])
def test_isoflop_agrees_with_the_surface_on_grids_of_one_octave(truth):
    n, c, y, best = iso_points(truth, half=1.0)
    found = laws.isoflop(n, c, y)
    assert found.best_params == pytest.approx(best, rel=0.02)
    assert found.warnings == ()
    fitted = laws.fit_parametric(n, c / 6 / n, y)
    assert found.best_params == pytest.approx(fitted.optimum(found.budgets)[0], rel=0.02)


def test_isoflop_is_biased_by_a_third_on_wide_grids_of_an_asymmetric_surface_and_says_so():
    """Measured for arXiv 2603.22339's surface: the best size at the top budget comes out 1.328 times too large."""
    n, c, y, best = iso_points(ASYMMETRIC, half=4.0)
    found = laws.isoflop(n, c, y)
    assert found.best_params[-1] / best[-1] == pytest.approx(1.328, abs=0.01)
    assert len([warning for warning in found.warnings if "octaves; a parabola is biased" in warning]) == 7
    off = laws.isoflop(*iso_points(ASYMMETRIC, half=1.0, off=0.8)[:3])
    assert any("off the middle" in warning for warning in off.warnings)


def test_isoflop_refuses_budgets_without_a_minimum():
    n = np.tile([1e7, 2e7, 4e7], 4)
    c = np.repeat(np.geomspace(1e15, 1e18, 4), 3)
    with pytest.raises(UserError, match="isoflop has 0 budgets with a minimum.*outside the sizes|no minimum"):
        laws.isoflop(n, c, 3.0 - 1e-9 * n)


def test_the_envelope_follows_the_best_runs():
    n, d = points(40, 40)
    c = 6 * n * d
    found = laws.envelope(c, surface(n, d), n)
    law = laws.ParametricLaw(**CHINCHILLA, points=0, error=0)
    inside = (found.flops > 1e19) & (found.flops < 1e21)
    least = law(*law.optimum(found.flops[inside]))
    assert (found.losses[inside] >= least - 1e-9).all()
    assert found.losses[inside] == pytest.approx(least, rel=0.01)
    assert found.size_law.values["b"] == pytest.approx(
        CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"]), abs=0.06
    )


def test_the_frontier_holds_what_nothing_beats():
    cost, value = [3, 1, 2, 2, 4], [5.0, 1.0, 3.0, 2.0, 5.0]
    assert laws.pareto(cost, value).tolist() == [1, 2, 0]


def test_a_power_law_is_recovered():
    x = np.geomspace(1e6, 1e9, 8)
    law = laws.power_law(x, 0.47 * x**0.02)
    assert law.values == pytest.approx({"a": 0.47, "b": 0.02})
    assert law(1e12) == pytest.approx(0.47 * 1e12**0.02)
    assert law.r2 == pytest.approx(1)
    low, high = law.intervals["b"]
    assert low == pytest.approx(0.02) and high == pytest.approx(0.02)


@pytest.mark.parametrize("form, limit", [("ceiling", 0.15), ("floor", 1.4)])
def test_a_saturating_law_is_recovered(form, limit):
    x = np.geomspace(1e6, 1e9, 12)
    y = limit + 40 * x**-0.3
    y = 1 - y if form == "ceiling" else y
    law = laws.saturating(x, y, form)
    assert law.values == pytest.approx({"e": limit, "k": 40, "b": 0.3}, rel=1e-3)
    assert law(x) == pytest.approx(y)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: laws.power_law([1, 2, 3], [1, 2, 3]), "3 points; give at least 4"),
        (lambda: laws.power_law([1, 1, 2, 2], [1, 1, 2, 2]), "2 different x"),
        (lambda: laws.saturating([1, 2, 3, 4], [0.5, 0.6, 0.7, 1.2]), "at most 1"),
        (lambda: laws.saturating([1, 2, 3, 4], [0.5, 0.6, 0.7, 0.8], "log"), "'ceiling' or 'floor'"),
        (lambda: laws.envelope([1, 2, 3], [3, 2, 1], [1, 1, 1]), "3 points on the frontier"),
        (lambda: list(resample_runs(["a"], 2)), "names 1 runs for 2 points"),
    ],
)
def test_other_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_narrow_range_is_warned_of():
    law = laws.power_law([1, 1.5, 2, 3], [1, 2, 3, 4])
    assert any("do not extrapolate" in warning for warning in law.warnings)

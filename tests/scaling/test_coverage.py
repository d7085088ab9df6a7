"""Intervals hold the truth as often as they say, over simulated studies."""

import numpy as np
import pytest

from scaling_dit.scaling import laws
from tests.support import simulated_study

LAW = simulated_study.LAW
STUDIES = 200


@pytest.mark.slow
def test_the_90_percent_interval_holds_the_truth_in_85_to_95_percent_of_studies():
    """200 studies of 60 runs, 3 points each, whose noise is shared by the points of a run."""
    rng = np.random.default_rng(0)
    sizes = np.tile(np.geomspace(1e5, 3e6, 10), 6)
    n, runs = np.repeat(sizes, 3), np.repeat(np.arange(60), 3)
    d = np.tile([1e4, 4e4, 16e4], 60) * np.repeat(2.0 ** rng.integers(0, 4, 60), 3)
    inside = {"alpha": 0, "loss": 0}
    for study in range(STUDIES):
        noise = np.repeat(rng.normal(0, 0.01, 60), 3) + rng.normal(0, 0.003, 180)
        law = laws.fit_parametric(n, d, simulated_study.loss(n, d) * np.exp(noise), runs)
        # Fewer than by default, for time.
        low, high = law.bootstrap(resamples=60, seed=study)["alpha"]
        inside["alpha"] += low <= LAW["alpha"] <= high
        curve = laws.power_law(n, 3 * n**-0.2 * np.exp(noise), runs)
        low, high = curve.bootstrap(seed=study)["b"]
        inside["loss"] += low <= -0.2 <= high
    print(inside)
    for name, count in inside.items():
        assert 0.85 <= count / STUDIES <= 0.95, (name, count)

"""Differences of means with what belongs beside them: interval, p-value, the smallest difference that would show."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from scaling_dit.evaluation.intervals import percentiles, resamples

_POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of means, by Student's t.

    Attributes:
      effect: the difference. error: its standard error. freedom: degrees of freedom of the error.
    """

    effect: float
    error: float
    freedom: float

    @classmethod
    def paired(cls, a: np.ndarray, b: np.ndarray) -> "Difference":
        """Mean of a - b, [N] each, whose elements belong together; N from 2."""
        differences = a - b
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        return cls(float(differences.mean()), error, len(differences) - 1.0)

    @classmethod
    def welch(cls, a: np.ndarray, b: np.ndarray) -> "Difference":
        """Mean of a minus mean of b, of independent values that may vary by different amounts; from 2 of each."""
        shares = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        total = float(sum(shares))
        parts = shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1)
        freedom = total**2 / parts if parts > 0 else len(a) + len(b) - 2.0
        return cls(float(a.mean() - b.mean()), math.sqrt(total), float(freedom))

    def p(self, margin: float = 0.0) -> float:
        """Two-sided p-value of the effect being `margin`."""
        distance = abs(self.effect - margin)
        if self.error == 0:
            return 1.0 if distance == 0 else 0.0
        return float(2 * stats.t.sf(distance / self.error, self.freedom))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of the effect."""
        reach = self.error * float(stats.t.ppf((1 + level) / 2, self.freedom))
        return self.effect - reach, self.effect + reach

    def detectable(self, level: float = 0.95) -> float:
        """The smallest true difference that would show at this level with 80 % power."""
        critical, power = stats.t.ppf([(1 + level) / 2, _POWER], self.freedom)
        return self.error * float(critical + power)


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """A paired difference of means, by the bootstrap over pairs.

    Attributes:
      effect: mean of a minus mean of b.
      interval: of the effect, 95 %, percentiles.
      p: two-sided, of the effect being 0; the smallest is 2 / (resamples + 1).
      detectable: the smallest true difference that would show with 80 % power, before any correction.
      n: pairs.
    """

    effect: float
    interval: tuple[float, float]
    p: float
    detectable: float
    n: int


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Bootstrap:
    """The difference of the means of a and b, [N] each, whose elements belong together; N from 2."""
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n = len(differences)
    means = np.concatenate([counts @ differences / n for counts in resamples(n, seed)])
    low, high = percentiles(means)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(means) + 1))
    detectable = Difference.paired(np.asarray(a, np.float64), np.asarray(b, np.float64)).detectable()
    return Bootstrap(float(differences.mean()), (low, high), p, detectable, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being asked together (Holm 1979): each compares with the level as it stands."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * (len(p) - np.arange(len(p)))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in corrected]

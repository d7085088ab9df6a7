"""Claims about members of a study, answered from several training seeds.

A claim is written down before its runs: "the metric of A minus the metric of B is more than `margin`". It is answered
supported, refuted or undecided, with the effect, its interval, the smallest difference that these runs could have
detected, and a p-value corrected for the number of claims (Holm 1979). The unit is the training seed: prompts and
generation seeds make the value of one run more precise, but only other training seeds show how much training varies
(arXiv 2606.20536).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.differences import Difference, holm

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """The metric of member `a` minus the metric of member `b` is more than `margin`.

    Attributes:
      name: the claim in words, for the report.
      a, b: names of members.
      margin: what the difference must exceed, in units of the metric; 0 claims that A is better at all.
      paired: whether run i of `a` and run i of `b` share their seed and data order, so that what the seed changes in
        both cancels. Only then are the two compared run by run.
      metric: the column of the study's table that is compared, or a metric, which stands for its first scalar; "" is
        the study's first metric.

    Raises:
      UserError: a field of another type, no name, or a margin that is not finite.
    """

    name: str
    a: str
    b: str
    margin: float = 0.0
    paired: bool = False
    metric: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"a claim has the name {self.name!r}; give what it claims, in words")
        for field in ("a", "b", "metric"):
            if not isinstance(value := getattr(self, field), str):
                raise UserError(f"claim {self.name!r}: {field} is {value!r}; give a text")
        margin = self.margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise UserError(f"claim {self.name!r}: margin is {margin!r}; give a finite number")
        if not isinstance(self.paired, bool):
            raise UserError(f"claim {self.name!r}: paired is {self.paired!r}; give True or False")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the runs say about a claim.

    Attributes:
      verdict: "supported", "refuted" or "undecided" at the level of `answer`, after Holm's correction.
      effect: mean of A minus mean of B. interval: of the effect, without correction.
      detectable: the smallest difference beyond `margin` that these runs would have detected with 80 % power, before
        correction.
      p: two-sided p-value of the effect being `margin`. p_holm: corrected for all claims answered together.
      seeds: number of training seeds of A and of B.
    """

    claim: Claim
    verdict: str
    effect: float
    interval: tuple[float, float]
    detectable: float
    p: float
    p_holm: float
    seeds: tuple[int, int]


def answer(
    claims: Sequence[Claim], values: Mapping[str, Sequence[float]], level: float = 0.95
) -> list[Answer]:
    """Answers claims that belong together, in their order.

    Args:
      claims: registered before the runs.
      values: member -> the metric of each of its training seeds.
      level: of intervals and of the family of claims: all claims of a family without any true effect are undecided
        with at least this probability.

    Raises:
      UserError: a member without values, fewer than two seeds, or pairs that do not match.
    """
    tests = [_difference(claim, values) for claim in claims]
    p_values = [test.p(claim.margin) for claim, (test, _) in zip(claims, tests, strict=True)]
    answers = []
    for claim, (test, seeds), p, p_holm in zip(claims, tests, p_values, holm(p_values), strict=True):
        verdict = UNDECIDED
        if p_holm <= 1.0 - level:
            verdict = SUPPORTED if test.effect > claim.margin else REFUTED
        interval, detectable = test.interval(level), test.detectable(level)
        answers.append(Answer(claim, verdict, test.effect, interval, detectable, p, p_holm, seeds))
    return answers


def _difference(claim: Claim, values: Mapping[str, Sequence[float]]) -> tuple[Difference, tuple[int, int]]:
    """A claim's difference, and the number of training seeds of A and of B."""
    a, b = (_runs(claim, name, values) for name in (claim.a, claim.b))
    if not claim.paired:
        return Difference.welch(a, b), (len(a), len(b))
    if len(a) != len(b):
        raise UserError(
            f"claim {claim.name!r} pairs runs, but {claim.a} has {len(a)} seeds and {claim.b} {len(b)}"
        )
    return Difference.paired(a, b), (len(a), len(b))


def _runs(claim: Claim, name: str, values: Mapping[str, Sequence[float]]) -> np.ndarray:
    if name not in values:
        raise UserError(f"claim {claim.name!r} names member {name!r}; {nearest(name, values)}")
    runs = np.asarray(values[name], float)
    if len(runs) < 2:
        raise UserError(
            f"claim {claim.name!r}: member {name!r} has {len(runs)} training seed(s); a claim needs at least 2"
        )
    if not np.isfinite(runs).all():
        raise UserError(f"claim {claim.name!r}: member {name!r} has a value that is not finite")
    return runs


def power(difference: float, spread: float, seeds: int, level: float = 0.95) -> float:
    """The probability that a true difference of two members is detected, before any correction.

    Args:
      difference: of the means. spread: standard deviation of training seeds, the same in both. seeds: of each member.

    Raises:
      UserError: fewer than two seeds, or a spread that is not above 0.
    """
    if seeds < 2 or not spread > 0:
        raise UserError(f"power needs at least 2 seeds and a spread above 0, got {seeds} and {spread:g}")
    freedom = 2 * seeds - 2
    shift = abs(difference) / (spread * math.sqrt(2 / seeds))
    critical = float(stats.t.ppf((1 + level) / 2, freedom))
    # Far out scipy's tail on the wrong side is nan where it is below 1e-20.
    wrong = np.nan_to_num(stats.nct.cdf(-critical, freedom, shift), nan=0.0)
    return min(1.0, float(stats.nct.sf(critical, freedom, shift) + wrong))


@dataclasses.dataclass(frozen=True)
class VarianceComponents:
    """Where the variance of a metric comes from.

    Attributes:
      training: variance among training seeds. generation: variance among generation seeds of one training run.
      training_interval: 90 % interval of `training` (Satterthwaite's approximation, negative values cut to 0).
    """

    training: float
    generation: float
    training_interval: tuple[float, float]


def variance_components(
    values: Sequence[Sequence[float]] | np.ndarray, level: float = 0.9
) -> VarianceComponents:
    """One-way random effects: values [N training seeds, K generation seeds].

    Raises:
      UserError: fewer than two of either.
    """
    table = np.asarray(values, float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise UserError(
            f"variance components need at least 2 training seeds x 2 generation seeds, got shape {table.shape}"
        )
    seeds, repeats = table.shape
    among = repeats * float(table.mean(axis=1).var(ddof=1))
    within = float(table.var(axis=1, ddof=1).mean())
    difference = (among - within) / repeats
    tails = (1 - level) / 2, (1 + level) / 2
    freedom = seeds - 1
    # Of the mean square among runs; the part of generation is known far better and taken as it is.
    ends = [max(0.0, (among * freedom / stats.chi2.ppf(q, freedom) - within) / repeats) for q in tails[::-1]]
    return VarianceComponents(max(0.0, difference), within, (float(ends[0]), float(ends[1])))


@dataclasses.dataclass(frozen=True)
class RankStability:
    """How sure an order of members is.

    Attributes:
      order: members from best to worst by their mean.
      above: above[i][j] is the probability that order[i] is truly above order[j], by bootstrap over seeds.
      tau: mean Kendall's tau between the order of the means and the order in each bootstrap sample, and its interval.
    """

    order: tuple[str, ...]
    above: np.ndarray
    tau: float
    interval: tuple[float, float]


def rank_stability(
    values: Mapping[str, Sequence[float]], resamples: int = 1000, level: float = 0.9, seed: int = 0
) -> RankStability:
    """How the order of members by a metric (more is better) varies over training seeds.

    Raises:
      UserError: fewer than two members, or one with fewer than two seeds.
    """
    if len(values) < 2:
        raise UserError(f"rank_stability has {len(values)} member(s); an order needs at least 2")
    for name, runs in values.items():
        if len(runs) < 2:
            raise UserError(
                f"rank_stability: member {name!r} has {len(runs)} training seed(s); give at least 2"
            )
    means = {name: float(np.mean(runs)) for name, runs in values.items()}
    order = tuple(sorted(means, key=lambda name: -means[name]))
    rng = np.random.default_rng(seed)
    columns = []
    for name in order:
        seen = np.asarray(values[name], float)
        columns.append(seen[rng.integers(0, len(seen), (resamples, len(seen)))].mean(axis=1))
    drawn = np.stack(columns, axis=1)
    signs = np.sign(drawn[:, :, None] - drawn[:, None, :])
    above = (signs > 0).mean(axis=0) + 0.5 * (signs == 0).mean(axis=0)
    upper = np.triu_indices(len(order), k=1)
    taus = signs[:, upper[0], upper[1]].mean(axis=1)
    low, high = np.percentile(taus, [50 * (1 - level), 50 * (1 + level)])
    return RankStability(order, above, float(taus.mean()), (float(low), float(high)))

"""Does what a study says survive the learning rate that suits each member best?

Members that begin alike, and whose configs are equal but for `optim.learning_rate`, are a sweep. One rate for all can
favour the member that it suits, so each claim and the order of members are looked at a second time with the best rate
of each sweep. The best is chosen by validation loss: chosen by the metric, it would be best on it by luck as well. A
claim about a loss has that luck, which its words say.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from scaling_dit import config as config_lib
from scaling_dit.scaling import findings, table
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.findings import Answered
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import LOSS
from scaling_dit.scaling.study import Study

RATE = "optim.learning_rate"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Members that differ in learning rate alone, of which at least two have finished.

    Attributes:
      base: the first of them in the study, which has the study's rate.
      rates: member -> rate, rising. losses: member -> mean validation loss over seeds at the last step.
    """

    base: str
    rates: Mapping[str, float]
    losses: Mapping[str, float]

    @property
    def best(self) -> str:
        """The member with the lowest loss."""
        return min(self.losses, key=lambda name: self.losses[name])

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried, so that one beyond may be better."""
        tried = [name for name in self.rates if name in self.losses]
        return self.best in (tried[0], tried[-1])


@dataclasses.dataclass(frozen=True)
class Place:
    """One member in the order at the study's rates, and in the order with every member at its best rate."""

    member: str
    own: int
    tuned: int
    sweep: Sweep | None


def sweeps(study: Study) -> list[Sweep]:
    """The sweeps of a study, in the order of its members."""
    groups: dict[str, list[Member]] = {}
    for member in study.spec.members:
        groups.setdefault(_but_rate(member), []).append(member)
    losses: dict[str, list[float]] = {}
    for row in table.last_points(study.rows):
        if row[LOSS] is not None:
            losses.setdefault(row["member"], []).append(row[LOSS])
    found = []
    for group in groups.values():
        # The first of each rate: others of it are repetitions.
        rates = {float(m.config.optim.learning_rate): m.name for m in reversed(group)}
        seen = {name: statistics.fmean(losses[name]) for name in rates.values() if name in losses}
        if len(seen) > 1:
            found.append(Sweep(group[0].name, {name: rate for rate, name in sorted(rates.items())}, seen))
    return found


def survival(study: Study, answered: Sequence[Answered]) -> dict[str, str]:
    """Claim -> whether its answer holds with each side at its best rate, in words; empty without any sweep.

    Claims at tuned rates are answered together, as those at the study's rates are.
    """
    found = sweeps(study)
    if not found:
        return {}
    best = {name: sweep.best for sweep in found for name in sweep.rates}
    claims = {one.claim.name: one.claim for one in answered}
    changed = {name: _at(claim, best) for name, claim in claims.items()}
    # A claim about two rates of one member is about the rate itself.
    same = {name for name, claim in changed.items() if claim.a == claim.b}
    asked = tuple(claims[name] if name in same else claim for name, claim in changed.items())
    again = findings.answers(dataclasses.replace(study, spec=dataclasses.replace(study.spec, claims=asked)))
    words = {}
    for before, after in zip(answered, again, strict=True):
        name = before.claim.name
        swept = [side in best for side in (before.claim.a, before.claim.b)]
        words[name] = "about the rate itself" if name in same else _words(before, after, swept)
    return words


def _words(before: Answered, after: Answered, swept: Sequence[bool]) -> str:
    if not any(swept):
        return "not known: no rates of these members were tried"
    if before.answer is None or after.answer is None:
        return "not known yet"
    claim = after.claim
    partly = "" if all(swept) else f"; rates of {claim.b if swept[0] else claim.a} were not tried"
    by_luck = ", the loss that rates were chosen by" if after.metric == LOSS else ""
    if (claim.a, claim.b) == (before.claim.a, before.claim.b):
        return f"yes: these rates are the best of those tried{partly}"
    verdict = after.answer.verdict
    holds = "yes" if verdict == before.answer.verdict else "no"
    return (
        f"{holds}: {verdict} between {claim.a} and {claim.b} "
        f"({after.answer.effect:+.3g} {after.metric}{by_luck}){partly}"
    )


def _at(claim: Claim, best: Mapping[str, str]) -> Claim:
    return dataclasses.replace(claim, a=best.get(claim.a, claim.a), b=best.get(claim.b, claim.b))


def places(study: Study, metric: str) -> tuple[list[Place], float] | None:
    """(each member's place in both orders by mean metric, Kendall's tau between the orders).

    A sweep counts as one member, named as its base. None without a sweep, or with fewer than two members that finished.
    """
    found = sweeps(study)
    if not found:
        return None
    of = {name: sweep for sweep in found for name in sweep.rates}
    sign = 1 if study.columns.lower_is_better(metric) else -1
    means = {
        one["member"]: sign * one[metric] for one in findings.by_member(study) if one.get(metric) is not None
    }
    own, tuned = {}, {}
    for member in study.spec.members:
        sweep = of.get(member.name)
        base, best = (sweep.base, sweep.best) if sweep else (member.name, member.name)
        if base in means and best in means:
            own[base], tuned[base] = means[base], means[best]
    if len(own) < 2:
        return None
    orders = [sorted(values, key=lambda name: values[name]) for values in (own, tuned)]
    rows = [Place(name, i + 1, orders[1].index(name) + 1, of.get(name)) for i, name in enumerate(orders[0])]
    tau = stats.kendalltau([row.own for row in rows], [row.tuned for row in rows]).statistic
    return rows, float(tau)


def _but_rate(member: Member) -> str:
    """The text of what a member is without its learning rate: its base, and its config."""
    fields = config_lib.flatten(member.config)
    return f"base = {member.base}\n" + "".join(
        f"{key} = {value!r}\n" for key, value in sorted(fields.items()) if key != RATE
    )

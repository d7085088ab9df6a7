"""What a study found: answers to its claims in words, the order of its members and how sure it is, means by member."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scaling_dit.scaling import claims as claims_lib
from scaling_dit.scaling import parity, table
from scaling_dit.scaling.claims import SUPPORTED, UNDECIDED, Answer, Claim, RankStability
from scaling_dit.scaling.spec import is_loss
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row

LEVEL = 0.95
# Members that an order is made of.
RANKED = 40


@dataclasses.dataclass(frozen=True)
class Answered:
    """A claim of a study with what its runs say.

    Attributes:
      claim: as registered. metric: the column it compares.
      answer: None where too few of its runs have finished.
      sentence: the answer in words.
      after: runs that had finished when the claim was registered; 0 for one made beforehand.
      lacks: whether runs have points, and none of them the score that the claim is about.
    """

    claim: Claim
    metric: str
    answer: Answer | None
    sentence: str
    after: int
    lacks: bool = False


def answers(study: Study) -> list[Answered]:
    """The study's claims, answered together: p-values are corrected for all of them."""
    spec = study.spec
    ready, waiting = [], dict[str, str]()
    values: dict[str, list[float]] = {}
    ended = collections.Counter(row["member"] for row in table.last_points(study.rows))
    for claim in spec.claims:
        metric = study.columns.named(spec.metric_of(claim))
        if study.columns.lacks(metric):
            there = ", ".join(study.columns.known)
            waiting[claim.name] = f"Not answered: no run has a score {metric!r}; there are {there}."
            continue
        finals = _finals(study.rows, metric)
        by_seed = {side: finals.get(side, {}) for side in (claim.a, claim.b)}
        shared = set(by_seed[claim.a]) & set(by_seed[claim.b])
        few = {side: found for side, found in by_seed.items() if len(found) < 2}
        if few or (claim.paired and len(shared) < 2):
            counts = " and ".join(f"{len(found)} of {side}" for side, found in by_seed.items())
            without = any(ended[side] > len(found) for side, found in by_seed.items())
            number = f" with a finite {metric}" if without else ""
            waiting[claim.name] = (
                f"Not answered yet: {counts} have finished{number}, and it needs 2 seeds of each."
            )
            continue
        keys = {}
        for side, found in by_seed.items():
            # A name of its own for each claim, because pairs hold only seeds that both sides have.
            keys[side] = f"{side} ({claim.name})"
            chosen = sorted(shared) if claim.paired else sorted(found)
            values[keys[side]] = [found[seed] for seed in chosen]
        ready.append(dataclasses.replace(claim, a=keys[claim.a], b=keys[claim.b]))
    answered = {a.claim.name: a for a in claims_lib.answer(ready, values, LEVEL)} if ready else {}
    return [
        _answered(study, claim, answered.get(claim.name), waiting.get(claim.name, ""))
        for claim in spec.claims
    ]


def _answered(study: Study, claim: Claim, answer: Answer | None, waiting: str) -> Answered:
    metric = study.columns.named(study.spec.metric_of(claim))
    after = study.registered.get(claim.name, 0)
    if answer is None:
        return Answered(claim, metric, None, waiting, after, study.columns.lacks(metric))
    answer = dataclasses.replace(answer, claim=claim)
    said = sentence(answer, metric)
    if stopped := _stopped(study, claim):
        said += f" Left out, for their loss was not finite or kept spiking: {', '.join(stopped)}."
    return Answered(claim, metric, answer, said, after)


def _stopped(study: Study, claim: Claim) -> list[str]:
    """The runs of a claim's members that ended early; without them its answer favours those that ran well."""
    return [
        f"{row['member']} seed {row['seed']}"
        for row in study.measured
        if row["status"] == table.STOPPED and row["member"] in (claim.a, claim.b)
    ]


def sentence(answer: Answer, metric: str) -> str:
    """An answer in words, with all that a reader needs to judge it."""
    claim, (low, high) = answer.claim, answer.interval
    more = "more" if answer.effect >= 0 else "less"
    asked = f", where the claim asks for more than {claim.margin:g}" if claim.margin else ""
    shown = (
        f"{claim.a} has {abs(answer.effect):.3g} {more} {metric} than {claim.b}{asked} "
        f"({LEVEL:.0%} interval of the difference {low:.3g} to {high:.3g}; {answer.seeds[0]} and {answer.seeds[1]} "
        f"training seeds; p {_p(answer.p_holm)} after Holm's correction"
    )
    if answer.verdict == UNDECIDED:
        return f"Undecided: {shown}; a difference of {answer.detectable:.3g} would have been detected)."
    return f"{answer.verdict.capitalize()}: {shown})."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def headline(study: Study, answered: Sequence[Answered]) -> str:
    """The answer to the study's question in one sentence, made from its tests.

    It begins with what has run, where the study has not ended.
    """
    ended = {(row["member"], row["seed"]) for row in table.last_points(study.rows)}
    done = len(ended)
    if not done:
        return f"No run of {study.runs} has finished yet."
    over = done + sum(row["status"] == table.STOPPED for row in study.measured)
    so_far = "" if over >= study.runs else f"So far, with {over} of {study.runs} runs finished: "
    first = next((one for one in answered if one.answer is not None), None)
    if first is not None:
        of = sum(one.answer is not None and one.answer.verdict == SUPPORTED for one in answered)
        tail = f" Of {len(answered)} claims {of} are supported." if len(answered) > 1 else ""
        name = first.claim.name
        return f"{so_far}{name[0].upper()}{name[1:]}: {first.sentence}{tail}"
    metric = study.columns.own
    ranked = ranking(study, metric)
    if ranked is None:
        return f"{done} of {study.runs} runs have finished; an order needs 2 seeds of 2 members that compare."
    low, high = ranked.interval
    compared = len(comparable(study, metric))
    count = f"{compared} members"
    if compared < len({member for member, _ in ended}):
        # The best of all may be among the others.
        count = f"the {count} that compare and have 2 seeds or more"
    order = "order" if len(ranked.order) == compared else f"order of the best {len(ranked.order)}"
    return so_far + (
        f"{ranked.order[0]} is best by {metric} of {count}, above the next with probability "
        f"{ranked.above[0, 1]:.2f}; Kendall's tau of the {order} over seeds is {ranked.tau:.2f} "
        f"(90 % interval {low:.2f} to {high:.2f})."
    )


# Numbers of seeds, and differences in spreads of a training seed, of the table of power.
POWER_SEEDS = (2, 3, 5, 8, 12)
POWER_DIFFERENCES = (0.5, 1.0, 2.0, 3.0, 4.0)


def spread(study: Study, metric: str) -> float | None:
    """Pooled standard deviation of a metric over the training seeds of a member; None without two seeds of any."""
    squares = freedom = 0.0
    for found in _finals(study.rows, metric).values():
        values = list(found.values())
        if len(values) >= 2:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom and squares else None


def power_table(study: Study, metric: str) -> tuple[float, list[tuple[float, list[float]]]] | None:
    """(spread of a training seed, [(difference, power with each of POWER_SEEDS seeds), ...]); None without a spread."""
    found = spread(study, metric)
    if found is None:
        return None
    rows = [
        (share * found, [claims_lib.power(share * found, found, seeds) for seeds in POWER_SEEDS])
        for share in POWER_DIFFERENCES
    ]
    return found, rows


def variance(study: Study) -> tuple[float, float] | None:
    """(variance among training seeds, among generation seeds) of the first metric, the mean over members.

    None without two of each: a study of several `generation_seeds` has them.
    """
    if not study.spec.metrics or len(study.spec.generation_seeds) < 2:
        return None
    metric, scalar, parts = study.spec.metrics[0], study.columns.own, []
    for member in study.spec.members:
        panel: dict[int, list[float]] = collections.defaultdict(list)
        own = float(member.config.sample.guidance)
        for row in study.scores:
            wanted = (member.name, metric, scalar, member.config.steps, own)
            if tuple(row[name] for name in ("member", "metric", "scalar", "step", "guidance")) == wanted:
                panel[row["seed"]].append(row["value"])
        full = [values for values in panel.values() if len(values) == len(study.spec.generation_seeds)]
        if len(full) >= 2:
            parts.append(claims_lib.variance_components(full))
    if not parts:
        return None
    return statistics.fmean(p.training for p in parts), statistics.fmean(p.generation for p in parts)


def comparable(study: Study, metric: str) -> dict[str, list[float]]:
    """Member -> the metric of each of its runs that have finished, of members whose values make an order.

    They have two seeds or more; by a loss only those whose losses compare.
    """
    finals = _finals(study.rows, metric)
    members = study.spec.members
    alike = parity.same_losses(members) if is_loss(metric) else {member.name for member in members}
    return {
        member.name: list(finals[member.name].values())
        for member in members
        if member.name in alike and len(finals.get(member.name, ())) >= 2
    }


def ranking(study: Study, metric: str) -> RankStability | None:
    """The order of the best RANKED of the comparable members by a metric; losses are best when low.

    None with fewer than two of them.
    """
    sign = -1.0 if study.columns.lower_is_better(metric) else 1.0
    values = {name: [sign * value for value in found] for name, found in comparable(study, metric).items()}
    # Time and memory of the bootstrap grow with the square of members.
    best = sorted(values, key=lambda name: -statistics.fmean(values[name]))[:RANKED]
    return claims_lib.rank_stability({name: values[name] for name in best}) if len(best) >= 2 else None


def left_out(study: Study, metric: str) -> str:
    """The members that have finished runs and are not in `ranking`, and why, in sentences; "" without any."""
    compared = comparable(study, metric)
    ended = {row["member"] for row in table.last_points(study.rows)}
    said = []
    if len(compared) > RANKED:
        said.append(f"Only the best {RANKED} of {len(compared)} members are ordered.")
    if others := [m.name for m in study.spec.members if m.name in ended and m.name not in compared]:
        why = "do not compare, or " * is_loss(metric)
        said.append(
            f"Left out, for they {why}have fewer than 2 seeds with a finite {metric}: {', '.join(others)}."
        )
    return " ".join(said)


def _finals(rows: Sequence[Row], metric: str) -> dict[str, dict[int, float]]:
    """Member -> seed -> the metric at the last step of each finished run."""
    found: dict[str, dict[int, float]] = {}
    for row in table.last_points(rows):
        if row.get(metric) is not None and math.isfinite(row[metric]):
            found.setdefault(row["member"], {})[row["seed"]] = row[metric]
    return found


def by_member(study: Study) -> list[dict[str, Any]]:
    """One row for each member at its last step: costs, and mean, standard deviation and number of seeds of each score.

    Keys: "member", "family", "params", "macs_total", "steps", "samples", "train_flops", "inference_flops", "seeds", and
    for each score "NAME" and "NAME_sd", None without runs (for the deviation, with fewer than two).
    """
    found = []
    last: dict[str, list[Row]] = collections.defaultdict(list)
    for row in table.last_points(study.rows):
        last[row["member"]].append(row)
    for member in study.spec.members:
        rows = last[member.name]
        if not rows:
            continue
        costs = ("family", "params", "macs_total", "steps", "samples", "train_flops", "inference_flops")
        one: dict[str, Any] = {"member": member.name} | {name: rows[0][name] for name in costs}
        one["seeds"] = len(rows)
        for name in study.columns.scores(rows):
            values = [row[name] for row in rows if row.get(name) is not None]
            one[name] = statistics.fmean(values) if values else None
            one[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(one)
    return found

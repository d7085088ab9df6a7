"""How early, and how cheaply, the order of a study's members shows: part of the training, losses, low resolution."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from scaling_dit import config as config_lib
from scaling_dit.scaling import ladder, parity
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import LOSS, is_loss, point_steps
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row

# Fewer members have no order worth a correlation.
FEWEST = 3
# What may differ between a member and the same one at another resolution.
_OF_RESOLUTION = (
    "source.preset",
    "source.image_size",
    "source.name",
    "backbone.patch",
    "backbone.base_size",
    "backbone.table_side",
    "diffusion.resolution_shift",
    "diffusion.time_shift",
    "steps",
)
Correlation = float | None


@dataclasses.dataclass(frozen=True)
class Signal:
    """How well the order of members at one share of their training predicts their order at the end.

    Each value is Spearman's rank correlation with the members' mean metric at the end, such that 1 is the same order;
    None where a mean is missing or all members are equal.

    Attributes:
      share: of the training.
      by_score: of the mean metric there. by_loss: of the mean validation loss there, the lowest first.
      by_timestep: of the validation loss at some timesteps, by its column: "loss_t0000-0199".
    """

    share: float
    by_score: Correlation
    by_loss: Correlation
    by_timestep: Mapping[str, Correlation]


def signals(study: Study) -> list[Signal]:
    """The signal at each point but the last; empty with fewer than three members."""
    by, names = _points(study), [member.name for member in study.spec.members]
    names = [name for name in names if by.get((name, 0))]
    if len(names) < FEWEST:
        return []
    metric, sign = _metric(study)
    final = [_mean(by[name, 0], metric) for name in names]
    bins = sorted({column for name in names for row in by[name, 0] for column in row if _is_bin(column)})

    def of(column: str, back: int, sign: float) -> Correlation:
        return _spearman([_signed(_mean(by[name, back], column), sign) for name in names], final)

    return [
        Signal(
            1 - back / study.spec.points,
            of(metric, back, 1.0),
            of(LOSS, back, -sign),
            {column: of(column, back, -sign) for column in bins},
        )
        for back in range(study.spec.points - 1, 0, -1)
    ]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Members that a study has at two resolutions, and how well the lower one predicts the order at the higher.

    Attributes:
      members: (at the lower, at the higher) resolution.
      flops: mean training FLOPs of a run at the lower over those at the higher resolution.
      shares: (share of the training at the lower, Spearman's rank correlation with the order at the end of the higher).
    """

    members: tuple[tuple[str, str], ...]
    flops: float
    shares: tuple[tuple[float, Correlation], ...]


def low_resolution(study: Study) -> Pairs | None:
    """The members that differ in nothing but their resolution; None with fewer than three such pairs."""
    by = _points(study)
    twins: dict[str, dict[int, Member]] = collections.defaultdict(dict)
    for member in study.spec.members:
        if by.get((member.name, 0)) and not member.base:
            twins[_without_resolution(member)][ladder.latent_side(member.config)] = member
    pairs = [(sides[min(sides)], sides[max(sides)]) for sides in twins.values() if len(sides) > 1]
    if len(pairs) < FEWEST:
        return None
    metric, _ = _metric(study)
    final = [_mean(by[high.name, 0], metric) for _, high in pairs]
    shares = [
        (
            1 - back / study.spec.points,
            _spearman([_mean(by.get((low.name, back), ()), metric) for low, _ in pairs], final),
        )
        for back in range(study.spec.points - 1, -1, -1)
    ]
    costs = [[ladder.cost(one.config).train_flops() for one in pair] for pair in pairs]
    return Pairs(
        tuple((low.name, high.name) for low, high in pairs),
        statistics.fmean(low / high for low, high in costs),
        tuple(shares),
    )


def _metric(study: Study) -> tuple[str, float]:
    """The study's own metric, and -1.0 where a lower one is better, else 1.0."""
    metric = study.columns.own
    return metric, -1.0 if study.columns.lower_is_better(metric) else 1.0


def _points(study: Study) -> dict[tuple[str, int], list[Row]]:
    """(member, points before its last) -> its rows there; counted from the end, for a short run may have fewer."""
    steps_of = {
        member.name: point_steps(member.config.steps, study.spec.points) for member in study.spec.members
    }
    by: dict[tuple[str, int], list[Row]] = collections.defaultdict(list)
    for row in study.rows:
        steps = steps_of.get(row["member"], [])
        if row["step"] in steps:
            by[row["member"], len(steps) - 1 - steps.index(row["step"])].append(row)
    return by


def _without_resolution(member: Member) -> str:
    fields = config_lib.flatten(member.config)
    return parity.identity({key: value for key, value in fields.items() if key not in _OF_RESOLUTION})


def _is_bin(column: str) -> bool:
    return column != LOSS and is_loss(column)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def _signed(value: float | None, sign: float) -> float | None:
    return None if value is None else sign * value


def _spearman(x: Sequence[float | None], y: Sequence[float | None]) -> Correlation:
    """Spearman's rank correlation; None where a value is missing, or all of one side are equal."""
    if None in x or None in y or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(stats.spearmanr(x, y).statistic)

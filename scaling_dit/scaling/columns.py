"""Which columns of a study's table are scores, and which one a metric is about.

A metric is about the first scalar of its results, whatever that is called: `digits` has `digit_accuracy`, and a
`PerImage` has the name of its class. So before its first result a metric's column is not known.
"""

import functools
from collections.abc import Sequence

from scaling_dit.evaluation.registry import is_lower_better
from scaling_dit.scaling import table
from scaling_dit.scaling.spec import LOSS, StudySpec, is_loss
from scaling_dit.scaling.table import Row


class Columns:
    """The columns of a study's table that hold scores.

    Args:
      spec: of the study.
      rows: of its table so far. scores: one for each score, see `table.run_scores`.
    """

    def __init__(self, spec: StudySpec, rows: Sequence[Row], scores: Sequence[Row]) -> None:
        self._spec, self._rows = spec, rows
        # Metric -> its scalars, the first one first.
        self._scalars: dict[str, dict[str, None]] = {}
        for row in scores:
            self._scalars.setdefault(row["metric"], {})[row["scalar"]] = None

    def of_metric(self, metric: str) -> str:
        """The column that a metric is about: its first scalar; before its first result its own name."""
        return next(iter(self._scalars.get(metric, ())), metric)

    @property
    def own(self) -> str:
        """The column that the study is about: that of its first metric, or the loss without metrics."""
        return self.of_metric(self._spec.metrics[0]) if self._spec.metrics else LOSS

    def named(self, name: str) -> str:
        """The column that a claim names: one of the table, or that of a metric."""
        return name if name in self._names else self.of_metric(name)

    def lacks(self, column: str) -> bool:
        """Whether runs have points, and none of them has this score."""
        return bool(self._rows) and column not in self._names

    @property
    def known(self) -> list[str]:
        """What a claim may be about, as far as results show: the losses and the scores, without ends of intervals."""
        return _without_ends(self._names)

    def scores(self, rows: Sequence[Row] | None = None) -> list[str]:
        """The columns of rows, of all by default, that hold scores: "loss", and each metric's scalars."""
        names = self._names if rows is None else _names(rows)
        return [LOSS, *(name for name in _without_ends(names) if not is_loss(name))]

    def lower_is_better(self, column: str) -> bool:
        """Whether a smaller value of a column is better: of a loss, and of what its metric declares."""
        if is_loss(column):
            return True
        owners = [metric for metric, names in self._scalars.items() if column in names]
        owners = owners or [m for m in self._spec.metrics if column == m or column.startswith(f"{m}_")]
        return any(is_lower_better(name) for name in owners)

    @functools.cached_property
    def _names(self) -> list[str]:
        return _names(self._rows)


def _names(rows: Sequence[Row]) -> list[str]:
    """All columns of rows but those of every table, and the groups."""
    names = table.columns_of(rows)
    return [n for n in names if n == LOSS or not (n in table.COLUMNS or n.startswith(table.GROUP))]


def _without_ends(names: Sequence[str]) -> list[str]:
    ends = {f"{name}{end}" for name in names for end in table.ENDS}
    return [name for name in names if name not in ends]

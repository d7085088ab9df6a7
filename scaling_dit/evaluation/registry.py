"""Metrics by name: their classes, and those that a config names with its fields."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Guarded
from scaling_dit.config import metrics
from scaling_dit.evaluation.metric import Metric, check_metric


class Metrics(Mapping[str, type[Metric]]):
    """Name -> class of a metric, which is imported when it is asked for: `METRICS["shapes_tifa"](baseline=False)`.

    "package.module:Name" gives a class of the user's own; iteration gives the built-in names.
    """

    def __getitem__(self, name: str) -> type[Metric]:
        """The class; raises UserError for one of the user's own that is not found or is no metric."""
        if not isinstance(name, str) or (name not in metrics.REGISTRY.known and ":" not in name):
            raise KeyError(name)
        found = metrics.REGISTRY.resolve(name)
        check_metric(found, repr(name))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(metrics.REGISTRY.known)

    def __len__(self) -> int:
        return len(metrics.REGISTRY.known)

    def __contains__(self, name: object) -> bool:
        return name in metrics.REGISTRY.known


METRICS = Metrics()


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A metric with the fields of its section.

    Attributes:
      name: as it is registered, or "package.module:Name".
      fields: all of them, the common ones included.
    """

    name: str
    metric: Metric
    fields: Mapping[str, Any]

    @property
    def section(self) -> str:
        """The name of its section and of its folder."""
        return metrics.section_of(self.name)


def choose(config: ConfigDict, names: Iterable[str]) -> list[Chosen]:
    """The metrics of these names; what `config.metrics` does not say of them has its default.

    Raises:
      UserError: no such metric, a class that is none, or two of one name.
    """
    chosen = []
    for name, fields in zip(names, metrics.sections(tuple(names)).values(), strict=True):
        fields |= config.metrics.get(metrics.section_of(name), {})
        own = {key: fields[key] for key in metrics.REGISTRY.fields(name)}
        check_metric(metrics.REGISTRY.resolve(name), repr(name))
        metric = metrics.REGISTRY.create(name, own)
        if name not in metrics.REGISTRY.known:
            metric = Guarded(metric, f"metric {name!r}")
        chosen.append(Chosen(name, metric, fields))
    return chosen

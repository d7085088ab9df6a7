"""Metrics by name, and the metrics that a config names with their fields."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Registry
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Metric, check_metric

_REGISTRY = Registry(
    "metric",
    {
        "shapes_tifa": "scaling_dit.evaluation.metrics.shapes_tifa:ShapesTifa",
        "digits": "scaling_dit.evaluation.metrics.digits:DigitAccuracy",
    },
    check=check_metric,
)
# Names that are known and stand for nothing yet, and what to take instead.
_NOT_YET = {
    "tifa": "metric 'tifa' (the published TIFA) is not available yet; the exact one on built-in scenes is 'shapes_tifa'"
}


class Metrics(Mapping[str, type[Metric]]):
    """Name -> class of a metric, which is imported when it is asked for: `METRICS["shapes_tifa"](baseline=False)`.

    "package.module:Name" gives a class of the user's own; iteration gives the built-in names.
    """

    def __getitem__(self, name: str) -> type[Metric]:
        if name not in _REGISTRY.known and ":" not in name:
            raise KeyError(name)
        return _REGISTRY.resolve(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_REGISTRY.known)

    def __len__(self) -> int:
        return len(_REGISTRY.known)

    def __contains__(self, name: object) -> bool:
        return name in _REGISTRY.known


METRICS = Metrics()

# Fields of every metric's section with their defaults. A metric that has one of them as a field of its own gives it
# another default, and is given the value.
COMMON = {
    # Steps between evaluations in training, a multiple of config.eval.every, which 0 stands for.
    "every": 0,
    # Prompts in training; 0 = config.eval.prompts.
    "prompts": 0,
    # Images that are given to the metric at once.
    "batch": 64,
}


def section_of(name: str) -> str:
    """The name of a metric's section in `config.metrics` and of its folder: for "package.module:Name" it is "Name"."""
    return name.rpartition(":")[2]


def metric_fields(name: str) -> dict[str, Any]:
    """The fields of `config.metrics.NAME` with their defaults.

    Raises:
      UserError: no such metric, or a class that is none.
    """
    if name in _NOT_YET:
        raise UserError(_NOT_YET[name])
    return COMMON | _REGISTRY.fields(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A metric with the fields of its section.

    Attributes:
      name: as it is registered, or "package.module:Name".
      fields: all of them, common ones included.
    """

    name: str
    metric: Metric
    fields: Mapping[str, Any]

    @property
    def section(self) -> str:
        """The name of its section and of its folder."""
        return section_of(self.name)


def choose(config: ConfigDict, names: Iterable[str]) -> list[Chosen]:
    """The metrics of these names, with the fields that `config.metrics` has for them.

    Raises:
      UserError: no such metric, a class that is none, two of one name, or a wrong value.
    """
    chosen: dict[str, Chosen] = {}
    for name in names:
        fields = metric_fields(name)
        section = section_of(name)
        if section in chosen:
            raise UserError(
                f"two metrics are called {section!r}: {chosen[section].name} and {name}; leave one out"
            )
        fields |= config.get("metrics", {}).get(section, {})
        _check(section, fields, config)
        own = {key: value for key, value in fields.items() if key in _REGISTRY.fields(name)}
        chosen[section] = Chosen(name, _REGISTRY.create(name, own), fields)
    return list(chosen.values())


def _check(section: str, fields: Mapping[str, Any], config: ConfigDict) -> None:
    for key, least in (("every", 0), ("prompts", 0), ("batch", 1)):
        if isinstance(fields[key], bool) or not isinstance(fields[key], int) or fields[key] < least:
            right = f"a whole number of at least {least}"
            raise UserError(f"config.metrics.{section}.{key} is {fields[key]!r}; it must be {right}")
    every = config.eval.every
    if every and fields["every"] % every:
        right = f"a multiple of config.eval.every, which is {every}, or 0 for the same"
        raise UserError(f"config.metrics.{section}.every is {fields['every']}; it must be {right}")

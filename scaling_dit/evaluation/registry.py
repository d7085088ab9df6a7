"""Metrics by name: their classes, and those that a config names with its fields."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Guarded
from scaling_dit.config import metrics
from scaling_dit.config.named import section_of
from scaling_dit.data.sources import Source
from scaling_dit.evaluation.metric import Item, Metric, check_items, check_metric
from scaling_dit.evaluation.prompt_sets import open_prompt_set
from scaling_dit.evaluation.prompt_sets.transform import transform


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
# Fields that say how a metric is computed, or when, and not what.
_NO_DIFFERENCE = ("every", "prompts", "batch")
# Built-in distances between distributions.
_LOWER_IS_BETTER = ("fid", "kid", "mind", "cmmd", "fd_dinov2")
# Built-in metrics whose scalars do not begin with the metric's name, and what they begin with.
_SCALARS = {"digits": "digit_accuracy"}


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
        """The name of its section."""
        return section_of(self.name)

    @property
    def folder(self) -> str:
        """The name of its folder of results: its section, and a hash of the fields that give other results.

        Without such fields, all at their defaults, it is the section alone.
        """
        defaults = metrics.metric_fields(self.name)
        changed = {
            key: value
            for key, value in self.fields.items()
            if key not in _NO_DIFFERENCE and value != defaults[key]
        }
        if not changed:
            return self.section
        text = json.dumps(changed, sort_keys=True, default=list)
        return f"{self.section}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of its first scalar is better."""
        return is_lower_better(self.name)

    def prompts(self, source: Source | Callable[[], Source], count: int) -> "Prompts":
        """The prompts of its section: those of the prompt set, if it names one, else the metric's own.

        Args:
          source: the run's, or what opens it where it is needed.
          count: how many; 0 for all of a prompt set. A set with fewer gives all it has.

        Raises:
          UserError: as `open_prompt_set`, `check_items`, `transform`, and `Metric.items`.
          Skipped: something that the metric needs is missing.
        """
        about: dict[str, Any] = {"prompt_set": ""}
        if self.fields["prompt_set"]:
            found = open_prompt_set(self.fields["prompt_set"])
            items, about = found.items[: count or None], found.about()
            # Of a metric that compares with real images.
            if check := getattr(self.metric, "check_items", None):
                check(items, f"prompt set {found.name}")
        else:
            items = self.metric.items(source() if callable(source) else source, count)
        originals = check_items(items, self.section)
        texts, done = transform(originals, self.fields["prompt_transform"])
        ids = (id_ for id_, _ in originals)
        return Prompts(items, list(zip(ids, texts, strict=True)), {**about, "prompt_transform": done})


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What a metric is scored on.

    Attributes:
      items: with the original prompts, by which images are scored.
      named: (id, prompt to sample) of each.
      about: the set, the hashes of its files, and the transform.
    """

    items: Sequence[Item]
    named: Sequence[tuple[str, str]]
    about: Mapping[str, Any]

    @property
    def texts(self) -> list[str]:
        """The prompt that is sampled for each."""
        return [text for _, text in self.named]


def is_lower_better(name: str) -> bool:
    """Whether a smaller value of a metric's first scalar is better; `LOWER_IS_BETTER` of a user's own class says so."""
    if ":" not in name:
        return name in _LOWER_IS_BETTER
    return bool(getattr(metrics.REGISTRY.resolve(name), "LOWER_IS_BETTER", False))


def may_have(name: str, scalar: str) -> bool:
    """Whether a metric may have a scalar of this name, or has this name itself; a user's own may have any."""
    first = _SCALARS.get(name, name)
    return ":" in name or scalar in (name, first) or scalar.startswith(f"{first}_")


def choose(config: ConfigDict, names: Iterable[str]) -> list[Chosen]:
    """The metrics of these names; what `config.metrics` does not say of them has its default.

    Raises:
      UserError: no such metric, a class that is none, or two of one name.
    """
    chosen = []
    for name, fields in zip(names, metrics.sections(tuple(names)).values(), strict=True):
        fields |= config.metrics.get(section_of(name), {})
        own = metrics.SECTIONS.own_fields(name, fields)
        check_metric(metrics.REGISTRY.resolve(name), repr(name))
        metric = metrics.REGISTRY.create(name, own)
        if name not in metrics.REGISTRY.known:
            metric = Guarded(metric, f"metric {name!r}")
        chosen.append(Chosen(name, metric, fields))
    return chosen

"""The metrics of one evaluation with their prompts, found before anything is sampled, and why some are skipped."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from scaling_dit.data.sources import Source
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation.metric import Item, Skipped
from scaling_dit.evaluation.registry import Chosen
from scaling_dit.evaluation.scoring import Scoring, together
from scaling_dit.model.build import open_source

# Prompts of held-out data where no number is given; of a published set all are taken.
_HELD_OUT = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A metric that can be scored.

    Attributes:
      prompts: (id, prompt to sample) of each item.
      about: what its result depends on besides images: fields, judge, weights, prompt set.
    """

    one: Chosen
    items: Sequence[Item]
    prompts: Sequence[tuple[str, str]]
    about: Mapping[str, Any]

    @property
    def prompts_hash(self) -> str:
        """Of ids, prompts and conditions as they are sampled: equal for metrics that can share images."""
        asked = json.dumps(list(self.prompts)).encode() + self.conditions_hash.encode()
        return hashlib.sha256(asked).hexdigest()

    @functools.cached_property
    def conditions_hash(self) -> str:
        """The sha256 of the items' conditions; "" for none. Reads all of them once."""
        return conditioned.digest(self.items)

    def scoring(self, numbers: Sequence[int] | None = None) -> Scoring:
        """The metric with its items, or with some of them."""
        items = self.items if numbers is None else [self.items[number] for number in numbers]
        return Scoring(self.one.section, self.one.metric, items, self.one.fields["batch"])


def open_jobs(
    config: ConfigDict, chosen: Sequence[Chosen], items: int | None, answers: epath.Path
) -> tuple[list[Job], dict[str, str]]:
    """The metrics that can be scored, and why each other one cannot; the same in all processes.

    Args:
      config: of the run, whose source is opened if a metric needs it.
      chosen: the metrics.
      items: prompts of each metric; None for the default.
      answers: folder in which judges' answers are kept.

    Raises:
      UserError: a metric that does not fit the data.
    """
    source = _Late(config)
    jobs: list[Job] = []
    skipped: dict[str, str] = {}
    for one in chosen:
        count = items or (0 if one.fields["prompt_set"] else _HELD_OUT)
        try:
            with together():
                prompts = one.prompts(source.open, count)
                if keep := getattr(one.metric, "keep_in", None):
                    keep(answers)
                if ready := getattr(one.metric, "ready", None):
                    ready()
                about = {"fields": as_json(one.fields), **one.metric.about(), **prompts.about}
        except Skipped as missing:
            skipped[one.name] = str(missing)
            continue
        jobs.append(Job(one, prompts.items, prompts.named, about))
    return jobs, skipped


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups that score the same images in one go, since they run one network over them (`Metric.tower`).

    A job is in the group of the first one like it; one that shares nothing is alone.
    """
    groups: dict[Hashable, list[Job]] = {}
    for number, job in enumerate(jobs):
        tower = getattr(job.one.metric, "tower", None)
        key = (tower(), job.one.fields["batch"], job.prompts_hash) if tower else number
        groups.setdefault(key, []).append(job)
    return list(groups.values())


class _Late:
    """The run's source, opened when the first metric needs it: published prompts need no data."""

    def __init__(self, config: ConfigDict) -> None:
        self._config = config
        self._source: Source | None = None

    def open(self) -> Source:
        if self._source is None:
            self._source = open_source(self._config)
        return self._source


def as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config as JSON reads them back."""
    return json.loads(json.dumps(dict(fields)))

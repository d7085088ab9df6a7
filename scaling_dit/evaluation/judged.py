"""The base of metrics that ask a judge: its fields, the questions of a batch, a second judge, and what a result says.

Judges are opened when they are first asked. A question that cannot be answered is left out and counted.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base
from scaling_dit.evaluation.metric import Batch, Item
from scaling_dit.evaluation.vqa import Asked, fill
from scaling_dit.evaluation.vqa.agreement import agreement
from scaling_dit.evaluation.vqa.answers import Answers
from scaling_dit.evaluation.vqa.panel import Panel, check_judge_named, open_judge


@dataclasses.dataclass(frozen=True)
class Judged(Base):
    """A metric with a judge; a subclass gives `update` and `result`, and names the fields in its docstring."""

    judge: str = ""
    judge_options: tuple[str, ...] = ()
    second_judge: str = ""
    second_options: tuple[str, ...] = ()
    template: str = ""
    # Not part of the config.
    kept: Answers = dataclasses.field(
        default_factory=Answers, metadata={"config": False}, compare=False, repr=False
    )

    def check_ready(self) -> None:
        """Makes sure that the judges can be opened, as far as that can be known without their networks.

        Raises:
          Skipped, UserError: as `ready`.
        """
        check_judge_named(self.judge, _options(self.judge_options))
        if self.second_judge:
            check_judge_named(self.second_judge, _options(self.second_options))

    def ready(self) -> None:
        """Opens the judges.

        Raises:
          Skipped: the weights or packages of a judge are missing.
          UserError: a judge or field that does not exist.
        """
        _ = self.panels

    def keep_in(self, folder: epath.Path) -> None:
        """Answers are read from a folder and kept there; see `vqa.answers`."""
        self.kept.keep_in(folder)

    def about(self) -> dict[str, Any]:
        """The judges, the template, and the rule for answers."""
        first, *others = self.panels
        found: dict[str, Any] = {"judge": first.identity, "template": self._template(first)}
        if others:
            found |= {
                "second_judge": others[0].identity,
                "second_template": self._template(others[0]),
            }
        return found

    @functools.cached_property
    def panels(self) -> list[Panel]:
        """The judge, and the second one if there is one."""
        found = [open_judge(self.judge, _options(self.judge_options), self.kept)]
        if self.second_judge:
            found.append(open_judge(self.second_judge, _options(self.second_options), self.kept))
        return found

    def asked(self, panel: Panel, batch: Batch, options: str) -> list[Asked]:
        """Every question of a batch, in order.

        Args:
          options: the key of a question's row with its choices or accepted forms.
        """
        template = self._template(panel)
        return [
            Asked(image, fill(template, row["question"], row[options]), tuple(row[options]), row)
            for image, item in zip(batch.images, batch.items, strict=True)
            for row in item.questions
        ]

    def _template(self, panel: Panel) -> str:
        return self.template or panel.template


@dataclasses.dataclass(frozen=True)
class Questioned(Judged):
    """A metric that asks the questions which its prompts bring; a subclass says what each of them must have."""

    # As it is registered.
    NAME: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]]

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that items of a prompt set have questions that can be asked; raises UserError."""
        check_questions(items, self.NAME, self.KEYS)


def check_questions(items: Sequence[Item], name: str, keys: Sequence[str]) -> None:
    """Makes sure that every prompt has questions with these keys.

    Raises:
      UserError: one has none.
    """
    for item in items:
        if not item.questions:
            raise UserError(
                f"metric {name!r}: prompt {item.id!r} has no questions; name a set that has them, such as "
                f"--prompt_set=tifa:FOLDER"
            )
        for row in item.questions:
            missing = [key for key in keys if key not in row]
            if missing:
                raise UserError(
                    f"metric {name!r}: question {row.get('question')!r} of {item.id!r} has no {', '.join(missing)}; "
                    "take the prompt set that this metric was made for"
                )


def split(batch: Batch, replies: Iterable[Any]) -> list[list[Any]]:
    """The replies of each image, from those of all questions of a batch."""
    some = iter(replies)
    return [[next(some) for _ in item.questions] for item in batch.items]


def second_opinion(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The agreement of both judges over the questions of all rows, which have `right` and `second_right`."""
    return agreement(
        (question["right"], question["second_right"])
        for row in rows
        for question in row["questions"]
        if question.get("second_right") is not None
    )


def unanswered(rows: Iterable[Mapping[str, Any]]) -> int:
    """The number of questions without an answer."""
    return sum(len(row.get("unanswered", ())) for row in rows)


def _options(given: Sequence[str]) -> dict[str, str]:
    """FIELD=VALUE texts as a mapping.

    Raises:
      UserError: one without "=".
    """
    found = {}
    for one in given:
        field, equal, value = one.partition("=")
        if not equal:
            raise UserError(f"judge option {one!r}: write FIELD=VALUE, such as model=Qwen3-VL-8B-Instruct")
        found[field] = value
    return found

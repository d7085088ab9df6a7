"""The metric `tifa`: TIFA v1.0 as published (arXiv 2303.11897), by element type.

A question counts as right if the judge's answer, mapped to one of the choices, is the expected one. The score of a
caption is the share of its questions that are right, and TIFA is the mean over captions.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.judged import Questioned, check_questions, second_opinion, split, unanswered
from scaling_dit.evaluation.metric import Batch, Row, Rows, Skipped, State
from scaling_dit.evaluation.vqa.choices import Matcher, create_matcher


@dataclasses.dataclass(frozen=True)
class Tifa(Questioned):
    """TIFA over the questions of a prompt set, or of held-out shapes; a `metric.Metric`.

    Attributes:
      judge: who answers: transformers:FOLDER | openai:URL | shapes, or package.module:Name.
      judge_options: its fields, each as "FIELD=VALUE".
      second_judge: answers the same questions, for the agreement of both; "" = none.
      second_options: its fields.
      template: of the question, with {question} and {choices}; "" = the judge's own.
      matcher: folder of the sentence encoder that maps free answers to choices; "" = only literal answers count.
    """

    NAME: ClassVar[str] = "tifa"
    KEYS: ClassVar[tuple[str, ...]] = ("question", "choices", "answer", "element_type")

    matcher: str = ""

    def items(self, source: Any, count: int) -> Sequence[Any]:
        """Scenes of the built-in shapes with their questions; other prompts come from `prompt_set`.

        Raises:
          Skipped: the source has no questions.
        """
        return shapes_items(source, count, "tifa")

    def check_ready(self) -> None:
        """As `Judged.check_ready`, and of the matcher."""
        super().check_ready()
        _ = self._matcher

    def ready(self) -> None:
        """As `Judged.ready`; also opens the matcher."""
        super().ready()
        _ = self._matcher

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image: its `score` and `questions`, as `evaluation.tifa` has them."""
        check_questions(batch.items, self.NAME, self.KEYS)
        marked = [self._answers(panel, batch) for panel in self.panels]
        seconds = marked[1] if len(marked) > 1 else [[None] * len(item.questions) for item in batch.items]
        return state, [
            _row(item.questions, first, second)
            for item, first, second in zip(batch.items, marked[0], seconds, strict=True)
        ]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """TIFA's result (`tifa.summary`), `scalars`, and the agreement with the second judge.

        Raises:
          Skipped: not one question was answered.
        """
        scored = [row for row in rows if row["questions"]]
        if not scored:
            raise Skipped("the judge answered no question")
        result = tifa.summary(scored, self.panels[0].identity, seed)
        by_type = {f"tifa_{kind}": value for kind, value in result["accuracy_by_type"].items()}
        result["scalars"] = {"tifa": result["tifa_average"]} | by_type
        result["unanswered"] = unanswered(rows)
        result["unmatched"] = sum(q["given"] is None for row in scored for q in row["questions"])
        if len(self.panels) > 1:
            result["agreement"] = second_opinion(scored)
            result["second_average"] = _second_average(scored)
        return result

    def about(self) -> dict[str, Any]:
        """As `Judged.about`, and how free answers became choices."""
        return super().about() | {"choice_rule": self._matcher.rule}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        lines = [tifa.table(result)]
        if result["unmatched"]:
            lines.append(f"answers that were no choice, and count as wrong: {result['unmatched']}")
        lines += agreement_lines(result)
        return "\n".join(lines)

    @functools.cached_property
    def _matcher(self) -> Matcher:
        return create_matcher(self.matcher)

    def _answers(self, panel: Any, batch: Batch) -> list[list[Any]]:
        """(free answer, choice) of each question of each image; None for a question without an answer."""
        asked = self.asked(panel, batch, "choices")
        free = panel.answers(asked)
        given = [i for i, answer in enumerate(free) if answer is not None]
        chosen = self._matcher.match([str(free[i]) for i in given], [asked[i].options for i in given])
        found: list[Any] = [None] * len(asked)
        for i, choice in zip(given, chosen, strict=True):
            found[i] = (free[i], choice)
        return split(batch, found)


def _row(questions: Sequence[Mapping[str, Any]], first: Sequence[Any], second: Sequence[Any]) -> Row:
    details, missing = [], []
    for question, reply, other in zip(questions, first, second, strict=True):
        if reply is None:
            missing.append(question["question"])
            continue
        free, given = reply
        detail = {key: question[key] for key in ("question", "element_type", "answer")}
        detail |= {"free": free, "given": given, "right": int(given == question["answer"])}
        if other is not None:
            detail |= {"second": other[1], "second_right": int(other[1] == question["answer"])}
        details.append(detail)
    score = statistics.fmean(detail["right"] for detail in details) if details else None
    row: Row = {"score": score, "questions": details}
    return row | {"unanswered": missing} if missing else row


def _second_average(rows: Sequence[Row]) -> float | None:
    """The second judge's score over the captions that it answered."""
    scores = []
    for row in rows:
        marks = [q["second_right"] for q in row["questions"] if "second_right" in q]
        if marks:
            scores.append(statistics.fmean(marks))
    return statistics.fmean(scores) if scores else None


def agreement_lines(result: Mapping[str, Any]) -> list[str]:
    """What a table says of questions without an answer, and of a second judge."""
    lines = []
    if result.get("unanswered"):
        lines.append(f"questions without an answer, left out: {result['unanswered']}")
    if found := result.get("agreement"):
        kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.3f}"
        lines.append(
            f"second judge: equal marks on {found['observed']:.3f} of {found['n']} questions, kappa {kappa}"
        )
    return lines


def shapes_items(source: Any, count: int, name: str) -> Sequence[Any]:
    """Items of the built-in shapes with TIFA's questions.

    Raises:
      Skipped: another source.
    """
    from scaling_dit.data.shapes.source import ShapesSource
    from scaling_dit.evaluation.metrics.shapes_tifa import scene_items

    if not isinstance(source, ShapesSource):
        raise Skipped(
            f"metric {name!r} needs prompts with questions, which {source.describe()} has not; name a set, such as "
            f"--prompt_set=tifa:FOLDER with the files of github.com/Yushi-Hu/tifa, folder tifa_v1.0"
        )
    return scene_items(source, count)

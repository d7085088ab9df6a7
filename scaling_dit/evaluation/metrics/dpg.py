"""The metric `dpg`: DPG-Bench (arXiv 2403.05135), questions with dependencies, times 100.

A question about an attribute or relation counts only if the questions that it depends on are answered with yes, the
rule of DSG (arXiv 2310.18235). The score is the mean over prompts of the share of questions that count. Shares by
category are of the answers as they are, as in the published script. That script leaves out the first question of its
file; this metric has it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.judged import Questioned, check_questions, second_opinion, split, unanswered
from scaling_dit.evaluation.metric import Batch, Row, Rows, Skipped, State
from scaling_dit.evaluation.metrics.tifa import agreement_lines
from scaling_dit.evaluation.vqa.choices import literal

TEMPLATE = "{question} Answer yes or no."
CHOICES = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Dpg(Questioned):
    """DPG over the questions of `prompt_set=dpg:FOLDER`; a `metric.Metric`.

    Attributes:
      judge: who answers: transformers:FOLDER | openai:URL, or package.module:Name.
      judge_options: its fields, each as "FIELD=VALUE".
      second_judge: answers the same questions, for the agreement of both; "" = none.
      second_options: its fields.
      template: of the question; the published mPLUG is asked "{question}".
    """

    NAME: ClassVar[str] = "dpg"
    KEYS: ClassVar[tuple[str, ...]] = ("question", "number", "parents", "element_type", "choices")

    template: str = TEMPLATE

    def items(self, source: Any, count: int) -> Sequence[Any]:
        """Prompts come from `prompt_set`.

        Raises:
          Skipped: always, as there is no other place with such questions.
        """
        raise Skipped(
            "metric 'dpg' needs its prompt set: --prompt_set=dpg:FOLDER with dpg_bench.csv and prompts/ of "
            "github.com/TencentQQGYLab/ELLA, folder dpg_bench"
        )

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image: `score`, and each question with its answer, and whether it counts."""
        check_questions(batch.items, self.NAME, self.KEYS)
        found = [split(batch, panel.answers(self.asked(panel, batch, "choices"))) for panel in self.panels]
        seconds = found[1] if len(found) > 1 else [[None] * len(item.questions) for item in batch.items]
        return state, [
            _row(item.questions, first, second)
            for item, first, second in zip(batch.items, found[0], seconds, strict=True)
        ]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """`scalars` dpg and the shares by category, with an interval over prompts.

        Raises:
          Skipped: not one prompt has all its answers.
        """
        scored = [row for row in rows if row["score"] is not None]
        if not scored:
            raise Skipped("the judge answered no prompt's questions")
        scores = np.array([row["score"] for row in scored])
        kinds: dict[str, list[int]] = {}
        details: dict[str, list[int]] = {}
        for row in scored:
            for question in row["questions"]:
                kinds.setdefault(question["element_type"], []).append(question["right"])
                details.setdefault(question["detail"], []).append(question["right"])
        by_type = {kind: 100 * statistics.fmean(marks) for kind, marks in sorted(kinds.items())}
        result: dict[str, Any] = {
            "n": len(scores),
            "interval": mean_interval(scores, seed),
            "accuracy_by_type": by_type,
            "accuracy_by_detail": {
                kind: 100 * statistics.fmean(marks) for kind, marks in sorted(details.items())
            },
            "n_by_type": {kind: len(marks) for kind, marks in sorted(kinds.items())},
            "unanswered": unanswered(rows),
            "scalars": {"dpg": float(scores.mean())}
            | {f"dpg_{kind}": value for kind, value in by_type.items()},
        }
        if len(self.panels) > 1:
            result["agreement"] = second_opinion(scored)
        return result

    def about(self) -> dict[str, Any]:
        """As `Judged.about`, and the rules for answers."""
        rules = {
            "choice_rule": "yes, but for case, blanks and a final full stop; anything else is no",
            "dependency_rule": "a question counts only if all that it depends on count",
        }
        return super().about() | rules | {"scale": 100}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        return "\n".join([super().table(result), *agreement_lines(result)])


def _row(
    questions: Sequence[Mapping[str, Any]], first: Sequence[str | None], second: Sequence[str | None]
) -> Row:
    """A prompt with a question that has no answer has no score: what depends on it is not known."""
    details, missing = [], []
    for question, reply, other in zip(questions, first, second, strict=True):
        if reply is None:
            missing.append(question["question"])
            continue
        detail = {key: question[key] for key in ("question", "element_type", "detail", "number")}
        detail |= {"given": reply, "right": _yes(reply)}
        if other is not None:
            detail |= {"second": other, "second_right": _yes(other)}
        details.append(detail)
    if missing:
        return {"score": None, "questions": details, "unanswered": missing}
    parents = {question["number"]: question["parents"] for question in questions}
    counts = depending({detail["number"]: detail["right"] for detail in details}, parents)
    for detail in details:
        detail["counts"] = counts[detail["number"]]
    return {"score": 100 * statistics.fmean(counts.values()), "questions": details}


def _yes(answer: str) -> int:
    return int(literal(answer, CHOICES) == "yes")


def depending(right: Mapping[int, int], parents: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Which questions count: those with the answer yes whose parents all count, and theirs, in the order of the file.

    Args:
      right: question -> 1 for yes.
      parents: question -> the questions that it depends on.

    Raises:
      UserError: a question depends on one that its prompt has not.
    """
    counts = dict(right)
    for number in counts:
        for parent in parents[number]:
            if parent not in right:
                raise UserError(f"question {number} depends on question {parent}, which its prompt has not")
            if not counts[parent]:
                counts[number] = 0
    return counts

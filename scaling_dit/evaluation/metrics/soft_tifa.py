"""The metric `soft_tifa`: how probable the expected answers are (GenEval 2, arXiv 2512.16853), times 100.

AM is the mean over prompts of the mean probability of a prompt's questions, an estimate for atoms. GM is the mean over
prompts of their geometric mean, an estimate for whole prompts. All of it is computed from log-probabilities, so small
ones do not become 0 on the way.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.judged import Questioned, check_questions, second_opinion, split, unanswered
from scaling_dit.evaluation.metric import Batch, Row, Rows, Skipped, State
from scaling_dit.evaluation.metrics.tifa import agreement_lines, shapes_items
from scaling_dit.evaluation.vqa import Likelihood
from scaling_dit.evaluation.vqa.forms import accepted_forms

TEMPLATE = "{question} Answer in one word."


@dataclasses.dataclass(frozen=True)
class SoftTifa(Questioned):
    """Soft-TIFA over the questions of a prompt set, or of held-out shapes; a `metric.Metric`.

    Attributes:
      judge: whose probabilities: transformers:FOLDER | openai:URL | shapes, or package.module:Name.
      judge_options: its fields, each as "FIELD=VALUE".
      second_judge: asked the same questions, for the agreement of both; "" = none.
      second_options: its fields.
      template: of the question, with {question}.
    """

    NAME: ClassVar[str] = "soft_tifa"
    KEYS: ClassVar[tuple[str, ...]] = ("question", "answer")

    template: str = TEMPLATE

    def items(self, source: Any, count: int) -> Sequence[Any]:
        """Scenes of the built-in shapes with their questions; other prompts come from `prompt_set`.

        Raises:
          Skipped: the source has no questions.
        """
        return shapes_items(source, count, "soft_tifa")

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image: `score`, its AM, `gm`, and each question with its `log_p`."""
        check_questions(batch.items, self.NAME, self.KEYS)
        batch = Batch(batch.images, [_with_forms(item) for item in batch.items])
        found = [
            split(batch, panel.likelihoods(self.asked(panel, batch, "accepted"))) for panel in self.panels
        ]
        seconds = found[1] if len(found) > 1 else [[None] * len(item.questions) for item in batch.items]
        return state, [
            _row(item.questions, first, second)
            for item, first, second in zip(batch.items, found[0], seconds, strict=True)
        ]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """`scalars` soft_tifa_am, soft_tifa_gm and AM by kind, with intervals over prompts.

        `gm_if_zero` is GM with 0 in place of the `bounded` probabilities that a server does not list.

        Raises:
          Skipped: not one question was answered.
        """
        scored = [row for row in rows if row["questions"]]
        if not scored:
            raise Skipped("the judge answered no question")
        am, gm, low = (np.array([row[key] for row in scored]) for key in ("score", "gm", "gm_if_zero"))
        kinds: dict[str, list[float]] = {}
        for row in scored:
            for question in row["questions"]:
                kinds.setdefault(question["element_type"], []).append(100 * math.exp(_log(question["log_p"])))
        by_type = {kind: float(np.mean(values)) for kind, values in sorted(kinds.items())}
        result: dict[str, Any] = {
            "n": len(scored),
            "interval": mean_interval(am, seed),
            "interval_gm": mean_interval(gm, seed),
            "am_by_type": by_type,
            "n_by_type": {kind: len(values) for kind, values in sorted(kinds.items())},
            "bounded": sum(bool(q.get("bound")) for row in scored for q in row["questions"]),
            "gm_if_zero": float(low.mean()),
            "unanswered": unanswered(rows),
            "scalars": {"soft_tifa_am": float(am.mean()), "soft_tifa_gm": float(gm.mean())}
            | {f"soft_tifa_am_{kind}": value for kind, value in by_type.items()},
        }
        if len(self.panels) > 1:
            result["agreement"] = second_opinion(scored)
        return result

    def about(self) -> dict[str, Any]:
        """As `Judged.about`, and the rule for accepted answers."""
        rule = "first token of an accepted form, each once: as written, capitalised, after a blank, and as a digit"
        return super().about() | {"accepted_rule": rule, "scale": 100}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        lines = [super().table(result)]
        if result["bounded"]:
            lines.append(
                f"probabilities that the server does not list: {result['bounded']}; GM with 0 for them: "
                f"{result['gm_if_zero']:.4g}"
            )
        return "\n".join(lines + agreement_lines(result))


def _with_forms(item: Any) -> Any:
    questions = [
        {"element_type": "all", **row, "accepted": accepted_forms(row["answer"])} for row in item.questions
    ]
    return dataclasses.replace(item, questions=questions)


def _row(
    questions: Sequence[Mapping[str, Any]],
    first: Sequence[Likelihood | None],
    second: Sequence[Likelihood | None],
) -> Row:
    details, missing = [], []
    for question, reply, other in zip(questions, first, second, strict=True):
        if reply is None:
            missing.append(question["question"])
            continue
        detail = {key: question[key] for key in ("question", "element_type", "answer")}
        detail |= {"log_p": _json(reply.log_p), "right": _mark(reply)}
        if reply.bound:
            detail["bound"] = True
        if other is not None:
            detail |= {"second_log_p": _json(other.log_p), "second_right": _mark(other)}
        details.append(detail)
    logs = [_log(detail["log_p"]) for detail in details]
    zeros = [-math.inf if detail.get("bound") else _log(detail["log_p"]) for detail in details]
    am, gm = means(logs)
    row: Row = {"score": am, "gm": gm, "gm_if_zero": means(zeros)[1], "questions": details}
    return row | {"unanswered": missing} if missing else row


def means(log_p: Sequence[float]) -> tuple[float | None, float | None]:
    """(arithmetic, geometric mean) of probabilities, times 100, from their logarithms; None without any."""
    if not len(log_p):
        return None, None
    logs = np.asarray(log_p, np.float64)
    return 100 * float(np.exp(logs).mean()), 100 * float(np.exp(logs.mean()))


def _mark(reply: Likelihood) -> int:
    """Whether the expected answer is more probable than all others together."""
    return int(reply.log_p > math.log(0.5))


def _json(log_p: float) -> float | None:
    """JSON has no infinity: None is the logarithm of 0."""
    return None if log_p == -math.inf else log_p


def _log(value: float | None) -> float:
    return -math.inf if value is None else value

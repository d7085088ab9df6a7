"""The metric `vqa_score`: how probable the answer yes is to "does this figure show ...?" (arXiv 2404.01291)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.judged import Judged, second_opinion, unanswered
from scaling_dit.evaluation.metric import Batch, Row, Rows, Skipped, State
from scaling_dit.evaluation.metrics.tifa import agreement_lines
from scaling_dit.evaluation.vqa import Asked
from scaling_dit.evaluation.vqa.forms import YES

TEMPLATE = 'Does this figure show "{question}"? Please answer yes or no.'


@dataclasses.dataclass(frozen=True)
class VqaScore(Judged):
    """VQAScore of any prompts, from 0 to 1; a `metric.Metric`.

    Attributes:
      judge: whose probabilities: transformers:FOLDER | openai:URL, or package.module:Name.
      judge_options: its fields, each as "FIELD=VALUE".
      second_judge: asked the same questions, for the agreement of both; "" = none.
      second_options: its fields.
      template: of the question, in which {question} stands for the prompt.
    """

    template: str = TEMPLATE

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image with its `score`; None without an answer."""
        found = [panel.likelihoods(self._asked(batch)) for panel in self.panels]
        rows: list[Row] = []
        for i, item in enumerate(batch.items):
            reply = found[0][i]
            question: dict[str, Any] = {"question": self.template.replace("{question}", item.prompt)}
            if reply is None:
                rows.append({"score": None, "questions": [], "unanswered": [question["question"]]})
                continue
            score = math.exp(reply.log_p)
            question |= {"p": score, "right": int(score > 0.5)} | ({"bound": True} if reply.bound else {})
            if len(found) > 1 and (other := found[1][i]) is not None:
                question |= {
                    "second_p": math.exp(other.log_p),
                    "second_right": int(math.exp(other.log_p) > 0.5),
                }
            rows.append({"score": score, "questions": [question]})
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean over images with its interval.

        Raises:
          Skipped: not one question was answered.
        """
        scores = np.array([row["score"] for row in rows if row["score"] is not None])
        if not len(scores):
            raise Skipped("the judge answered no question")
        result: dict[str, Any] = {
            "n": len(scores),
            "interval": mean_interval(scores, seed),
            "scalars": {"vqa_score": float(scores.mean())},
            "unanswered": unanswered(rows),
        }
        if len(self.panels) > 1:
            result["agreement"] = second_opinion(rows)
        return result

    def about(self) -> dict[str, Any]:
        """As `Judged.about`, and the rule for accepted answers."""
        return super().about() | {
            "accepted_rule": f"first token of {', '.join(map(repr, YES))}, each token once"
        }

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        return "\n".join([super().table(result), *agreement_lines(result)])

    def _asked(self, batch: Batch) -> list[Asked]:
        return [
            Asked(image, self.template.replace("{question}", item.prompt), YES, {"id": item.id})
            for image, item in zip(batch.images, batch.items, strict=True)
        ]

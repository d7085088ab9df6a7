"""TIFA: the share of questions about a caption that a VQA model answers rightly from the image (arXiv 2303.11897).

Scores and files follow the reference implementation (TIFA v1.0), whose tools can read the questions and the image map
that are written here. Scores of different VQA models do not compare, so a result names the model.
"""

import json
import statistics
import textwrap
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.evaluation.intervals import percentiles, resamples

Question = Mapping[str, Any]
VQA = Callable[[np.ndarray, Sequence[Question]], list[str]]

# The fields of each question that a row keeps; the rest is in the question file.
_KEPT = ("question", "element_type", "answer")


def caption_row(image: np.ndarray, questions: Sequence[Question], vqa: VQA) -> dict[str, Any]:
    """The row of one image: its `score`, the share of right answers, and each question with the answer and its mark.

    Args:
      image: uint8 [H, W, 3].
      questions: TIFA's rows of the image's caption.
      vqa: answers all questions of a caption about an image, in their order.

    Raises:
      UserError: there are no questions.
    """
    if not questions:
        raise UserError("TIFA: a caption has no questions")
    answers = vqa(image, questions)
    details = [
        {key: question[key] for key in _KEPT} | {"given": given, "right": int(given == question["answer"])}
        for question, given in zip(questions, answers, strict=True)
    ]
    return {"score": statistics.fmean(detail["right"] for detail in details), "questions": details}


class Tally:
    """Marks of captions, added one by one: a number for each caption, and two for each question."""

    def __init__(self) -> None:
        self._scores = array("d")
        # Element type -> caption, mark, caption, mark, ...
        self._marks: dict[str, array[int]] = {}

    def add(self, kinds: Iterable[str], marks: Sequence[int]) -> None:
        """The next caption: the element type and the mark (0 or 1) of each question."""
        for kind, mark in zip(kinds, marks, strict=True):
            self._marks.setdefault(kind, array("q")).extend((len(self._scores), mark))
        self._scores.append(statistics.fmean(marks))

    @property
    def scores(self) -> np.ndarray:
        """The share of right answers of each caption, [captions]."""
        return np.frombuffer(self._scores, np.float64)

    @property
    def by_type(self) -> dict[str, np.ndarray]:
        """Element type -> (caption, mark) of each question, int64 [questions, 2]."""
        return {kind: np.frombuffer(marks, np.int64).reshape(-1, 2) for kind, marks in self._marks.items()}

    def averages(self) -> dict[str, Any]:
        """`tifa_average`, the mean over captions, and `accuracy_by_type`, the mean over all questions of a type."""
        return {
            "tifa_average": statistics.fmean(self._scores),
            "accuracy_by_type": {
                kind: int(marks[:, 1].sum()) / len(marks) for kind, marks in self.by_type.items()
            },
        }


def summary(rows: Iterable[Mapping[str, Any]], vqa_model: str, seed: int) -> dict[str, Any]:
    """TIFA's result from the rows that `caption_row` made.

    Args:
      vqa_model: name of the VQA model, stored in the result.
      seed: of the bootstrap.

    Returns:
      `tifa_average`, `accuracy_by_type` (see `Tally.averages`; captions with many questions weigh more in it),
      `tifa_stdev` (over captions), `vqa_model`, `n` (captions), `n_by_type` (questions), and the 95 % intervals
      `interval` and `interval_by_type`, [low, high].
    """
    tally = Tally()
    for row in rows:
        questions = row["questions"]
        tally.add([q["element_type"] for q in questions], [q["right"] for q in questions])
    scores, by_type = tally.scores, tally.by_type
    interval, interval_by_type = bootstrap(scores, by_type, seed)
    averages = tally.averages()
    return {
        "tifa_average": averages["tifa_average"],
        "tifa_stdev": statistics.stdev(scores.tolist()) if len(scores) > 1 else 0.0,
        "accuracy_by_type": averages["accuracy_by_type"],
        "vqa_model": vqa_model,
        "n": len(scores),
        "n_by_type": {kind: len(marks) for kind, marks in by_type.items()},
        "interval": interval,
        "interval_by_type": interval_by_type,
    }


def bootstrap(
    scores: np.ndarray, by_type: Mapping[str, np.ndarray], seed: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Percentile bootstrap 95 % intervals of the average and of each type's accuracy.

    Captions are resampled with all their questions, because the questions of one image are not independent. Resamples
    without any question of a type are left out of that type's interval.

    Args:
      scores: one for each caption, [captions].
      by_type: element type -> (caption, 0 or 1) of each question, [questions, 2].
      seed: of the resampling.

    Returns:
      [low, high] of the average, and of each type.
    """
    n = len(scores)
    totals = {kind: np.bincount(np.asarray(marks)[:, 0], minlength=n) for kind, marks in by_type.items()}
    rights = {
        kind: np.bincount(np.asarray(marks)[:, 0], weights=np.asarray(marks)[:, 1], minlength=n)
        for kind, marks in by_type.items()
    }
    averages, shares = [], dict[str, list[np.ndarray]]((kind, []) for kind in by_type)
    for counts in resamples(n, seed):
        averages.append(counts @ np.asarray(scores) / n)
        for kind in by_type:
            total, right = counts @ totals[kind], counts @ rights[kind]
            shares[kind].append(right[total > 0] / total[total > 0])
    found = {kind: percentiles(np.concatenate(values)) for kind, values in shares.items()}
    return percentiles(np.concatenate(averages)), found


def table(result: Mapping[str, Any]) -> str:
    """The result for people: accuracy by element type and the average, each with its number and 95 % interval."""

    def line(name: str, n: int, mean: float, interval: Sequence[float]) -> str:
        return f"{name:<14}{n:>7}{mean:>10.3f}  {interval[0]:.3f} to {interval[1]:.3f}"

    lines = [f"{'element type':<14}{'n':>7}{'accuracy':>10}  95 % interval"]
    for kind, n in sorted(result["n_by_type"].items()):
        lines.append(line(kind, n, result["accuracy_by_type"][kind], result["interval_by_type"][kind]))
    lines.append(line("TIFA", result["n"], result["tifa_average"], result["interval"]))
    lines.append(f"n: questions by type, captions for TIFA; answered by {result['vqa_model']}")
    return "\n".join(lines)


def write_questions(path: epath.PathLike, questions_per_caption: Iterable[Sequence[Question]]) -> None:
    """Writes the questions of all captions as one flat JSON list, TIFA's question file."""
    with epath.Path(path).open("w") as file:
        before = "[\n"
        for questions in questions_per_caption:
            for question in questions:
                file.write(before + textwrap.indent(json.dumps(question, indent=1), " "))
                before = ",\n"
        file.write("\n]")


def write_image_map(path: epath.PathLike, paths: Mapping[str, str]) -> None:
    """Writes TIFA's image map: caption id -> image file, relative to the map's folder or absolute."""
    epath.Path(path).write_text(json.dumps(dict(paths), indent=1))

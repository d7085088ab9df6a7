"""TIFA: the share of questions about a caption that a VQA model answers rightly from the picture (arXiv 2303.11897).

Scores and files follow the reference implementation (TIFA v1.0), whose tools can read the questions and the image map
that are written here. Scores of different VQA models do not compare, so a result carries the model's name.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.errors import UserError

Row = dict[str, Any]
VQA = Callable[[np.ndarray, Sequence[Row]], list[str]]

RESAMPLES = 2000


def score(
    images: Sequence[np.ndarray],
    questions_per_caption: Sequence[Sequence[Row]],
    vqa: VQA,
    vqa_model: str,
    seed: int,
) -> dict[str, Any]:
    """Scores one picture per caption.

    `tifa_average` is the mean over captions of the mean over a caption's questions, `accuracy_by_type` the mean over
    all questions of a type, so that there captions with many questions weigh more.

    Args:
      images: uint8 [H, W, 3] each.
      questions_per_caption: the rows of each picture's caption; ids are unique per caption.
      vqa: answers the rows of one caption about a picture, in their order.
      vqa_model: name of the VQA model, stored in the result.
      seed: of the bootstrap.

    Returns:
      TIFA's result: `tifa_average`, `tifa_stdev` (over captions), `accuracy_by_type`, `question_details` (id ->
      question -> row with `free_form_vqa`, `multiple_choice_vqa`, `scores`), `caption_scores`; and `vqa_model`, `n`
      (captions), `n_by_type` (questions), `interval` and `interval_by_type` ([low, high], 95 %).

    Raises:
      UserError: no captions, a caption without questions, ids that repeat, or unequal lengths.
    """
    if len(images) != len(questions_per_caption) or not len(images):
        raise UserError(
            f"TIFA needs a picture per caption, got {len(images)} and {len(questions_per_caption)}"
        )
    details: dict[str, dict[str, Row]] = {}
    caption_scores: dict[str, float] = {}
    by_type: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (caption, 0 or 1) per question
    for caption, (image, rows) in enumerate(zip(images, questions_per_caption, strict=True)):
        if not rows:
            raise UserError(f"TIFA: caption {caption} has no questions")
        key = str(rows[0]["id"])
        if key in details:
            raise UserError(f"TIFA: id {key!r} occurs twice; each caption needs an id of its own")
        answers = vqa(image, rows)
        marks = [int(given == row["answer"]) for given, row in zip(answers, rows, strict=True)]
        details[key] = {
            row["question"]: {**row, "free_form_vqa": given, "multiple_choice_vqa": given, "scores": mark}
            for row, given, mark in zip(rows, answers, marks, strict=True)
        }
        caption_scores[key] = statistics.fmean(marks)
        for row, mark in zip(rows, marks, strict=True):
            by_type[row["element_type"]].append((caption, mark))
    scores = list(caption_scores.values())
    interval, interval_by_type = bootstrap(scores, by_type, seed)
    return {
        "tifa_average": statistics.fmean(scores),
        "tifa_stdev": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "accuracy_by_type": {kind: statistics.fmean(m for _, m in marks) for kind, marks in by_type.items()},
        "question_details": details,
        "caption_scores": caption_scores,
        "vqa_model": vqa_model,
        "n": len(scores),
        "n_by_type": {kind: len(marks) for kind, marks in by_type.items()},
        "interval": interval,
        "interval_by_type": interval_by_type,
    }


def bootstrap(
    scores: Sequence[float], by_type: Mapping[str, Sequence[tuple[int, int]]], seed: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Percentile bootstrap 95 % intervals of the average and of each type's accuracy.

    Captions are resampled with all their questions, because the questions of one picture are not independent. Resamples
    without any question of a type are left out of that type's interval.

    Args:
      scores: one per caption.
      by_type: element type -> (caption, 0 or 1) per question.
      seed: of the resampling.

    Returns:
      [low, high] of the average, and of each type.
    """
    n = len(scores)
    counts = np.random.default_rng(seed).multinomial(
        n, np.full(n, 1 / n), size=RESAMPLES
    )  # [resamples, captions]

    def interval(values: np.ndarray) -> list[float]:
        return [float(value) for value in np.percentile(values, [2.5, 97.5])]

    found = {}
    for kind, marks in by_type.items():
        captions, right = np.asarray(marks).T
        total = counts @ np.bincount(captions, minlength=n)
        good = counts @ np.bincount(captions, weights=right, minlength=n)
        found[kind] = interval(good[total > 0] / total[total > 0])
    return interval(counts @ np.asarray(scores) / n), found


def wrong_scene_baseline(
    renders: Sequence[np.ndarray],
    questions_per_caption: Sequence[Sequence[Row]],
    vqa: VQA,
    vqa_model: str,
    seed: int,
) -> dict[str, Any]:
    """The score of pictures that are right for another caption: each caption gets the true render of the next one.

    What a model reaches that draws perfect scenes but does not read; arguments and result as in `score`.
    """
    shifted = [renders[(i + 1) % len(renders)] for i in range(len(renders))]
    return score(shifted, questions_per_caption, vqa, vqa_model, seed)


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


def write_questions(path: epath.PathLike, questions_per_caption: Sequence[Sequence[Row]]) -> None:
    """Writes the rows of all captions as one flat list, TIFA's question file."""
    epath.Path(path).write_text(json.dumps([row for rows in questions_per_caption for row in rows], indent=1))


def write_image_map(path: epath.PathLike, files: Mapping[str, str]) -> None:
    """Writes TIFA's image map: caption id -> image file, relative to the map's folder or absolute."""
    epath.Path(path).write_text(json.dumps(dict(files), indent=1))

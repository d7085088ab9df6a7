"""What an evaluation leaves: a folder for each metric, a row in `results.jsonl` for each result, and curves.

A row of `results.jsonl` is a result without its parts by image: what was scored, how it was sampled and scored, and the
numbers with their interval. A skipped metric has a row too, with the reason. Rows are only added; of equal requests the
last one counts.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit._version import __version__
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.metric import NotFinite, Skipped
from scaling_dit.evaluation.parts import InFolder
from scaling_dit.evaluation.scoring import Scoring, settle, update_together

RESULT = "result.json"
ROWS = "rows.jsonl"
RESULTS = "results.jsonl"
# Folder of the parts scored so far; removed at the end.
_PARTS = "parts"
# What TensorBoard shows of the evaluations of one setting.
_CURVES = "curves.json"
DONE, SKIPPED = "done", "skipped"
Read = Callable[[range], Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What is scored, and the folder that its result is written to.

    Attributes:
      scoring: a metric with its items.
      folder: of the result, the rows, and what TIFA's tools read.
      head: JSON values that say what was scored and how; parts of a call with another one are not taken up.
      image_paths: id -> image file, relative to `folder`, for TIFA's tools; None for `ID.png`; {} for no such list.
    """

    scoring: Scoring
    folder: epath.Path
    head: Mapping[str, Any]
    image_paths: Mapping[str, str] | None = None


def score_to_folders(targets: Sequence[Target], read: Read, seed: int) -> Iterator[dict[str, Any] | Skipped]:
    """The results of metrics of the same images, `head` first, each of which is also written to its folder.

    A call that was killed scores only the missing images when it is repeated: parts are kept until all metrics have
    their results.

    Args:
      targets: metrics as `update_together` takes them.
      read: gives the images of some items, by their numbers: uint8 [some, H, W, 3], any number at a time.

    Yields:
      A metric's result, or why it must be skipped.

    Raises:
      UserError: a metric breaks its contract, or cannot read the images.
    """
    kept = [InFolder(target.folder / _PARTS, dict(target.head)) for target in targets]
    scored = [(target.scoring, parts) for target, parts in zip(targets, kept, strict=True)]
    skipped = update_together(scored, read)
    for place, (target, parts) in enumerate(zip(targets, kept, strict=True)):
        try:
            settle(parts, skipped.get(place))
            result = _finish(target, parts, seed)
        except Skipped as missing:
            if not isinstance(missing, NotFinite):
                skipped[place] = missing
            yield missing
        else:
            yield result
    for place, parts in enumerate(kept):
        if place not in skipped:
            parts.remove()


def _finish(target: Target, parts: InFolder, seed: int) -> dict[str, Any]:
    """The result of all parts, written to the folder with the rows."""
    scoring, folder, paths = target.scoring, target.folder, target.image_paths
    found, rows = scoring.result(parts, seed)
    result = {**target.head, **found}
    if jax.process_index() != 0:
        return result
    with files.staged(folder / ROWS) as local, local.open("w") as file:
        for row in rows:
            plain = {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
    if scoring.items[0].questions:
        tifa.write_questions(folder / "questions.json", (item.questions for item in scoring.items))
        if paths is None:
            paths = {item.id: f"{item.id}.png" for item in scoring.items}
        if paths:
            tifa.write_image_map(folder / "images.json", paths)
    files.write_whole(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return result


class Results:
    """The rows of an evaluation's folder.

    Args:
      root: the folder; `results.jsonl` in it has all rows.
    """

    def __init__(self, root: epath.Path) -> None:
        self.path = root / RESULTS
        self._root = root

    def add(self, row: Mapping[str, Any], folder: epath.Path | None = None) -> None:
        """Adds a row; `folder` is that of the metric. Other processes than the first do nothing."""
        if jax.process_index() != 0:
            return
        place = {"folder": _relative(folder, self._root)} if folder else {}
        line = json.dumps({"version": __version__, **row, **place}, ensure_ascii=False) + "\n"
        self._root.mkdir(parents=True, exist_ok=True)
        if files.is_remote(self.path):
            before = self.path.read_text() if self.path.exists() else ""
            self.path.write_text(before + line)
            return
        with self.path.open("ab") as file:
            # A line that a kill or a full disk cut short must not swallow this one.
            cut = file.tell() and not self._ends_whole()
            file.write(b"\n" * bool(cut) + line.encode())

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def read(self) -> list[dict[str, Any]]:
        """All rows, of equal requests the last one; a last line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        rows: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text().split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[_request(row)] = row
        return list(rows.values())


def _request(row: Mapping[str, Any]) -> str:
    """What a row is about: equal for two rows of which the later replaces the earlier."""
    keys = (
        "metric",
        "workdir",
        "fields",
        "step",
        "ema",
        "sampler",
        "steps",
        "guidance",
        "seed",
        "n",
        "prompts_sha256",
        "images",
    )
    return json.dumps([row.get(key) for key in keys], sort_keys=True)


def _relative(folder: epath.Path, root: epath.Path) -> str:
    text, base = str(folder), f"{root}/"
    return text.removeprefix(base)


def write_curves(folder: epath.Path, step: int, scalars: Mapping[str, float], tensorboard: bool) -> None:
    """Shows scalars of a step as `evaluation/NAME` in TensorBoard, each step once, if its packages are there.

    Checkpoints are evaluated in any order and again, and events are only ever added: so what is shown is kept in
    `curves.json`, and the events are written anew from it.
    """
    if jax.process_index() != 0 or not tensorboard:
        return
    from scaling_dit.monitor.writers import TensorBoardWriter

    kept = folder / _CURVES
    remedy = "delete it: the numbers are in results.jsonl, and the next evaluation begins it anew"
    curves = files.read_json(kept, dict, remedy) if kept.exists() else {}
    curves[str(step)] = {**curves.get(str(step), {}), **scalars}
    # Events without it are of an older version and hold what nothing else shows.
    older = list(folder.glob("events.*")) if kept.exists() else []
    try:
        writer = TensorBoardWriter(folder)
    except ModuleNotFoundError:
        # `train` has said so, and results.jsonl has everything.
        return
    # First, so that no kill loses a step that the results count as done.
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(kept, files.to_json(curves).encode())
    for each in sorted(curves, key=int):
        writer.scalars(int(each), {f"evaluation/{name}": value for name, value in curves[each].items()})
    writer.close()
    for path in older if not writer.off else ():
        path.unlink()

"""The metric `emoji`: is the real emoji nearest to a generated image the one that was asked for, in who, what and tone?

Exact, without a judge: the generated image is compared with the drawing of every emoji in the run's folder
(`data/emoji.py`), held-out combinations included, by the squared difference of their pixels. Half of the prompts are of
emoji in training and half of combinations that are not, where the folder has both.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from scaling_dit.data.emoji import HELD_OUT
from scaling_dit.data.sources import Source
from scaling_dit.data.sources.folder import METADATA, FolderSource
from scaling_dit.data.sources.image_files import key_hash
from scaling_dit.errors import UserError
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.bases import Base, no_prompt_set
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State

JUDGE = "nearest OpenMoji by squared pixel difference"
PARTS = ("who", "what", "tone")
SEEN, UNSEEN = "seen", "held_out"
# The answer for a part that an emoji does not have.
NONE = "none"
# Squared distances of an image to two drawings that differ less are equal: some emoji share one drawing.
EQUAL = 1e-9


class EmojiAccuracy(Base):
    """Right answers to who, what and tone by the nearest real emoji, and the share right in all; scored as TIFA.

    Attributes:
      kind: of the prompts: long (the dense caption) or alt (the name alone, which leaves the tone open, so only who and
        what are asked).

    Raises:
      UserError: another kind.
    """

    def __init__(self, kind: str = "long") -> None:
        if kind not in ("alt", "long"):
            raise UserError(f"metrics.emoji.kind is {kind!r}; it must be alt or long")
        self.kind = kind

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """`count` prompts, of emoji in training and of held-out combinations in turn while there are any of both.

        Raises:
          UserError: no folder of `data.emoji`, or more prompts than it has emoji.
        """
        if not isinstance(source, FolderSource) or not (epath.Path(source.path) / HELD_OUT).exists():
            raise UserError(
                "metric 'emoji' reads the folder that `python -m scaling_dit.data.emoji` writes; "
                f"got {source.describe()}"
            )
        folder, size = str(source.path), source.image_size
        lines, training = read_lines(folder)
        # Without those of the split that validates: they are in no training, and are no new combination.
        seen = [i for i in range(training) if key_hash(lines[i]["file_name"]) >= source.held_out_fraction]
        parts = (seen, range(training, len(lines)))
        order = _in_turn(
            *(sorted(part, key=lambda i: key_hash(f"prompt/{lines[i]['file_name']}")) for part in parts)
        )
        if count > len(order):
            raise UserError(
                f"{count} prompts are asked for, but {folder} has {len(order)} emoji; ask for at most {len(order)}"
            )

        def make(number: int) -> Item:
            place = order[number]
            meta = {"folder": folder, "size": size, "split": SEEN if place < training else UNSEEN}
            return self._item(lines[place], meta)

        return Items(count, make)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Refuses every prompt set, for none is about the emoji of the run's folder; raises UserError."""
        raise no_prompt_set(
            where, "emoji of the run's folder", "emoji", "what `python -m scaling_dit.data.emoji` writes"
        )

    def _item(self, line: Mapping[str, Any], meta: Mapping[str, Any]) -> Item:
        sparse, dense = line["own"]
        prompt = sparse if self.kind == "alt" else dense
        key = epath.Path(line["file_name"]).stem
        asked = PARTS[:2] if self.kind == "alt" else PARTS
        questions = [
            {
                "id": key,
                "caption": prompt,
                "question": f"{part}?",
                "choices": [],
                "answer": line[part] or NONE,
                "element_type": part,
                "element": line[part] or NONE,
            }
            for part in asked
        ]
        return Item(key, prompt, questions, meta=meta)

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """TIFA's rows, each with the nearest emoji, whether all is right, and the kind of combination asked for."""
        rows = []
        for image, item in zip(batch.images, batch.items, strict=True):
            drawings = _drawings(item.meta["folder"], item.meta["size"])
            near = drawings.nearest(image)
            # Of equal drawings the one that was asked for counts.
            line = next((one for one in near if epath.Path(one["file_name"]).stem == item.id), near[0])
            asked = item.questions
            answers = [line[question["element_type"]] or NONE for question in asked]
            row = tifa.caption_row(image, asked, functools.partial(_given, answers))
            nearest = epath.Path(line["file_name"]).stem
            rows.append(
                row | {"nearest": nearest, "all": int(row["score"] == 1), "split": item.meta["split"]}
            )
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """TIFA's result by part, and `scalars`: its average, each part, all right, and all right by split."""
        kept = list(rows)
        result = tifa.summary(kept, JUDGE, seed)
        scalars = {"emoji": result["tifa_average"]}
        scalars |= {f"emoji_{part}": value for part, value in sorted(result["accuracy_by_type"].items())}
        intervals = result["interval_by_type"]
        for name, chosen in (
            ("all", (SEEN, UNSEEN)),
            *((f"all_{split}", (split,)) for split in (SEEN, UNSEEN)),
        ):
            right = np.array([row["all"] for row in kept if row["split"] in chosen], np.float64)
            if len(right):
                scalars[f"emoji_{name}"] = float(right.mean())
                intervals[name] = mean_interval(right, seed)
        return result | {"scalars": scalars}

    def about(self) -> dict[str, Any]:
        """The judge, which reads images as they are."""
        return {"judge": JUDGE}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        rest = {name: value for name, value in result["scalars"].items() if name.startswith("emoji_all")}
        shown = [
            "{:<22}{:.3f}  {:.3f} to {:.3f}".format(
                name.removeprefix("emoji_"), value, *result["interval_by_type"][name.removeprefix("emoji_")]
            )
            for name, value in rest.items()
        ]
        return "\n".join([tifa.table(result), "right in all that was asked:", *shown])


@functools.lru_cache(maxsize=4)
def read_lines(folder: str) -> tuple[tuple[Mapping[str, Any], ...], int]:
    """(what the folder says of each emoji, training ones first; how many of them are training ones).

    Raises:
      UserError: a line that `data.emoji` did not write.
    """
    found: list[Mapping[str, Any]] = []
    training = 0
    for name in (METADATA, HELD_OUT):
        path = epath.Path(folder) / name
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            try:
                line = json.loads(text)
                _ = line["file_name"], line["own"][1], line["who"], line["what"], line["tone"]
            except (ValueError, KeyError, TypeError, IndexError):
                raise UserError(
                    f"{path} line {number} is none of `python -m scaling_dit.data.emoji`; write the folder again"
                ) from None
            found.append(line)
        training = training or len(found)
    return tuple(found), training


def _in_turn(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """One of each in turn, then the rest of the longer."""
    both = [place for pair in zip(one, other, strict=False) for place in pair]
    return [*both, *one[len(other) :], *other[len(one) :]]


def _given(answers: list[str], image: np.ndarray, questions: Sequence[Any]) -> list[str]:
    """These answers, as `tifa.caption_row` asks for them."""
    return answers


@dataclasses.dataclass(frozen=True, eq=False)
class Drawings:
    """The real emoji of a folder: values in 0..1 as float64 [N, H * W * 3], and what is known of each."""

    values: np.ndarray
    lines: Sequence[Mapping[str, Any]]

    def nearest(self, image: np.ndarray) -> list[Mapping[str, Any]]:
        """The emoji whose drawing is nearest to an image, uint8 [H, W, 3], and those whose drawings equal it."""
        off = self.values - image.reshape(-1) / 255
        distances = np.einsum("nd,nd->n", off, off)
        return [self.lines[int(i)] for i in np.flatnonzero(distances <= distances.min() + EQUAL)]


@functools.lru_cache(maxsize=2)
def _drawings(folder: str, size: int) -> Drawings:
    lines, _ = read_lines(folder)
    values = []
    for line in lines:
        path = epath.Path(folder) / line["file_name"]
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
            values.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)).reshape(-1) / 255)
    return Drawings(np.stack(values), lines)

"""The metric `inpaint`: what stands in the missing part of an image, and whether the given part was left alone."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from scaling_dit.data import images as images_lib
from scaling_dit.data.conditions import inpaint
from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.data.sources import Source, contract
from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation import conditioned, tifa
from scaling_dit.evaluation.bases import Base
from scaling_dit.evaluation.features import clip_pairs, published
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State

# PSNR of a given part that is equal in every bit, in dB.
MOST_DB = 100.0
# Masks that are tried until one hides an object; the last is taken in any case.
_TRIES = 50
# Share of an object's pixels that a mask must cover to hide it.
_HIDDEN = 0.5
_NAME = "inpaint"


@dataclasses.dataclass(frozen=True)
class InpaintMetric(Base):
    """Held-out images with a part missing; a `metric.Metric`.

    Inside of the mask: on the source `shapes`, TIFA by the exact oracle over the questions about hidden objects and the
    one about their number; with `clip`, the CLIP score of the crop around the mask. Outside: mean squared error in
    [0, 1] and PSNR. The score of an image, by which runs are compared, is the first of these that there is.

    Attributes:
      boxes: of the masks, as the field of the condition "inpaint", whatever the run was trained with.
      strokes: as `boxes`.
      objects: as `boxes`.
      outpaint: as `boxes`.
      smallest: as `boxes`.
      largest: as `boxes`.
      mask_seed: of the masks, which depend on it and the record alone.
      condition: the name of the condition that is image and mask.
      clip: also score the crop by CLIP.
      clip_weights: as `weights` of `clip_score`.
      clip_size: as `size` of `clip_score`.
      clip_tokenizer_files: as `tokenizer_files` of `clip_score`.
      batch: images at once.
    """

    boxes: float = 0.4
    strokes: float = 0.3
    objects: float = 0.2
    outpaint: float = 0.1
    smallest: float = 0.057
    largest: float = 0.6
    mask_seed: int = 0
    condition: str = "inpaint"
    clip: bool = False
    clip_weights: str = ""
    clip_size: str = "clip-l"
    clip_tokenizer_files: str = ""
    batch: int = 64

    def __post_init__(self) -> None:
        _ = self._masks
        if self.clip_size not in clip_vision.SIZES:
            raise UserError(
                f"metrics.inpaint.clip_size is {self.clip_size!r}; {nearest(self.clip_size, clip_vision.SIZES)}"
            )

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out records with a mask each; of `shapes` distinct scenes.

        Of a scene the first mask that hides an object is taken, or the last of `_TRIES`, whatever that hides.

        Raises:
          UserError: fewer records are held out, or they are of a prepared set.
          Skipped: `clip` without weights.
        """
        if self.clip:
            self._place()
        if isinstance(source, ShapesSource):
            return self._scene_items(source, count)
        held_out = contract.held_out(source)
        if len(held_out) < count:
            raise UserError(
                f"{count} prompts are asked for, but {held_out.describe()}; ask for at most {len(held_out)}"
            )

        def make(number: int) -> Item:
            record = contract.read(held_out, number)
            if "image" not in record:
                raise UserError(
                    f"metric 'inpaint' needs images to mask, which a prepared set has not: {held_out.describe()}"
                )
            key = f"held-out-{number:06d}"
            mask = self._masks.mask(record, self._generator(key))
            return self._item(key, record["captions"][0], record["image"], mask)

        return Items(count, make)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that items of a prompt set have what is scored; raises UserError."""
        if self.clip:
            self._place()
        for item in items[:1]:
            if item.truth is None or self.condition not in item.conditions:
                raise UserError(
                    f"{where} has no images and masks; metric 'inpaint' takes brushbench:FOLDER, or the run's data"
                )

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """A row for each image: TIFA's of a scene, `mse` and `psnr` outside of the mask, `clip`, the mask's `share`."""
        rows: list[Row] = []
        crops = self._clip_scores(batch) if self.clip else [None] * len(batch.images)
        for image, item, clip in zip(batch.images, batch.items, crops, strict=True):
            truth, mask = self._fitted(item, image.shape[:2])
            row: Row = {}
            if item.questions:
                row |= tifa.caption_row(image, item.questions, oracle.answer)
            given = (image.astype(np.float64) - truth)[~mask] / 255
            mse = float((given**2).mean()) if given.size else 0.0
            row |= {"mse": mse, "psnr": psnr(mse), "share": float(mask.mean())}
            if clip is not None:
                row["clip"] = clip
            row.setdefault("score", row.get("clip", row["psnr"]))
            rows.append(row)
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """TIFA's result (`tifa.summary`) for scenes, and means, by EditBench's sizes of masks, too, with `scalars`."""
        result: dict[str, Any] = {"n": len(rows)}
        first = next(iter(rows))
        scalars: dict[str, float] = {}
        scores = rows.column("score")
        if "questions" in first:
            result |= tifa.summary(rows, oracle.VQA_MODEL, seed)
            scalars[_NAME] = result["tifa_average"]
            scalars |= {f"{_NAME}_{kind}": value for kind, value in result["accuracy_by_type"].items()}
        if "clip" in first:
            scalars[f"{_NAME}_clip"] = float(rows.column("clip").mean())
        # PSNR of the mean error: the mean of PSNRs would hang on how many images are equal in every bit.
        error = float(rows.column("mse").mean())
        scalars |= {f"{_NAME}_psnr": psnr(error), f"{_NAME}_mse": error}
        sizes = np.array([inpaint.size_name(row["share"]) for row in rows])
        for size in inpaint.EDITBENCH_SIZES:
            if (chosen := sizes == size).any():
                scalars[f"{_NAME}_{size}_masks"] = float(scores[chosen].mean())
        result["interval"] = mean_interval(scores, seed)
        if not ("questions" in first or "clip" in first):
            # PSNR comes first then, and falls with the error.
            low, high = mean_interval(rows.column("mse"), seed)
            result["interval"] = [psnr(high), psnr(low)]
        result["n_by_mask"] = {size: int((sizes == size).sum()) for size in inpaint.EDITBENCH_SIZES}
        return result | {"scalars": scalars}

    def about(self) -> dict[str, Any]:
        """The oracle, and with `clip` the weights' checksum and how crops are resized."""
        about = {"judge": oracle.VQA_MODEL}
        if self.clip:
            side = clip_vision.SIZES[self.clip_size].image
            about |= {
                "weights_sha256": published.digest(self._place()),
                "resize": f"box around the mask, Pillow bicubic to {side}x{side}",
            }
        return about

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        lines = [tifa.table(result)] if "tifa_average" in result else []
        return "\n".join([*lines, super().table(dict(result))])

    def _scene_items(self, source: ShapesSource, count: int) -> Sequence[Item]:
        held_out, chosen = source.held_out(), source.distinct(count)

        def make(number: int) -> Item:
            index = chosen[number]
            record, questions = held_out[index], held_out.questions(index)
            generator = self._generator(record["key"])
            objects = list(record["objects"])
            for _ in range(_TRIES):
                mask = self._masks.mask(record, generator)
                hidden = [i for i, one in enumerate(objects) if (one & mask).sum() >= _HIDDEN * one.sum()]
                if hidden:
                    break
            asked = [row for row in questions if _about(row["about"]["query"], hidden)]
            return self._item(record["key"], questions[0]["caption"], record["image"], mask, asked)

        return Items(count, make)

    def _item(
        self,
        key: str,
        prompt: str,
        truth: np.ndarray,
        mask: np.ndarray,
        questions: Sequence[Mapping[str, Any]] = (),
    ) -> Item:
        conditions = {self.condition: inpaint.masked(truth, mask)}
        return Item(key, prompt, questions, truth, conditions=conditions)

    def _generator(self, key: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self.mask_seed}/{key}".encode(), digest_size=8).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def _fitted(self, item: Item, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Truth uint8 [H, W, 3] and mask bool [H, W] of an item, at the size (H, W) of the images that are scored."""
        assert item.truth is not None
        truth, condition = item.truth, item.conditions[self.condition]
        if size[0] != size[1]:
            raise UserError(f"metric 'inpaint' takes square images, not {size[1]}x{size[0]} pixels")
        if truth.shape[:2] != size:
            truth = images_lib.fit(Image.fromarray(truth), size[1], size[0])
        return truth, conditioned.fitted(condition, size[0])[..., 3] > 127

    def _clip_scores(self, batch: Batch) -> Sequence[float]:
        """100 times the cosine of the box around the mask and the prompt, for each image."""
        pairs = clip_pairs.open_pairs(self._place(), self.clip_size, self.clip_tokenizer_files, self.batch)
        crops = []
        for image, item in zip(batch.images, batch.items, strict=True):
            _, mask = self._fitted(item, image.shape[:2])
            crops.append(crop(image, mask, pairs.side))
        cosines = pairs.cosines(np.stack(crops), [item.prompt for item in batch.items])
        return [100 * float(cosine) for cosine in cosines]

    @functools.cached_property
    def _masks(self) -> inpaint.Inpaint:
        with conditioned.own_fields(_NAME, "inpaint"):
            return inpaint.Inpaint(
                self.boxes, self.strokes, self.objects, self.outpaint, self.smallest, self.largest
            )

    def _place(self) -> str:
        return published.CLIP_L.find(self.clip_weights, _NAME)


def psnr(mse: float) -> float:
    """The peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most MOST_DB."""
    return float(min(MOST_DB, -10 * np.log10(mse))) if mse > 0 else MOST_DB


def crop(image: np.ndarray, mask: np.ndarray, side: int) -> np.ndarray:
    """The box around a mask bool [H, W], cut from an image uint8 [H, W, 3] and brought to [side, side, 3]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
        image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _about(query: Sequence[Any], hidden: Sequence[int]) -> bool:
    """Whether a question is about what a mask hides: the number of objects always is."""
    kind, *places = query
    return kind == "count" or any(place in hidden for place in places)

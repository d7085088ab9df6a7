"""The metric `aesthetic`: LAION's predictor of how people rate an image, from CLIP's embedding of it alone."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.data.sources import Source
from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.features import clip_pairs, linear_head, published
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, State
from scaling_dit.weights import places

_SIZE = "clip-l"
# Of the layers of `sac+logos+ava1-l14-linearMSE`; numbers between them are dropouts.
LAYERS = (0, 2, 4, 6, 7)


@dataclasses.dataclass(frozen=True)
class Aesthetic(PerImage):
    """From about 1 to 10; five linear layers without activations on OpenAI's ViT-L/14. The prompt has no part in it.

    Attributes:
      weights: file of the linear layers; "" looks in $SCALING_DIT_WEIGHTS.
      clip_weights: folder or file of CLIP ViT-L/14; "" looks in $SCALING_DIT_WEIGHTS.
      batch: images at once.
    """

    NAME: ClassVar[str] = "aesthetic"

    weights: str = ""
    clip_weights: str = ""
    batch: int = 64

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._places()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions, once the weights are found; raises Skipped if they are missing."""
        self._places()
        return super().items(source, count)

    def tower(self) -> tuple[Hashable, ...]:
        """CLIP's image tower, see `Metric`."""
        return clip_pairs.tower(self._places()[1], _SIZE, self.batch)

    def rows(self, batch: Batch) -> Sequence[Row]:
        """The score of each image."""
        scores = open_predictor(*self._places(), _SIZE, self.batch)(batch.images)
        return [{"score": float(score)} for score in scores]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean and its interval."""
        return super().result(state, rows, seed) | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The weights' checksums and how images are resized."""
        head, tower = self._places()
        return {
            "judge": "LAION aesthetic predictor, linear, on CLIP ViT-L/14",
            "weights_sha256": published.digest(head),
            "clip_weights_sha256": published.digest(tower),
            "resize": clip_pairs.RESIZE.format(side=clip_vision.SIZES[_SIZE].image),
        }

    def _places(self) -> tuple[str, str]:
        """The linear layers and CLIP."""
        head = published.AESTHETIC.find(self.weights, self.NAME)
        return head, published.CLIP_L.find(self.clip_weights, self.NAME)


@functools.lru_cache(maxsize=1)
def open_predictor(head: str, tower: str, size: str, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """Images uint8 [B, H, W, 3] -> scores float32 [B].

    Args:
      head: place of the linear layers.
      tower: place of CLIP.
      size: a name in `clip_vision.SIZES`.
      batch: images at once.

    Raises:
      UserError: files that are damaged or of something else.
    """
    kernel, bias = load_head(head, clip_vision.SIZES[size].projection)
    embed = clip_pairs.open_tower(tower, size, batch)
    # Row by row, so that no score depends on the others of its batch.
    return lambda images: (embed(images) * kernel).sum(-1) + bias


def load_head(place: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The five linear layers as one, see `linear_head.fold`.

    Raises:
      UserError: the file holds something else.
    """
    opened = places.open_weights(place, part="aesthetic", classes=(), field="weights")
    layers = [f"layers.{i}" for i in LAYERS]
    unknown = sorted(
        set(opened.tensors) - {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")}
    )
    if unknown:
        raise UserError(f"{place} is no linear aesthetic predictor, it has {', '.join(unknown)}")
    return linear_head.fold(opened.tensors, layers, width, place)

"""The metric `clip_score`: the cosine between CLIP's embeddings of an image and of its prompt."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from scaling_dit.data.sources import Source
from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.features import clip_pairs, published
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, State


@dataclasses.dataclass(frozen=True)
class ClipScore(PerImage):
    """100 times the cosine (torchmetrics' CLIPScore); by OpenAI's ViT-L/14 unless `size` and `weights` say otherwise.

    The mean is cut off at 0, the score of one image is not.

    Attributes:
      weights: folder or file of both towers; "" looks for OpenAI's ViT-L/14 in $SCALING_DIT_WEIGHTS.
      size: size of both towers.
      tokenizer_files: vocabulary, if it does not lie beside the weights.
      batch: images at once.
    """

    NAME: ClassVar[str] = "clip_score"

    weights: str = ""
    size: str = "clip-l"
    tokenizer_files: str = ""
    batch: int = 64

    def __post_init__(self) -> None:
        if self.size not in clip_vision.SIZES:
            raise UserError(
                f"metrics.clip_score.size is {self.size!r}; {nearest(self.size, clip_vision.SIZES)}"
            )

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._place()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions, once the weights are found; raises Skipped if they are missing."""
        self._place()
        return super().items(source, count)

    def tower(self) -> tuple[Hashable, ...]:
        """CLIP's image tower, see `Metric`."""
        return clip_pairs.tower(self._place(), self.size, self.batch)

    def rows(self, batch: Batch) -> Sequence[Row]:
        """The score of each image."""
        pairs = clip_pairs.open_pairs(self._place(), self.size, self.tokenizer_files, self.batch)
        cosines = pairs.cosines(batch.images, [item.prompt for item in batch.items])
        return [{"score": 100 * float(cosine)} for cosine in cosines]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean, at least 0, and its interval."""
        result = super().result(state, rows, seed)
        result["scalars"][self.NAME] = max(result["scalars"][self.NAME], 0.0)
        return result | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The weights' checksum and how images are resized."""
        return {
            "judge": f"CLIP {self.size}",
            "weights_sha256": published.digest(self._place()),
            "resize": clip_pairs.RESIZE.format(side=clip_vision.SIZES[self.size].image),
        }

    def _place(self) -> str:
        return published.CLIP_L.find(self.weights, self.NAME)

"""The metric `hpsv2`: Human Preference Score, CLIP ViT-H/14 fine-tuned on people's choices between images."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from scaling_dit.data.sources import Source
from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.features import clip_pairs, published
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, State

_SIZE = "openclip-h"


@dataclasses.dataclass(frozen=True)
class Hpsv2(PerImage):
    """100 times the cosine of image and prompt (arXiv 2306.09341); scores of v2 and v2.1 do not compare.

    Attributes:
      version: "v2.1", or "v2" as in papers before 2024.
      weights: file of both towers; "" looks in $SCALING_DIT_WEIGHTS.
      tokenizer_files: CLIP's vocabulary; "" looks beside the weights' other files in $SCALING_DIT_WEIGHTS.
      batch: images at once.
    """

    NAME: ClassVar[str] = "hpsv2"

    version: str = "v2.1"
    weights: str = ""
    tokenizer_files: str = ""
    batch: int = 64

    def __post_init__(self) -> None:
        if self.version not in published.HPS:
            raise UserError(
                f"metrics.hpsv2.version is {self.version!r}; {nearest(self.version, published.HPS)}"
            )

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._places()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions, once weights and vocabulary are found; raises Skipped if they are missing."""
        self._places()
        return super().items(source, count)

    def rows(self, batch: Batch) -> Sequence[Row]:
        """The score of each image."""
        weights, words = self._places()
        pairs = clip_pairs.open_pairs(weights, _SIZE, words, self.batch)
        cosines = pairs.cosines(batch.images, [item.prompt for item in batch.items])
        return [{"score": 100 * float(cosine)} for cosine in cosines]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean and its interval."""
        return super().result(state, rows, seed) | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The weights' checksum and how images are resized."""
        return {
            "judge": f"HPS {self.version}",
            "weights_sha256": published.digest(self._places()[0]),
            "resize": clip_pairs.RESIZE.format(side=clip_vision.SIZES[_SIZE].image),
        }

    def _places(self) -> tuple[str, str]:
        """The weights and the vocabulary."""
        weights = published.HPS[self.version].find(self.weights, self.NAME)
        return weights, published.CLIP_WORDS.find(self.tokenizer_files, self.NAME)

"""The metric `pickscore`: CLIP ViT-H/14 fine-tuned on the choices of users of a text-to-image service."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from scaling_dit.data.sources import Source
from scaling_dit.encoders import clip_vision
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.features import clip_pairs, published
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, State

_SIZE = "openclip-h"


@dataclasses.dataclass(frozen=True)
class Pickscore(PerImage):
    """The trained factor, about 100, times the cosine of image and prompt (arXiv 2305.01569); about 20 for most.

    Attributes:
      weights: folder of the model; "" looks in $SCALING_DIT_WEIGHTS.
      tokenizer_files: vocabulary, if it does not lie beside the weights.
      batch: images at once.
    """

    NAME: ClassVar[str] = "pickscore"

    weights: str = ""
    tokenizer_files: str = ""
    batch: int = 64

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._place()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions, once the weights are found; raises Skipped if they are missing."""
        self._place()
        return super().items(source, count)

    def rows(self, batch: Batch) -> Sequence[Row]:
        """The score of each image."""
        place = self._place()
        pairs = clip_pairs.open_pairs(place, _SIZE, self.tokenizer_files, self.batch)
        cosines = pairs.cosines(batch.images, [item.prompt for item in batch.items])
        return [{"score": clip_pairs.logit_scale(place) * float(cosine)} for cosine in cosines]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean and its interval."""
        return super().result(state, rows, seed) | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The weights' checksum and how images are resized."""
        return {
            "judge": "PickScore v1",
            "weights_sha256": published.digest(self._place()),
            "resize": clip_pairs.RESIZE.format(side=clip_vision.SIZES[_SIZE].image),
        }

    def _place(self) -> str:
        return published.PICKSCORE.find(self.weights, self.NAME)

"""The metric `image_reward`: BLIP trained on people's rankings of images of one prompt."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.data.sources import Source
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.features import blip, clip_pairs, published
from scaling_dit.evaluation.features.sharded import Sharded
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, State

_SIZE = "large"


@dataclasses.dataclass(frozen=True)
class ImageReward(PerImage):
    """ImageReward v1.0 (arXiv 2304.05977), standardised: 0 is the mean of its training set, 1 its deviation.

    A caption is cut to 35 tokens. The mean over prompts of the mean over their images, if a request has several each.

    Attributes:
      weights: file of the network; "" looks in $SCALING_DIT_WEIGHTS.
      vocabulary: vocab.txt of bert-base-uncased; "" looks in $SCALING_DIT_WEIGHTS.
      batch: images at once.
    """

    NAME: ClassVar[str] = "image_reward"

    weights: str = ""
    vocabulary: str = ""
    batch: int = 32

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._places()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions, once weights and vocabulary are found; raises Skipped if they are missing."""
        self._places()
        return super().items(source, count)

    def rows(self, batch: Batch) -> Sequence[Row]:
        """The score of each image."""
        rewards = open_rewards(*self._places(), _SIZE, self.batch)
        scores = rewards(batch.images, [item.prompt for item in batch.items])
        return [{"score": float(score)} for score in scores]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The mean and its interval."""
        return super().result(state, rows, seed) | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The weights' checksum and how images are resized."""
        return {
            "judge": "ImageReward v1.0",
            "weights_sha256": published.digest(self._places()[0]),
            "resize": clip_pairs.RESIZE.format(side=blip.SIZES[_SIZE].image),
        }

    def _places(self) -> tuple[str, str]:
        """The weights and the vocabulary."""
        weights = published.IMAGE_REWARD.find(self.weights, self.NAME)
        return weights, published.BERT_WORDS.find(self.vocabulary, self.NAME)


# The last one; it holds its parameters on the devices.
@functools.lru_cache(maxsize=1)
def open_rewards(
    weights: str, vocabulary: str, size: str, batch: int
) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    """(images uint8 [B, H, W, 3], captions) -> rewards float32 [B].

    Args:
      weights: place of the network's weights.
      vocabulary: vocab.txt of bert-base-uncased.
      size: a name in `blip.SIZES`.
      batch: images at once.

    Raises:
      UserError: files that are missing, damaged or of something else.
    """
    shape, words = blip.SIZES[size], blip.Words(vocabulary)
    run = Sharded(functools.partial(blip.reward, shape), blip.load(weights, shape), batch)
    return lambda images, captions: run(clip_pairs.prepare(images, shape.image), *words(captions))

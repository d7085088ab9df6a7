"""CLIP's two towers as metrics use them: embeddings of images and captions, prepared as published.

The pooled state of a caption does not depend on its padding, since attention is causal. A caption of more than 77
tokens keeps its end token, as in the code of OpenAI and open_clip.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scaling_dit.encoders import clip_vision
from scaling_dit.encoders.clip_vision import VisionTower
from scaling_dit.errors import UserError
from scaling_dit.evaluation.features import pixels
from scaling_dit.evaluation.features.sharded import Latest, Sharded, placed
from scaling_dit.weights import places

RESIZE = "shorter side to {side}, Pillow bicubic, centre crop"


class ClipPairs:
    """Cosines between images and captions.

    Args:
      weights: place of both towers, with transformers' or open_clip's names.
      size: a name in `clip_vision.SIZES`.
      tokenizer_files: as the field of `ClipText`.
      batch: images at once.

    Raises:
      UserError: the files are missing, damaged or of another architecture.
    """

    def __init__(self, weights: str, size: str, tokenizer_files: str, batch: int) -> None:
        self._text = clip_vision.open_text(weights, size, tokenizer_files)
        self._texts = Sharded(self._embedded, self._text.load(), batch)
        self._images = open_tower(weights, size, batch)
        # Of an image that the tower takes as it is.
        self.side = clip_vision.SIZES[size].image

    def cosines(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Images uint8 [B, H, W, 3] and their captions -> float32 [B]."""
        # Row by row, so that no cosine depends on the others of its batch.
        return (self._images(images) * self._texts(*self._text.tokenize(captions))).sum(-1)

    def _embedded(self, params: Mapping[str, Any], ids: jax.Array, mask: jax.Array) -> jax.Array:
        return clip_vision.unit(self._text.apply(params, ids, mask)[2])


def embed(size: clip_vision.Size, params: Any, images: jax.Array) -> jax.Array:
    """Prepared images [B, S, S, 3] -> embeddings [B, P] of length 1."""
    found: Any = VisionTower(size).apply({"params": params}, images)
    return clip_vision.unit(found)


def prepare(images: np.ndarray, side: int) -> np.ndarray:
    """Images uint8 [B, H, W, 3] -> float32 [B, side, side, 3] as CLIP's towers take them."""
    return pixels.standardise(pixels.shorter_side(images, side), clip_vision.MEAN, clip_vision.STD)


# Of the metrics of one command; each holds its parameters on the devices.
@functools.lru_cache(maxsize=2)
def open_tower(weights: str, size: str, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """Images uint8 [B, H, W, 3] -> embeddings float32 [B, P] of length 1.

    Metrics that name the same weights share it, and its last results.

    Args:
      weights: place of the image tower.
      size: a name in `clip_vision.SIZES`.
      batch: images at once.

    Raises:
      UserError: the files are missing, damaged or of another architecture.
    """
    shape = clip_vision.SIZES[size]
    params = placed(clip_vision.load_vision, weights, shape)
    run = Sharded(functools.partial(embed, shape), params, batch)
    return Latest(lambda images: run(prepare(images, shape.image)))


def tower(weights: str, size: str, batch: int) -> tuple[Hashable, ...]:
    """What `Metric.tower` says of metrics that `open_tower` gives the same function."""
    return "clip", size, weights, batch


@functools.lru_cache(maxsize=2)
def open_pairs(weights: str, size: str, tokenizer_files: str, batch: int) -> ClipPairs:
    """As `ClipPairs`; metrics that name the same weights share it."""
    return ClipPairs(weights, size, tokenizer_files, batch)


@functools.lru_cache(maxsize=2)
def logit_scale(weights: str) -> float:
    """The factor of the cosines with which a CLIP was trained: the exponential of its entry `logit_scale`.

    Raises:
      UserError: the files have no such entry.
    """
    opened = places.open_weights(weights, part="image_encoder", classes=(), field="weights")
    if "logit_scale" not in opened.tensors:
        raise UserError(f"{weights} has no entry logit_scale")
    return float(np.exp(np.float64(opened.tensors["logit_scale"].item())))

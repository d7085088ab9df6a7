"""Exact captions of the built-in scenes, read from pixels: a perfect captioner at no cost."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from scaling_dit.curation.captioning import Scored
from scaling_dit.data.shapes import oracle
from scaling_dit.data.shapes.scenes import PRESETS, Draws, Scene
from scaling_dit.data.shapes.text import caption
from scaling_dit.errors import UserError, nearest


@dataclasses.dataclass
class ShapesCaptioner:
    """Captions images of one preset. All captions are equally good, so they have no scores.

    An image of another size, or without recognisable objects, has no captions.

    Attributes:
      preset: a preset of `data.shapes`.
      captions: number of captions per image, with random wording and order.
      level: 0 to 4, the kinds of facts, as in `source.caption_level`.
      mention_probability: of each fact.
    """

    preset: str = "grid16"
    captions: int = 5
    level: int = 4
    mention_probability: float = 1.0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset}: {nearest(self.preset, PRESETS)}")
        if self.captions < 1 or not 0 <= self.level <= 4 or not 0 <= self.mention_probability <= 1:
            raise UserError(
                "the captioner needs captions from 1, level 0 to 4 and mention_probability 0 to 1"
            )

    def caption(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[list[Scored]]:
        """See `Captioner`."""
        return [self._caption_image(image, seed) for image, seed in zip(images, seeds, strict=True)]

    def _caption_image(self, image: Image.Image, seed: int) -> list[Scored]:
        canvas = PRESETS[self.preset].canvas
        seen = oracle.read(np.asarray(image), self.preset).objects if image.size == (canvas, canvas) else ()
        if not seen:
            return []
        scene = Scene(self.preset, tuple(seen))
        draws = [Draws("caption", seed, number) for number in range(self.captions)]
        return [
            (caption(scene, self.level, self.mention_probability, draw, plain=False), None) for draw in draws
        ]

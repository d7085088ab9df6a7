"""The built-in source: scenes of shapes, rendered when they are asked for."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from scaling_dit.data.shapes.scenes import (
    PALETTE,
    PRESETS,
    STREAMS,
    UNLIMITED,
    Draws,
    ObjectMasks,
    Scene,
    ShapesSpec,
    distinct_held_out_scenes,
    make_scene,
    render,
)
from scaling_dit.data.shapes.text import OPENINGS, SYNONYMS, Captions, caption, questions
from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError


@dataclasses.dataclass(frozen=True)
class ShapesSource(ShapesSpec):
    """Images and captions of compositional scenes; the same fields always give the same records.

    The held-out split says everything up to `prompt_level`, whatever the training captions leave out or get wrong,
    so runs that differ in caption density are evaluated on the same prompts and questions.

    Attributes:
      paraphrases: captions per record; the first is worded plainly, each mentions facts of its own random choice.
      prompt_level: caption level (1 to 4) of held-out prompts and of questions.
      split: "train" or "held_out".

    Raises:
      UserError: see `ShapesSpec`; also an empty held-out split or a wrong level.
    """

    paraphrases: int = 4
    prompt_level: int = 4
    split: str = dataclasses.field(default="train", metadata={"config": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paraphrases < 1:
            raise UserError(f"source.paraphrases: must be at least 1, got {self.paraphrases}")
        if not 1 <= self.prompt_level <= 4:
            raise UserError(f"source.prompt_level: must be 1 to 4, got {self.prompt_level}")
        if self.wrong_caption_rate > 0 and self.scenes == 1:
            raise UserError(
                "source.wrong_caption_rate: there is no other scene to take captions from; raise scenes"
            )

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return PRESETS[self.preset].canvas

    def __len__(self) -> int:
        return self.scenes if self.scenes and self.split == "train" else UNLIMITED

    def __getitem__(self, index: int, /) -> Record:
        """Record `index`; raises IndexError past the end."""
        index = self._checked(index)
        scene = make_scene(self, self.split, index)
        described = self._described(index, scene)
        captions = Captions(lambda number: self._caption(described, index, number), self.paraphrases)
        return {
            "image": render(scene),
            "captions": captions,
            "objects": ObjectMasks(scene),
            "key": self._key(index),
        }

    def scene(self, index: int) -> Scene:
        """The scene graph of record `index`."""
        return make_scene(self, self.split, self._checked(index))

    def questions(self, index: int) -> list[dict[str, Any]]:
        """TIFA rows about record `index` (see `text.questions`): what its full caption says, plainly worded."""
        scene = self.scene(index)
        text = caption(scene, self.prompt_level, 1.0, Draws(), plain=True)
        return questions(scene, text, self._key(index), self.prompt_level)

    def held_out(self) -> "ShapesSource":
        """The held-out split; raises UserError if nothing is held out."""
        if not self.held_out_fraction and not self.held_out_combinations:
            raise UserError(
                "source.held_out_fraction: nothing is held out for evaluation; give a fraction above 0, such as 0.2"
            )
        return dataclasses.replace(self, split="held_out")

    def distinct(self, count: int) -> list[int]:
        """The first `count` indices of the held-out split whose images all differ; UserError if there are fewer."""
        return distinct_held_out_scenes(self, count)

    def describe(self) -> str:
        """One line for logs."""
        number = "unlimited" if len(self) == UNLIMITED else str(len(self))
        objects = f"{self.min_objects}-{self.max_objects} objects"
        side = self.image_size
        return f"compositional shapes ({self.preset}, {side}x{side} px, {objects}), {self.split}: {number} scenes"

    def texts(self) -> Iterator[str]:
        """Sentences that hold every word that any caption of these shapes can use, at any level and density.

        A word list made of them depends neither on the number of scenes nor on the caption policy, so models of a
        study have equally many parameters.
        """
        preset = PRESETS[self.preset]
        for opening in OPENINGS:
            yield opening + "some shapes"
        for noun in (*(self.shapes or preset.shapes), "shape"):
            yield f"a {noun}, the {noun} and a {noun}"
        yield from self.colours or PALETTE
        used = [
            variants
            for word, variants in SYNONYMS.items()
            if word not in ("small", "large") or len(preset.pixels) > 1
        ]
        for variants in used:
            yield from variants

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        return int(index)

    def _key(self, index: int) -> str:
        return f"shapes-{self.preset}-{self.seed}-{STREAMS[self.split]}-{index}"

    def _caption(self, scene: Scene, index: int, number: int) -> str:
        draws = Draws("caption", self.seed, STREAMS[self.split], index, number)
        if self.split == "held_out":
            return caption(scene, self.prompt_level, 1.0, draws, plain=number == 0)
        return caption(scene, self.caption_level, self.mention_probability, draws, plain=number == 0)

    def _described(self, index: int, scene: Scene) -> Scene:
        """The scene that the captions of a record describe: its own, or for some training records another."""
        draws = Draws("wrong caption", self.seed, index)
        if self.split == "held_out" or not draws.chance(self.wrong_caption_rate):
            return scene
        for _ in range(100):
            other = make_scene(self, self.split, draws.below(len(self)))
            if other.canonical() != scene.canonical():
                return other
        raise UserError(
            "source.wrong_caption_rate: nearly all scenes are the same; allow more shapes, colours or scenes"
        )

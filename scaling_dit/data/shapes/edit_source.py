"""The source `shapes_edits`: pairs of scenes and the instruction that leads from one to the other."""

import dataclasses
from collections.abc import Iterator

from scaling_dit.data.shapes.edits import (
    DIRECTIONS,
    KINDS,
    WORDINGS,
    Edit,
    instruction,
    make_edit,
    possible,
)
from scaling_dit.data.shapes.scenes import (
    PALETTE,
    PRESETS,
    STREAMS,
    UNLIMITED,
    Draws,
    ShapesSpec,
    distinct_held_out,
    render,
)
from scaling_dit.data.shapes.text import RELATIONS, SYNONYMS, Captions
from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError, nearest


def _not_a_field(default: float | int) -> int:
    """A field of the spec that says how scenes are captioned, which edits are not."""
    return dataclasses.field(default=default, metadata={"config": False})  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class ShapesEditsSource(ShapesSpec):
    """Edits of scenes: the image after it, the instruction as caption, the image before it as condition "edit".

    The fields are those of the scenes (`ShapesSpec`), before and after the edit; `scenes` counts edits.

    Attributes:
      edits: kinds of edits, see `edits`; () = all that the scenes allow. They are equally frequent.
      paraphrases: instructions per record; the first is worded plainly.
      split: "train" or "held_out".

    Raises:
      UserError: see `ShapesSpec`; also a kind of edit that does not exist or that the scenes do not allow.
    """

    max_objects: int = 3
    caption_level: int = _not_a_field(4)
    mention_probability: float = _not_a_field(1.0)
    wrong_caption_rate: float = _not_a_field(0.0)
    edits: tuple[str, ...] = ()
    paraphrases: int = 2
    split: str = dataclasses.field(default="train", metadata={"config": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paraphrases < 1:
            raise UserError(f"source.paraphrases: must be at least 1, got {self.paraphrases}")
        allowed = possible(self)
        for kind in self.edits:
            if kind not in KINDS:
                raise UserError(f"source.edits: no edit {kind!r}; {nearest(kind, KINDS)}")
            if kind not in allowed:
                raise UserError(
                    f"source.edits: scenes of preset {self.preset!r} with at most {self.max_objects} objects and "
                    f"these colours and sizes allow no {kind!r}; they allow {', '.join(allowed)}"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of edits, in their order."""
        return self.edits or possible(self)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return PRESETS[self.preset].canvas

    def __len__(self) -> int:
        return self.scenes if self.scenes and self.split == "train" else UNLIMITED

    def __getitem__(self, index: int, /) -> Record:
        """Record `index`; raises IndexError past the end."""
        edit = self.edit(index)

        def say(number: int) -> str:
            draws = Draws("instruction", self.seed, STREAMS[self.split], int(index), number)
            return instruction(edit, draws, plain=number == 0)

        return {
            "image": render(edit.target),
            "captions": Captions(say, self.paraphrases),
            "conditions": {"edit": render(edit.source)},
            "key": f"edit-{self.preset}-{self.seed}-{STREAMS[self.split]}-{index}",
        }

    def edit(self, index: int) -> Edit:
        """The edit of record `index`, with both scenes."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        return make_edit(self, self.kinds, self.split, int(index))

    def held_out(self) -> "ShapesEditsSource":
        """The held-out split; raises UserError if nothing is held out."""
        if not self.held_out_fraction and not self.held_out_combinations:
            raise UserError(
                "source.held_out_fraction: nothing is held out for evaluation; give a fraction above 0, such as 0.2"
            )
        return dataclasses.replace(self, split="held_out")

    def distinct(self, count: int) -> list[int]:
        """The first `count` indices of the held-out split whose edits all differ; UserError if there are fewer."""
        held_out = self.held_out()

        def scenes(index: int) -> tuple[str, str]:
            edit = held_out.edit(index)
            return edit.source.canonical(), edit.target.canonical()

        return distinct_held_out(self, count, "edits", scenes, 20 * count + 500)

    def describe(self) -> str:
        """One line for logs."""
        number = "unlimited" if len(self) == UNLIMITED else str(len(self))
        side, kinds = self.image_size, ", ".join(self.kinds)
        return f"edits of shapes ({self.preset}, {side}x{side} px; {kinds}), {self.split}: {number}"

    def texts(self) -> Iterator[str]:
        """Sentences that hold every word that any instruction can use, whichever kinds are chosen."""
        for wordings in WORDINGS.values():
            yield from (wording.format(a="", b="", new="") for wording in wordings)
        yield from self.shapes or PRESETS[self.preset].shapes
        yield from self.colours or PALETTE
        yield from DIRECTIONS
        for word in (*PRESETS[self.preset].pixels, *RELATIONS):
            yield from SYNONYMS[word]

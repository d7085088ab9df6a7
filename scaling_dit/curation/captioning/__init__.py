"""Captioners, one file each, and the runner that captions a whole source.

`transformers:FOLDER` is a captioning model of transformers, such as BLIP-2. `openai:URL` is a server with OpenAI's chat
interface. `shapes` reads images of the built-in scenes exactly. "package.module:Name" is a user's own captioner,
whose answers are checked.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from scaling_dit.components import BackEnds, Registry, check_methods, describe, one_line
from scaling_dit.errors import UserError

# A caption and its score among the captions of its image, or None without a score.
Scored = tuple[str, float | None]
_BACK_ENDS = BackEnds(
    Registry(
        "captioner",
        {
            "transformers": "scaling_dit.curation.captioning.transformers_models:TransformersCaptioner",
            "openai": "scaling_dit.curation.captioning.endpoint:EndpointCaptioner",
            "shapes": "scaling_dit.curation.captioning.scenes:ShapesCaptioner",
        },
    ),
    {"transformers": "folder", "openai": "url"},
    "--option",
)


class Captioner(Protocol):
    """Writes captions for images."""

    def caption(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[list[Scored]]:
        """The captions of a batch.

        Args:
          images: RGB, of any size.
          seeds: one per image. Equal images with equal seeds get equal captions in any batch, apart from rounding.

        Returns:
          For each image its captions in any order; an empty list for an image that cannot be captioned.
        """


def create_captioner(name: str, options: Mapping[str, str]) -> Captioner:
    """A captioner by name.

    Args:
      name: see the module.
      options: field -> value as text, converted to the type of the field's default.

    Raises:
      UserError: the name or a field is unknown, a value has the wrong type, or the captioner cannot start.
    """
    captioner: Captioner = _BACK_ENDS.create(name, options)
    kind = _BACK_ENDS.split(name)[0]
    if not _BACK_ENDS.is_own(kind):
        return captioner
    check_methods(captioner, f"captioner {kind!r}", {"caption": "images, seeds"})
    return _Checked(captioner, f"captioner {kind!r}: caption()")


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A captioner of a user's own whose answers are checked, each batch of them."""

    captioner: Captioner
    what: str

    def caption(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[list[Scored]]:
        """See `Captioner`.

        Raises:
          UserError: whatever the captioner raises, or an answer that is not what `Captioner` says.
        """
        with one_line(self.what):
            answers = self.captioner.caption(images, seeds)
        if not isinstance(answers, list) or len(answers) != len(images):
            found = f"{len(answers)} answers" if isinstance(answers, list) else describe(answers)
            raise UserError(
                f"{self.what} returned {found} for {len(images)} images; it must return a list for each"
            )
        for answer in answers:
            if not (isinstance(answer, list) and all(map(_is_scored, answer))):
                raise UserError(
                    f"{self.what} returned {answer!r} for an image; it must return a list of (text, score), score None "
                    "where there is none"
                )
        return answers


def _is_scored(caption: Any) -> bool:
    if not (isinstance(caption, tuple) and len(caption) == 2 and isinstance(caption[0], str)):
        return False
    return caption[1] is None or (isinstance(caption[1], int | float) and not isinstance(caption[1], bool))

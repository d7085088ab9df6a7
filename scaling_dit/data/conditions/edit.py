"""The condition "edit": the image that an instruction is about, of pairs such as those of the source `shapes_edits`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.data.conditions import contract
from scaling_dit.errors import UserError


@dataclasses.dataclass(frozen=True)
class Edit:
    """The source image of a pair; a `contract.Condition` without masks."""

    masks: ClassVar[int] = 0

    def make(self, record: Mapping[str, Any], generator: np.random.Generator) -> np.ndarray:
        """Nothing can be made: records carry this condition themselves.

        Raises:
          UserError: this one does not.
        """
        raise UserError(
            f"record {record.get('key')!r} carries no condition 'edit', the image before the edit; train on pairs: "
            "the source shapes_edits, or files beside the images, which config.source.conditions names"
        )

    def read(self, files: Sequence[str]) -> np.ndarray:
        """The image to edit, uint8 [H, W, 3]; raises UserError for more than one file, or no image."""
        return contract.read_files(files, self.masks)

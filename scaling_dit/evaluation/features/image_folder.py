"""A plain folder of real images, without captions, as a source of statistics."""

import dataclasses
import functools
from typing import Self

from etils import epath

from scaling_dit.data import images
from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Every image in a folder and the folders below, in the order of their names.

    Attributes:
      path: the folder, local or gs://.
      image_size: height and width in pixels that every image is brought to: the largest centred square, resized.

    Raises:
      UserError: no image in it.
    """

    path: str
    image_size: int

    def __post_init__(self) -> None:
        if not self._files:
            raise UserError(f"no image in {self.path} or below: no file that ends in {', '.join(_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Record:
        """One image; its name is the caption. Raises UserError if it is damaged."""
        file = self._files[index]
        decoded = images.decode(images.read_bytes(file, str(file)), str(file), file.name)
        pixels = images.fit(decoded, self.image_size, self.image_size)
        return {"image": pixels, "captions": [file.name], "key": str(file)}

    def describe(self) -> str:
        """One line for results."""
        return f"{len(self):,} images in {self.path}"

    def held_out(self) -> Self:
        """Raises UserError: a folder of real images has no splits."""
        raise UserError(f"the images in {self.path} have no held-out split")

    @functools.cached_property
    def _files(self) -> list[epath.Path]:
        found: list[epath.Path] = []
        folders = [epath.Path(self.path)]
        while folders:
            for entry in folders.pop().iterdir():
                if entry.is_dir():
                    folders.append(entry)
                elif entry.name.lower().endswith(_SUFFIXES):
                    found.append(entry)
        return sorted(found, key=str)

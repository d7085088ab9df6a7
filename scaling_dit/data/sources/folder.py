"""A folder of images with a `metadata.jsonl` beside them, the Hugging Face imagefolder convention.

Each line of `metadata.jsonl` is a JSON object with `file_name` (relative to the folder) and `text` (one caption) or
`texts` (a list of captions); other keys are ignored.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError, nearest

METADATA = "metadata.jsonl"


class Row(NamedTuple):
    """One line of the metadata."""

    file_name: str
    texts: tuple[str, ...]
    line: int  # 1-based, for error messages


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Images and captions of one folder, as RGB squares.

    Attributes:
      path: the folder, local or gs://.
      image_size: height and width, in pixels, that every image is brought to.
      held_out_fraction: share of the images kept for evaluation, chosen by a hash of the file name alone, so that an
        image stays on its side when others are added or removed.

    Raises:
      UserError: no such folder, no or damaged `metadata.jsonl`, or no image left to train on.
    """

    path: str = dataclasses.field(metadata={"config": False})  # of the source's name
    image_size: int = 64
    held_out_fraction: float = 0.05
    split: str = dataclasses.field(default="train", metadata={"config": False})  # train | held_out

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"source.image_size is {self.image_size}; it must be at least 1 pixel")
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"source.held_out_fraction is {self.held_out_fraction}; it must be in [0, 1)")
        if not self._rows:
            raise UserError(
                f"{self._metadata}: no images in the {self.split} split "
                f"(source.held_out_fraction is {self.held_out_fraction})"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Record:
        """Reads and decodes one image.

        Raises:
          UserError: the file is missing or no image.
        """
        row = self._rows[index]
        try:
            with (epath.Path(self.path) / row.file_name).open("rb") as file, Image.open(file) as image:
                pixels = to_square(image, self.image_size)
        except FileNotFoundError:
            raise UserError(f"{self._where(row)}: no file {row.file_name!r} in {self.path}") from None
        except OSError as error:
            raise UserError(f"{self._where(row)}: cannot read image {row.file_name!r}: {error}") from error
        return {"image": pixels, "captions": row.texts, "key": row.file_name}

    def describe(self) -> str:
        """One line for logs."""
        size = f"{self.image_size}x{self.image_size}"
        return f"folder {self.path}: {len(self):,} images, {size} px, {self.split} split"

    def held_out(self) -> "FolderSource":
        """The images kept for evaluation; raises UserError if there are none."""
        return dataclasses.replace(self, split="held_out")

    def texts(self) -> Iterator[str]:
        """Every caption of this split, without reading an image."""
        for row in self._rows:
            yield from row.texts

    @property
    def _metadata(self) -> epath.Path:
        return epath.Path(self.path) / METADATA

    def _where(self, row: Row) -> str:
        return f"{self._metadata} line {row.line}"

    @functools.cached_property
    def _rows(self) -> tuple[Row, ...]:
        rows = read_metadata(self._metadata)
        held_out = {row.file_name for row in rows if file_hash(row.file_name) < self.held_out_fraction}
        if not held_out and self.held_out_fraction and len({row.file_name for row in rows}) > 1:
            held_out = {
                min((row.file_name for row in rows), key=file_hash)
            }  # a small folder still has a split
        return tuple(row for row in rows if (row.file_name in held_out) == (self.split == "held_out"))


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: RGB, the shorter side brought to `size`, the centre cut out.

    Antialiased bicubic resampling; an image of that size already is returned as it is. Transparent pixels are shown
    on white, and the orientation a camera recorded is applied.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def file_hash(file_name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on any machine."""
    digest = hashlib.blake2b(file_name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def read_metadata(path: epath.Path) -> list[Row]:
    """The rows of a `metadata.jsonl`; blank lines are skipped.

    Raises:
      UserError: missing file, or a damaged line, named by its number.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"no folder {path.parent}; source folder:PATH needs a folder of images with a {METADATA}"
        )
    if not path.exists():
        raise UserError(
            f'{path} is missing; write one line {{"file_name": "a.png", "text": "a caption"}} per image'
        )
    # Split on bytes: str.splitlines would also split at U+2028 and others, which are legal inside a JSON string.
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_parse(path, number, line) for number, line in lines if line.strip()]


def _parse(path: epath.Path, number: int, line: bytes) -> Row:
    where = f"{path} line {number}"
    try:
        entry: Any = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(entry).__name__}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise UserError(f"{where}: no 'file_name' (a string); {nearest('file_name', entry)}")
    texts = entry.get("texts", [entry["text"]] if "text" in entry else None)
    if texts is None:
        raise UserError(f"{where}: no 'text' (a string) or 'texts' (a list); {nearest('text', entry)}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: 'text' must be a string, 'texts' a list of at least one string")
    return Row(file_name, tuple(texts), number)

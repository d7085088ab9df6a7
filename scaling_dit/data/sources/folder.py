"""A folder of images with a `metadata.jsonl` beside them, the Hugging Face imagefolder convention.

Each line of `metadata.jsonl` is a JSON object with `file_name` (relative to the folder) and `text` (one caption) or
`texts` (a list of captions); other keys are ignored. One line per image: several captions go into `texts`.

What is right with a file is used: of an animation the first frame, of 16-bit grey the upper byte, transparent pixels
on white, the orientation that a camera recorded. What is not is a damaged record (`data/damage.py`), of one kind:

    bad_json          a line that is no JSON, or not UTF-8
    bad_line          JSON of another form: no object, a key missing or of a wrong type
    empty_caption     every caption is blank (blank ones beside others are left out)
    outside_folder    an absolute file name, or one that leaves the folder with ".."
    duplicate_file    a file that an earlier line has already
    missing_file      no such file
    unreadable_image  truncated, no image, or of a format or pixel type that is not read
    too_large         more pixels than `max_pixels`, known from the header; it is not decoded

The first five are found when the folder is opened, and such lines are no records. The others are met when an image is
read, and another image of the folder stands in. A store that fails for another reason (a disk, a network) is no
damaged record: the run stops.
"""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import posixpath
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from scaling_dit.data.damage import Damage, DamagedRecord
from scaling_dit.data.sources import Record
from scaling_dit.errors import UserError, nearest

METADATA = "metadata.jsonl"
# Those that Pillow decodes itself; others would run programs of the system (EPS: Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_PILLOW_MAX_PIXELS = 2 * 89_478_485  # Pillow refuses more, and warns from half of it on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `max_pixels` decides


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
      max_pixels: larger images are damaged records.
      max_damaged: damaged records to go on without, lines and images together; 0 stops at the first.
      damage: those met so far, in both splits.

    Raises:
      UserError: no such folder or `metadata.jsonl`, too many damaged lines in it, or no image left to train on.
    """

    path: str = dataclasses.field(metadata={"config": False})  # of the source's name
    image_size: int = 64
    held_out_fraction: float = 0.05
    max_pixels: int = 2**26  # 8192 x 8192
    max_damaged: int = 0
    split: str = dataclasses.field(default="train", metadata={"config": False})  # train | held_out
    damage: Damage = dataclasses.field(default=None, metadata={"config": False}, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"source.image_size is {self.image_size}; it must be at least 1 pixel")
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"source.held_out_fraction is {self.held_out_fraction}; it must be in [0, 1)")
        if not 1 <= self.max_pixels <= _PILLOW_MAX_PIXELS:
            raise UserError(
                f"source.max_pixels is {self.max_pixels}; it must be from 1 to {_PILLOW_MAX_PIXELS}"
            )
        if self.max_damaged < 0:
            raise UserError(f"source.max_damaged is {self.max_damaged}; it must be 0 or more")
        if self.damage is None:
            object.__setattr__(self, "damage", Damage(self.max_damaged, "config.source.max_damaged"))
        if not self._rows:
            raise UserError(
                f"{self._metadata}: no images in the {self.split} split "
                f"(source.held_out_fraction is {self.held_out_fraction})"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Record:
        """Reads and decodes one image, or the one that stands in for it if it is damaged.

        Raises:
          IndexError: past the end.
          UserError: more damaged records than `max_damaged`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        return self.damage.read(int(index), len(self), lambda i: self._read(self._rows[i]))

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

    def _read(self, row: Row) -> Record:
        where = f"{self._metadata} line {row.line}"
        pixels = read_image(epath.Path(self.path) / row.file_name, where, self.image_size, self.max_pixels)
        return {"image": pixels, "captions": row.texts, "key": row.file_name}

    @functools.cached_property
    def _rows(self) -> tuple[Row, ...]:
        rows, faults = read_metadata(self._metadata)
        self.damage.meet_all(faults)
        held_out = {row.file_name for row in rows if file_hash(row.file_name) < self.held_out_fraction}
        if not held_out and self.held_out_fraction and len({row.file_name for row in rows}) > 1:
            held_out = {
                min((row.file_name for row in rows), key=file_hash)
            }  # a small folder still has a split
        return tuple(row for row in rows if (row.file_name in held_out) == (self.split == "held_out"))


def scan(path: str, *, image_size: int = 64, max_pixels: int = FolderSource.max_pixels) -> Damage:
    """Reads every line and image of a folder, both splits: exact counts by kind, and the damaged records themselves.

    Raises:
      UserError: no such folder or `metadata.jsonl`.
    """
    damage = Damage()
    metadata = epath.Path(path) / METADATA
    rows, faults = read_metadata(metadata)
    damage.meet_all(faults)
    for row in rows:
        try:
            read_image(metadata.parent / row.file_name, f"{metadata} line {row.line}", image_size, max_pixels)
        except DamagedRecord as fault:
            damage.meet(fault, tell=False)
    return damage


def read_image(path: epath.Path, where: str, size: int, max_pixels: int) -> np.ndarray:
    """The `to_square` uint8 [size, size, 3] of an image file.

    Raises:
      DamagedRecord: missing_file, unreadable_image or too_large, at `where`.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DamagedRecord("missing_file", where, f"no file {path.name!r} in {path.parent}") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise UserError(f"{where}: cannot read file {path}: {error}") from error
        raise DamagedRecord(
            "missing_file", where, f"no file can have the name {path.name[:40]!r}..."
        ) from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return to_square(image, size)
    except Image.DecompressionBombError as error:
        raise DamagedRecord("too_large", where, f"image {path.name!r}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
        # Pillow's own message would show an address in memory.
        why = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedRecord("unreadable_image", where, f"cannot read image {path.name!r}: {why}") from error
    what = f"image {path.name!r} has {width}x{height} pixels; source.max_pixels is {max_pixels}"
    raise DamagedRecord("too_large", where, what)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: RGB, the shorter side brought to `size`, the centre cut out.

    Antialiased bicubic resampling; an image of that size already is returned as it is. Transparent pixels are shown
    on white, and the orientation a camera recorded is applied.

    Raises:
      ValueError: floating-point pixels, whose range is not known; for damaged data whatever Pillow raises.
    """
    image.load()  # damage to the pixels shows here
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the orientation
        image = image.copy()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save 8 or 16 bits")
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


def read_metadata(path: epath.Path) -> tuple[list[Row], list[DamagedRecord]]:
    """The rows of a `metadata.jsonl`, and its damaged lines; blank lines are skipped.

    Raises:
      UserError: missing folder or file.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"no folder {path.parent}; source folder:PATH needs a folder of images with a {METADATA}"
        )
    if not path.exists():
        raise UserError(
            f'{path} is missing; write one line {{"file_name": "a.png", "text": "a caption"}} per image'
        )
    rows: dict[str, Row] = {}
    faults = []
    # Split on bytes: str.splitlines would also split at U+2028 and others, which are legal inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = _parse(where, number, line)
            if row.file_name in rows:
                before = rows[row.file_name].line
                what = f"{row.file_name!r} is on line {before} already; several captions go into 'texts'"
                raise DamagedRecord("duplicate_file", where, what)
            rows[row.file_name] = row
        except DamagedRecord as fault:
            faults.append(fault)
    return list(rows.values()), faults


def _parse(where: str, number: int, line: bytes) -> Row:
    try:
        entry: Any = json.loads(line.decode("utf-8-sig"))
        json.dumps(entry, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DamagedRecord("bad_json", where, f"not JSON: {error}") from None

    def bad_line(what: str) -> DamagedRecord:
        return DamagedRecord("bad_line", where, what)

    if not isinstance(entry, dict):
        raise bad_line(f"a JSON object is needed, not {type(entry).__name__}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
        raise bad_line(f"no 'file_name' (a string); {nearest('file_name', entry)}")
    texts = entry.get("texts", [entry["text"]] if "text" in entry else None)
    if texts is None:
        raise bad_line(f"no 'text' (a string) or 'texts' (a list); {nearest('text', entry)}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise bad_line("'text' must be a string, 'texts' a list of at least one string")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DamagedRecord("empty_caption", where, f"the caption of {file_name!r} is empty")
    normal = posixpath.normpath(file_name)
    if normal.startswith(("/", "../")) or normal in (".", "..") or "://" in file_name:
        what = f"file_name {file_name!r} leaves the folder; it must be relative to it"
        raise DamagedRecord("outside_folder", where, what)
    return Row(normal, tuple(texts), number)

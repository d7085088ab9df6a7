"""Images that exist already, in a folder that `sample` wrote or that holds `ID.png` or `ID.jpg` for each prompt."""

import collections
import json
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Item
from scaling_dit.files import expand
from scaling_dit.monitor.grid import read_png
from scaling_dit.sampling.folder import GRID, MANIFEST
from scaling_dit.sampling.shards import ARRAY_RECORD, TAR, read_shard

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_SHARDS = (f".{TAR}", f".{ARRAY_RECORD}")


class GivenImages:
    """The images of some items, as far as they are sound.

    An image that is missing, damaged or of another size than most is left out, with one line each. Every image is read
    once to know that.

    Args:
      folder: of the images.
      items: whose images are wanted.

    Raises:
      UserError: no such folder, or not one sound image.
    """

    def __init__(self, folder: str, items: Sequence[Item]) -> None:
        self.folder = epath.Path(expand(folder))
        if not self.folder.is_dir():
            raise UserError(f"--images={folder}: no such folder")
        self._paths = _listed(self.folder)
        self._shard: tuple[str, dict[str, np.ndarray]] = ("", {})
        sizes: dict[int, tuple[int, ...]] = {}
        self.faults: dict[str, str] = {}
        for number, item in enumerate(items):
            try:
                sizes[number] = self._load(item.id).shape
            except (OSError, UserError, KeyError) as error:
                self.faults[item.id] = _reason(error)
        if not sizes:
            first = next(iter(self.faults.items()), ("", "there are no prompts"))
            raise UserError(f"--images={folder}: not one image can be scored; {first[0]}: {first[1]}")
        ((size, _),) = collections.Counter(sizes.values()).most_common(1)
        for number, shape in sizes.items():
            if shape != size:
                self.faults[items[number].id] = (
                    f"it is {shape[1]}x{shape[0]} px, most others {size[1]}x{size[0]}"
                )
        # Numbers of the items with a sound image.
        self.sound = [number for number, shape in sizes.items() if shape == size]
        self._ids = [items[number].id for number in self.sound]
        for key, why in self.faults.items():
            logging.warning("image of %s is left out: %s", key, why)

    def read(self, numbers: range) -> Iterator[np.ndarray]:
        """The sound images of these numbers among the sound ones, one at a time: uint8 [1, H, W, 3]."""
        for number in numbers:
            yield self._load(self._ids[number])[None]

    def path(self, key: str) -> str:
        """Where the image of an id lies, from the folder."""
        return self._paths.get(key) or next(
            (f"{key}{end}" for end in _ENDINGS if (self.folder / f"{key}{end}").exists()), f"{key}.png"
        )

    def _load(self, key: str) -> np.ndarray:
        path = self.path(key)
        shard, _, inside = path.partition("/")
        if not inside or (self.folder / path).exists():
            return read_png(self.folder / path)
        # One shard is held at a time, as images are asked for in their order.
        if self._shard[0] != shard:
            self._shard = (shard, {row["id"]: image for row, image in read_shard(self.folder / shard)})
        return self._shard[1][key]


def image_size(folder: str) -> int:
    """Height of the first sound image of a folder, in pixels.

    Raises:
      UserError: there is none.
    """
    place = epath.Path(expand(folder))
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        try:
            if path.suffix in _ENDINGS and path.name != GRID:
                return read_png(path).shape[0]
            if path.suffix in _SHARDS:
                return next(read_shard(path))[1].shape[0]
        except (OSError, UserError):
            continue
    raise UserError(f"--images={folder}: no image that can be read")


def _listed(folder: epath.Path) -> dict[str, str]:
    """id -> path of the images that the folder's manifest lists; empty without one."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().split("\n"):
        if line.strip():
            try:
                row = json.loads(line)
                found[str(row["id"])] = str(row["path"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} has a line that is no row of a manifest: {line[:80]!r}") from None
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, KeyError):
        return "its shard does not hold it"
    return f"it cannot be decoded ({error})"

"""Statistics of real images: built once from a source, kept in one file, and compared with by several metrics.

The file is in safetensors' format: count, mean and scatter of the features in float64 (`moments.py`), and the features
themselves in float32, which KID, CMMD and MIND need. Its metadata say which images, network and weights they are of,
and how the images were cropped and resized. Moments that others published, as an .npz with `mu` and `sigma`, can be
read too.
"""

import dataclasses
import functools
import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base
from scaling_dit.evaluation.features import kernels, moments, published
from scaling_dit.evaluation.features.moments import Gaussian
from scaling_dit.evaluation.features.networks import Features, Network
from scaling_dit.evaluation.features.tables import FeatureTable
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State
from scaling_dit.evaluation.parts import InFolder
from scaling_dit.evaluation.scoring import Scoring

SUFFIX = ".safetensors"
_FORMAT = "scaling-dit reference 1"
_TYPES = {"n": "<i8", "mean": "<f8", "scatter": "<f8"}
_NAMES = {"<i8": "I64", "<f8": "F64", "<f4": "F32"}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images.

    Attributes:
      gaussian: mean and covariance of their features.
      count: the number of images; 0 where it is not known.
      table: their features; None where only moments are known.
      described: what is known of them, JSON values.
    """

    gaussian: Gaussian
    count: int
    table: FeatureTable | None
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_table(cls, table: FeatureTable) -> "Reference":
        """Of features that are there already."""
        state = moments.of_blocks(table.blocks(), table.width)
        return cls(Gaussian.of(state), len(table), table)

    def features(self, metric: str) -> FeatureTable:
        """The features of every image.

        Raises:
          UserError: only their moments are known.
        """
        if self.table is None:
            where = self.described.get("file", "the reference")
            raise UserError(
                f"metric {metric!r} needs the features of all real images, {where} holds moments only; build one with "
                "evaluate --reference=SOURCE"
            )
        return self.table

    @functools.cached_property
    def kernel_mean(self) -> float:
        """CMMD's mean of the kernel over all pairs of real images."""
        table = self.features("cmmd")
        return kernels.kernel_mean(table, table)

    def about(self) -> dict[str, Any]:
        """What a result says of it."""
        return dict(self.described)


def open_reference(place: str, network: Network, weights: str) -> Reference:
    """Reads statistics, and makes sure that they are of this network with these weights.

    Args:
      place: a file of `build`, a folder of such files, or an .npz with `mu` and `sigma`.
      network: the metric's network.
      weights: the checksum of its weights.

    Raises:
      UserError: no such file, damage, or statistics of something else.
    """
    path = epath.Path(files.expand(place))
    if path.is_dir():
        path = path / f"{network.name}{SUFFIX}"
    if not path.exists():
        raise UserError(f"no reference {path}; evaluate --reference=SOURCE builds one")
    found = _opened(str(path), (path.stat().length, path.stat().mtime))
    if found.gaussian.mean.shape != (network.width,):
        raise UserError(
            f"{path} holds {len(found.gaussian.mean)} features, {network.name} has {network.width}"
        )
    for key, wanted in (("network", network.name), ("weights_sha256", weights)):
        if found.described.get(key, wanted) != wanted:
            raise UserError(
                f"{path} was built with {key} {found.described[key]}, the metric has {wanted}; build it anew"
            )
    return found


def is_folder_of_images(path: epath.Path) -> bool:
    """Whether a place is a folder without statistics."""
    return path.is_dir() and not any(entry.name.endswith(SUFFIX) for entry in path.iterdir())


# A metric asks for its reference at several places; size and time take part so that a file that changed is read again.
@functools.lru_cache(maxsize=4)
def _opened(place: str, _: tuple[int, int]) -> Reference:
    path = epath.Path(place)
    if path.suffix == ".npz":
        return _published_moments(path)
    try:
        header, start = _header(path)
        described = dict(header.pop("__metadata__"))
        if described.pop("format") != _FORMAT:
            raise ValueError("it is no reference")
        arrays = {name: _array(path, start, header[name]) for name in _TYPES}
        count, width = header["features"]["shape"]
        begin = start + header["features"]["data_offsets"][0]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is damaged or no reference of evaluate --reference: {error}") from None
    local = path.open("rb")
    if files.is_remote(path):
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - the table keeps it
        while block := local.read(2**24):
            copy.write(block)
        copy.flush()
        local = copy
    # Values of the metadata are texts.
    described |= {"n": int(arrays["n"]), "file": str(path), "sha256": files.sha256(path)}
    return Reference(
        Gaussian.of(arrays), int(arrays["n"]), FeatureTable(local, begin, count, width), described
    )


def _published_moments(path: epath.Path) -> Reference:
    """`mu` and `sigma` of an .npz, as pytorch-fid, clean-fid and U-ViT write them."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            gaussian = Gaussian(content["mu"].astype(np.float64), content["sigma"].astype(np.float64))
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise UserError(f"{path} holds no mu and sigma: {error}") from None
    if gaussian.covariance.shape != 2 * gaussian.mean.shape:
        raise UserError(f"{path} is damaged: mu {gaussian.mean.shape}, sigma {gaussian.covariance.shape}")
    return Reference(gaussian, 0, None, {"file": str(path), "sha256": files.sha256(path)})


def _header(path: epath.Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().length:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if 8 + length + end != path.stat().length:
        raise ValueError(f"it has {path.stat().length} bytes, its header says {8 + length + end}")
    return header, 8 + length


def _array(path: epath.Path, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    kind = {name: dtype for dtype, name in _NAMES.items()}[entry["dtype"]]
    with path.open("rb") as file:
        file.seek(start + begin)
        return np.frombuffer(file.read(end - begin), kind).reshape(entry["shape"])


def write(path: epath.Path, table: FeatureTable, described: Mapping[str, Any]) -> None:
    """Writes the statistics of features. Whole or not at all; memory does not grow with the number of images."""
    state = moments.of_blocks(table.blocks(), table.width)
    arrays = {name: np.asarray(state[name], kind, order="C") for name, kind in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT} | {k: str(v) for k, v in described.items()}}
    at = 0
    for name, array in arrays.items():
        entry = {"dtype": _NAMES[array.dtype.str], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    size = 4 * len(table) * table.width
    header["features"] = {
        "dtype": "F32",
        "shape": [len(table), table.width],
        "data_offsets": [at, at + size],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.staged(path) as local, local.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())
        for block in table.blocks():
            file.write(block.tobytes())


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistics(Base):
    """Collects the features of real images: rows with `features` and the hash of the pixels."""

    features: Features

    def update(self, state: State, batch: Batch) -> tuple[State, list[Row]]:
        rows = zip(batch.images, self.features(batch.images), strict=True)
        return state, [
            {"features": row, "pixels": hashlib.sha256(image.tobytes()).hexdigest()} for image, row in rows
        ]

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        return {"scalars": {"n": len(rows)}}


def build(
    source: Source, name: str, network: Network, weights: str, path: epath.Path, *, batch: int = 64
) -> epath.Path:
    """Writes the statistics of all images of a source, unless they are there already. Returns the file.

    A call that was killed resumes. All processes call it together and share the work. The folder PATH.parts is used
    meanwhile.

    Args:
      source: of which split the statistics are to be.
      name: of the source, as the config names it.
      network: which features.
      weights: place of the network's weights, see `Published.find`.
      path: the file to write.
      batch: images at once.

    Raises:
      UserError: the file is of other images or weights, or the source holds no images.
    """
    described = {
        "source": name,
        "images": source.describe(),
        "crop": f"largest centred square, resized to {source.image_size} px by the source",
        "network": network.name,
        "resize": network.resize,
        "weights_sha256": published.digest(weights),
    }
    if path.exists():
        found = open_reference(str(path), network, described["weights_sha256"]).described
        differs = [key for key in ("source", "images", "crop") if found.get(key) != described[key]]
        if differs:
            key = differs[0]
            raise UserError(f"{path} is of another {key}: {found.get(key)!r}, not {described[key]!r}")
        return path
    items = Items(len(source), lambda number: Item(f"{number:09d}", ""))
    scoring = Scoring("reference", _Statistics(network.open(weights, batch)), items, batch)
    parts = InFolder(path.parent / f"{path.name}.parts", described)
    scoring.update_from(functools.partial(_images, source), parts)
    parts.share()
    rows = scoring.result(parts, 0)[1]
    if jax.process_index() == 0:
        digest = hashlib.sha256()

        def blocks() -> Iterator[np.ndarray]:
            for row in rows:
                digest.update(row["pixels"].encode())
                yield row["features"][None]

        table = FeatureTable.spill(blocks(), network.width)
        write(path, table, described | {"n": len(table), "pixels_sha256": digest.hexdigest()})
    parts.remove()
    return path


def _images(source: Source, numbers: range) -> Iterator[np.ndarray]:
    """Some images of a source, one at a time: uint8 [1, S, S, 3]."""
    for number in numbers:
        image = source[number].get("image")
        if image is None:
            raise UserError(f"{source.describe()} holds no images, only what was encoded from them")
        yield image[None]

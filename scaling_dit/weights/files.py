"""Weights in safetensors files, whole or split into shards with an index, in the layout of the Hugging Face libraries.

Shards are named `STEM-00001-of-00003.safetensors`; `STEM.safetensors.index.json` maps each entry to its shard. Pickles
are refused, because reading one can run any code.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from etils import epath
from safetensors import numpy as safetensors_numpy

from scaling_dit.errors import UserError
from scaling_dit.files import parse_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# Files of a variant, such as fp16: `STEM.fp16.safetensors`, `STEM.safetensors.index.fp16.json`.
_VARIANT_INDEX = re.compile(r"\.safetensors\.index\.[A-Za-z0-9_-]+\.json$")
# A shard, in the names of all versions; a variant stands before or after the numbers.
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}(?:\.[A-Za-z0-9_-]+)?\.safetensors$")
# File stems in diffusers' folders, and in ours with upstream names.
STEMS = ("diffusion_pytorch_model", "model")
SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def write(folder: epath.Path, stem: str, weights: Mapping[str, np.ndarray], shard_bytes: int) -> list[str]:
    """Writes contiguous arrays to a folder and returns the names of the files.

    Entries fill the shards in order. An entry larger than `shard_bytes` gets its own shard. If all entries fit one
    shard, it is a single file without an index.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in weights.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    many = len(shards) > 1
    files = [
        f"{stem}-{i:05d}-of-{len(shards):05d}{SUFFIX}" if many else f"{stem}{SUFFIX}"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        # "pt" marks axes in torch's order. The readers of these libraries refuse files without it.
        (folder / file).write_bytes(safetensors_numpy.save(shard, metadata={"format": "pt"}))
    if not many:
        return files
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*files, f"{stem}{INDEX_SUFFIX}"]


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a set of safetensors files by name. An array is read from its file at each access.

    A remote file is copied at first use to a temporary folder, which is deleted with this object.
    """

    def __init__(self) -> None:
        # The file of each array, by the array's name.
        self.places: dict[str, epath.Path] = {}
        self._open: dict[epath.Path, Any] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        path = self.places[name]
        file = self.file(path)
        try:
            array: np.ndarray = file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from None
        # numpy has no such type.
        except (AttributeError, TypeError):
            kind = file.get_slice(name).get_dtype()
            raise UserError(
                f"{path} holds {name} as {kind}, which cannot be read; convert it to F32, F16 or BF16"
            ) from None
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def file(self, path: epath.Path) -> Any:
        """The open safetensors file of a path.

        Raises:
          UserError: the file is damaged.
        """
        if path not in self._open:
            local = path
            # The library can map local files only.
            if "://" in str(path):
                self._copies = self._copies or tempfile.TemporaryDirectory()
                local = epath.Path(self._copies.name) / path.name
                path.copy(local)
            try:
                self._open[path] = safetensors.safe_open(str(local), framework="np")
            except safetensors.SafetensorError as error:
                raise _damaged(path, error) from None
        return self._open[path]


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file, an index of shards, or a folder that holds one of these.

    Half precision keeps its type: float16, or ml_dtypes' bfloat16.

    Raises:
      UserError: no such file, a pickle, a damaged file, several candidates, an index that does not match its shards, or
        8-bit floats.
    """
    return dict(open_tensors(path))


def open_tensors(path: epath.Path) -> Tensors:
    """As `read`, but reads each array only when it is accessed.

    Raises:
      UserError: as `read`; a fault of an array raises only when that array is accessed.
    """
    path = _find(path)
    tensors = Tensors()
    if is_index(path.name):
        tensors.places = _shard_places(path, tensors)
    else:
        tensors.places = dict.fromkeys(tensors.file(path).keys(), path)
    return tensors


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index of shards, of a variant too."""
    return name.endswith(INDEX_SUFFIX) or _VARIANT_INDEX.search(name) is not None


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it holds no JSON object.
    """
    try:
        value = parse_json(path.read_bytes())
    # Invalid JSON or invalid UTF-8.
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _find(path: epath.Path) -> epath.Path:
    """The file or index that a path stands for."""
    if not path.exists():
        raise UserError(f"no file or folder {path} to import from")
    if not path.is_dir():
        if path.suffix in _PICKLES:
            raise _pickle(path)
        if not path.name.endswith(SUFFIX) and not is_index(path.name):
            raise UserError(f"{path} is neither {SUFFIX}, {INDEX_SUFFIX} nor a folder that holds one")
        return path
    names = sorted(file.name for file in path.iterdir())
    usual = [stem + suffix for stem in STEMS for suffix in (SUFFIX, INDEX_SUFFIX)]
    found = [name for name in usual if name in names]
    # Those of a variant, where the usual ones are not here; shards belong to an index.
    found = found or [name for name in names if is_index(name)]
    found = found or [name for name in names if name.endswith(SUFFIX) and not _SHARD.search(name)]
    if len(found) == 1:
        return path / found[0]
    if found:
        raise UserError(f"{path} holds several sets of weights: {', '.join(found)}; give one of these files")
    if "model_index.json" in names:
        parts = [name for name in ("transformer", "unet") if name in names]
        raise UserError(f"{path} is a whole pipeline; give the folder of its backbone, {' or '.join(parts)}")
    shards = [name for name in names if _SHARD.search(name)]
    if shards:
        raise UserError(
            f"{path} holds shards, such as {shards[0]}, without their index; put {STEMS[0]}{INDEX_SUFFIX} beside"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickle(path / pickles[0])
    raise UserError(f"{path} holds no {SUFFIX} file")


def _pickle(path: epath.Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run any code when it is read; weights are read from {SUFFIX} files only: "
        f"convert it once with scaling-dit import --to=safetensors --from={path} --out=FILE{SUFFIX}"
    )


def _shard_places(index: epath.Path, tensors: Tensors) -> dict[str, epath.Path]:
    """The file of each entry, checked against the shards."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} has no weight_map, which maps each entry to its file")
    for file in sorted(set(map(str, places.values()))):
        shard = index.parent / file
        if epath.Path(file).name != file or not shard.exists():
            raise UserError(f"{index} names the shard {file!r}, which is not beside it")
        held = set(tensors.file(shard).keys())
        wanted = {name for name, place in places.items() if place == file}
        if held != wanted:
            some = ", ".join(sorted(held ^ wanted)[:3])
            raise UserError(f"{shard} does not hold what {index.name} says it holds: {some}")
    return {name: index.parent / file for name, file in places.items()}


def _damaged(path: epath.Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or no safetensors file: {error}")

"""Converts published pickles to safetensors: `import --to=safetensors`, once, if you trust them.

PyTorch reads them with `weights_only`, which runs no code from the file. TorchScript archives are opened by PyTorch's
own loader; it compiles their code but does not run it. The new file's metadata holds the sha256 of the source.
"""

import hashlib
import json
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.weights.files import INDEX_SUFFIX, SUFFIX, read_json

_PICKLED_INDEX = ".bin.index.json"
# The key under which trainers save weights beside other things.
_NESTED = "state_dict"


def main(source: str, out: str) -> int:
    """Does the verb's work: converts a file, or all shards of an index, prints what it wrote, returns the exit code.

    Args:
      source: a pickle (.bin, .pt, .pth, .ckpt), a TorchScript archive, or the `.bin.index.json` of pickled shards.
      out: the safetensors file to write, or a folder for the shards of an index; local or gs://.

    Raises:
      UserError: torch is missing, the file has another format or needs its own code, the output exists already, or an
        entry is no dense tensor.
    """
    path, target = epath.Path(source), epath.Path(out)
    if not path.exists():
        raise UserError(f"no file {source} to convert")
    if path.is_dir():
        raise UserError(f"{source} is a folder; give the pickle in it, or its {_PICKLED_INDEX}")
    if path.name.endswith(_PICKLED_INDEX):
        _convert_shards(path, target)
        return 0
    if not target.name.endswith(SUFFIX):
        raise UserError(f"--out is {out}; it must end in {SUFFIX}")
    if target.exists():
        raise UserError(f"{out} is there already; give another --out")
    count, left_out = convert(path, target)
    print(
        f"{count} tensors of {source} in {out}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    )
    return 0


def convert(path: epath.Path, target: epath.Path) -> tuple[int, list[str]]:
    """Writes a pickle's tensors as one safetensors file, with their types. A shared tensor is written for each name.

    Returns:
      The number of tensors, and the names of entries that are no tensors.

    Raises:
      UserError: as `main`.
    """
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("converting a pickle needs torch: pip install 'scaling-dit[convert]'") from None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    with tempfile.TemporaryDirectory() as folder:
        local = path
        if "://" in str(path):
            local = epath.Path(folder) / path.name
            path.copy(local)
        weights, left_out = _tensors(_load(torch, local, str(path)), torch, str(path))
        metadata = {"format": "pt", "source": path.name, "source_sha256": digest.hexdigest()}
        made = epath.Path(folder) / "made"
        save_file(_own_storage(weights), str(made), metadata=metadata)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.copy(target)
    return len(weights), left_out


def _convert_shards(index: epath.Path, folder: epath.Path) -> None:
    """Converts every shard of a pickled index into a folder, with a new index and a copy of the config."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} has no weight_map, which maps each entry to its file")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --out")
    files = sorted(set(map(str, places.values())))
    for file in files:
        if epath.Path(file).name != file or not (index.parent / file).exists():
            raise UserError(f"{index} names the shard {file!r}, which is not beside it")
    renamed = {file: epath.Path(file.removeprefix("pytorch_")).stem + SUFFIX for file in files}
    for number, file in enumerate(files, start=1):
        count, _ = convert(index.parent / file, folder / renamed[file])
        print(f"shard {number} of {len(files)}: {count} tensors in {folder / renamed[file]}")
    config = index.parent / "config.json"
    if config.exists():
        config.copy(folder / config.name)
    name = index.name.removeprefix("pytorch_").removesuffix(_PICKLED_INDEX) + INDEX_SUFFIX
    table = {"metadata": {}, "weight_map": {entry: renamed[str(file)] for entry, file in places.items()}}
    # The index comes last: a folder that has one is complete.
    (folder / name).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def _load(torch: Any, local: epath.Path, where: str) -> Any:
    try:
        # torch warns about TorchScript archives, which are opened below.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(str(local), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "Unsupported class" in reason:
            named = reason.split("GLOBAL ")[1].split(" ")[0] if "GLOBAL " in reason else "a class"
            raise UserError(
                f"{where} needs {named} to be read, which could run any code; save its state dict alone where you "
                "trust it"
            ) from None
        raise UserError(f"{where} is damaged or no file of PyTorch") from None
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise UserError(
                f"{where} is damaged or no file of PyTorch: {str(error).splitlines()[0]}"
            ) from None
    except (EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{where} is damaged or no file of PyTorch: {error}") from None
    try:
        return dict(torch.jit.load(str(local), map_location="cpu").state_dict())
    except RuntimeError as error:
        raise UserError(f"{where} is a TorchScript archive that torch cannot open: {error}") from None


def _tensors(found: Any, torch: Any, where: str) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a loaded pickle, from its top level or under one key, and the names of all other entries."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where} holds a {type(found).__name__}, not a state dict of tensors")

    def tensors(mapping: Mapping[Any, Any]) -> dict[str, Any]:
        return {str(name): value for name, value in mapping.items() if isinstance(value, torch.Tensor)}

    left_out: list[str] = []
    if not tensors(found):
        nested = {
            str(name): value for name, value in found.items() if isinstance(value, Mapping) and tensors(value)
        }
        if not nested:
            raise UserError(
                f"{where} holds no tensors at its top nor one level below: {', '.join(map(str, found))}"
            )
        if len(nested) > 1 and _NESTED not in nested:
            raise UserError(
                f"{where} holds several sets of tensors: {', '.join(nested)}; save one of them alone"
            )
        name = _NESTED if _NESTED in nested else next(iter(nested))
        left_out += [str(other) for other in found if str(other) != name]
        found = nested[name]
    weights = tensors(found)
    left_out += [str(name) for name in found if str(name) not in weights]
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(
                f"{where} holds {name} as a sparse or quantised tensor, which safetensors cannot hold"
            )
    return weights, left_out


def _own_storage(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous tensors that share no memory. Views and second names become copies; safetensors refuses them."""
    seen: set[int] = set()
    own = {}
    for name, value in weights.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
            storage = value.untyped_storage()
        seen.add(storage.data_ptr())
        own[name] = value
    return own

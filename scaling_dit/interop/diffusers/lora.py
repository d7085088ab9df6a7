"""Adapters in the format of diffusers and peft: one safetensors file of `MODULE.lora_A.weight` and `lora_B.weight`.

A module computes W x + scale B A x, with A [rank, in] and B [out, rank], of a convolution [rank, in, h, w] and
[out, rank, 1, 1]. The scale is alpha / rank. Where alpha stands differs from writer to writer, and a reader that does
not look there takes 1. So what is written here has the scale inside B, and means the same to every reader. What is read
is searched for alpha in all three places: tensors `MODULE.alpha`, the file's metadata, and `adapter_config.json` beside
it.

The rows of a backbone's weight table (`weights/table.py`) give the names. q, k and v, which are one kernel here, are
three modules there; several parts that are one module there become one whose A holds the As of all parts. All modules
of a file have one rank.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from safetensors import numpy as safetensors_numpy

from scaling_dit import trees
from scaling_dit.backbones.declared import diffusers_class
from scaling_dit.backbones.state_dicts import table
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json
from scaling_dit.model.adapters import A, B, Form, Path, delta
from scaling_dit.weights import files, state_dicts
from scaling_dit.weights.table import Copy

# The name that `load_lora_weights` of a pipeline looks for.
FILE = "pytorch_lora_weights.safetensors"
_CONFIG, _METADATA = "adapter_config.json", "lora_adapter_metadata"
# What may stand before a module's name; those that diffusers' pipelines write first.
_PREFIXES = ("unet.", "transformer.", "base_model.model.")
_KEY = re.compile(r"(.+)\.(lora_A|lora_B)\.(?:default\.)?weight")
_WEIGHT = ".weight"


class Module(NamedTuple):
    """The two factors of one module as the file has them, and what multiplies them."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Read(NamedTuple):
    """A file of adapters.

    Attributes:
      modules: by the name of the module, without a prefix.
      rank: the largest of theirs.
    """

    modules: dict[str, Module]
    rank: int


def prefix(backbone: nn.Module) -> str:
    """What stands before the names of a model's modules in the files of diffusers' pipelines."""
    family = diffusers_class(type(backbone))
    return "unet." if family is not None and family.class_name == "UNet2DConditionModel" else "transformer."


def save(
    backbone: nn.Module, adapters: Mapping[str, Any], forms: Mapping[Path, Form], scale: float, inputs: Any
) -> dict[str, np.ndarray]:
    """The arrays of the file: diffusers' name -> array float32, with the scale in every B.

    Args:
      backbone: of the run.
      adapters: those of the backbone, as `Adapters.init` gives them below "backbone".
      forms: path of each adapted kernel, below "backbone" -> its axes.
      scale: alpha / rank.
      inputs: of a call of the backbone, as `to_state_dict` takes them.

    Raises:
      UserError: a backbone without names elsewhere, or a kernel that is no product of two factors under these, or a
        part of an entry there.
    """
    rows, abstract, _ = table(backbone, inputs)
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in trees.by_path(adapters).items()}
    known = {"/".join(path): form for path, form in forms.items()}
    paths = ["/".join(path) for path in trees.by_path(abstract)]
    found: dict[str, np.ndarray] = {}
    for entry in state_dicts.expand(rows, paths):
        if entry.path not in known:
            continue
        a, b = flat[f"{entry.path}/{A}"], scale * flat[f"{entry.path}/{B}"]
        split = known[entry.path]
        if entry.layer is not None:
            a, b, split = a[entry.layer], b[entry.layer], _inner(split)
        part = next((name for name in entry.names if not name.endswith(_WEIGHT)), None)
        if part is not None:
            raise UserError(
                f"{entry.path} is {part} there, which no file of adapters can name; leave it out of "
                "config.adapter.targets, or export the run without --adapter"
            )
        pairs = _factors(entry, a, b, split)
        _check(entry, pairs, np.asarray(delta(split, jnp.asarray(a), jnp.asarray(b))))
        for name, (one_a, one_b) in zip(entry.names, pairs, strict=True):
            found |= _named(name, one_a, one_b)
    for row in rows:
        for copy, original in row.pairs if isinstance(row, Copy) else ():
            module = original.removesuffix(_WEIGHT)
            if copy.endswith(_WEIGHT) and f"{module}.lora_A.weight" in found:
                factors = (found[f"{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
                found |= _named(copy, *factors)
    start, rank = prefix(backbone), max(array.shape[0] for name, array in found.items() if ".lora_A." in name)
    return {start + name: _padded(name, array, rank) for name, array in found.items()}


def write(folder: epath.Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes the file to a folder and returns its name."""
    # "pt" marks axes in torch's order; the readers of these libraries refuse files without it.
    (folder / FILE).write_bytes(safetensors_numpy.save(dict(arrays), metadata={"format": "pt"}))
    return FILE


def load(
    backbone: nn.Module, read: Read, forms: Mapping[Path, Form], fresh: Mapping[str, Any], inputs: Any
) -> dict[str, Any]:
    """Adapters of a backbone from a file, with a scale of 1: a tree shaped like `fresh`.

    A kernel, part or layer that the file does not have keeps its fresh A beside a B of zero, so it changes nothing; so
    does what a module's rank leaves of the run's.

    Args:
      backbone: of the run.
      read: of `read_file`.
      forms: as in `save`; `targets` says which kernels there must be.
      fresh: adapters as `Adapters.init` gives them below "backbone", of at least the file's rank.
      inputs: as in `save`.

    Raises:
      UserError: modules that the backbone does not have, or of another shape; queries that must be equal and differ; a
        kernel that would be no product of the file's factors.
    """
    rows, abstract, what = table(backbone, inputs)
    modules = dict(read.modules)
    _drop_copies(rows, modules)
    known = {"/".join(path): form for path, form in forms.items()}
    flat = {
        "/".join(path): np.zeros_like(leaf, np.float32) if path[-1] == B else np.array(leaf, np.float32)
        for path, leaf in trees.by_path(fresh).items()
    }
    for entry in state_dicts.expand(rows, ["/".join(path) for path in trees.by_path(abstract)]):
        names = [name.removesuffix(_WEIGHT) for name in entry.names if name.endswith(_WEIGHT)]
        present = {name: modules.pop(name) for name in names if name in modules}
        if not present:
            continue
        a, b, split = flat[f"{entry.path}/{A}"], flat[f"{entry.path}/{B}"], known[entry.path]
        if entry.layer is not None:
            # Views, which are filled in place.
            a, b, split = a[entry.layer], b[entry.layer], _inner(split)
        _fill(entry, present, names, a, b, split)
        given = [present.get(name.removesuffix(_WEIGHT)) for name in entry.names]
        pairs = [None if one is None else (one.a, one.scale * one.b) for one in given]
        _check(entry, pairs, np.asarray(delta(split, jnp.asarray(a), jnp.asarray(b))))
    if modules:
        shown = ", ".join(sorted(modules)[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
        raise UserError(f"the file adapts modules that {what} does not have: {shown}")
    return _nested(flat)


def targets(backbone: nn.Module, read: Read, inputs: Any) -> tuple[str, ...]:
    """Regexes for `config.adapter.targets` of the kernels that a file adapts, in all layers of each.

    Raises:
      UserError: none of its modules is one of the backbone.
    """
    rows, abstract, what = table(backbone, inputs)
    found = set()
    for entry in state_dicts.expand(rows, ["/".join(path) for path in trees.by_path(abstract)]):
        if any(name.removesuffix(_WEIGHT) in read.modules for name in entry.names):
            found.add("^backbone/" + re.sub(r"_\d+", r"_\\d+", entry.path) + "$")
    if not found:
        raise UserError(
            f"none of the modules that the file adapts is one of {what}: {', '.join(list(read.modules)[:3])}"
        )
    return tuple(sorted(found))


def is_adapter(path: epath.Path) -> bool:
    """Whether a place holds adapters: a file of them, or a folder with one."""
    file = _file(path)
    if file is None:
        return False
    return any(".lora_" in name or ".lora." in name for name in files.open_tensors(file))


def read_file(path: epath.Path) -> Read:
    """The adapters of a file, or of a folder as `save_lora_weights` or peft writes it.

    Raises:
      UserError: another format of adapters, a factor without the other, or an alpha that is not understood.
    """
    file = _file(path)
    if file is None:
        raise UserError(f"{path} holds no {FILE} and no adapter_model.safetensors")
    tensors = files.open_tensors(file)
    metadata = tensors.file(file).metadata() or {}
    config, beside = {}, file.parent / _CONFIG
    if _METADATA in metadata:
        try:
            config = dict(parse_json(metadata[_METADATA]))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} has {_METADATA} that is no JSON object: {error}") from None
    elif beside.exists():
        config = files.read_json(beside)
    factors: dict[str, dict[str, np.ndarray]] = {}
    alphas: dict[str, float] = {}
    for name, array in tensors.items():
        if match := _KEY.fullmatch(name):
            factors.setdefault(_bare(match[1]), {})[match[2]] = array.astype(np.float32)
        elif name.endswith(".alpha"):
            alphas[_bare(name.removesuffix(".alpha"))] = float(array.item())
        else:
            raise UserError(
                f"{file} holds {name}; only adapters as diffusers and peft write them are read, with "
                "MODULE.lora_A.weight and MODULE.lora_B.weight"
            )
    modules = {}
    for module, pair in factors.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise UserError(f"{file} has one factor of {module} without the other")
        rank = pair["lora_A"].shape[0]
        if pair["lora_B"].shape[1] != rank:
            raise UserError(
                f"{file}: the factors of {module} have the ranks {rank} and {pair['lora_B'].shape[1]}"
            )
        modules[module] = Module(pair["lora_A"], pair["lora_B"], _scale(module, rank, alphas, config, file))
    if not modules:
        raise UserError(f"{file} holds no adapters")
    return Read(modules, max(module.a.shape[0] for module in modules.values()))


def _scale(
    module: str, rank: int, alphas: Mapping[str, float], config: Mapping[str, Any], file: epath.Path
) -> float:
    """alpha / rank of one module; 1 where no alpha is given."""
    if module in alphas:
        return alphas[module] / rank
    settings = {_bare(f"{key}."): value for key, value in config.items()} if config else {}
    settings = {key.rstrip("."): value for key, value in settings.items()}
    for name in ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"):
        if settings.get(name):
            raise UserError(f"{file} was trained with {name}, which is not read here")
    if "lora_alpha" not in settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    # As peft does: a pattern is a module's whole name or its end.
    special = [value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
    return float(special[0] if special else settings["lora_alpha"]) / rank


def _bare(name: str) -> str:
    return next((name.removeprefix(start) for start in _PREFIXES if name.startswith(start)), name)


def _file(path: epath.Path) -> epath.Path | None:
    if not path.is_dir():
        return path if path.exists() and path.name.endswith(".safetensors") else None
    names = (FILE, "adapter_model.safetensors")
    return next((path / name for name in names if (path / name).exists()), None)


def _named(weight: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    module = weight.removesuffix(_WEIGHT)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def _inner(split: Form) -> Form:
    """The form of one layer of a stacked kernel."""
    inputs = tuple(axis - 1 for axis in split.inputs)
    return Form(inputs, split.output - 1, tuple(axis - 1 for axis in split.apart[1:]))


def _factors(
    entry: state_dicts.Entry, a: np.ndarray, b: np.ndarray, split: Form
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each upstream module of one entry."""
    if len(entry.names) == 1 and split.apart:
        # One module of all parts: its A holds theirs one after the other, its B theirs along the diagonal.
        axis = split.apart[0]
        parts = [(a.take(i, axis).T, b.take(i, axis).T) for i in range(a.shape[axis])]
        rank, width = parts[0][0].shape[0], parts[0][1].shape[0]
        joint = np.zeros((width * len(parts), rank * len(parts)), np.float32)
        for i, (_, part) in enumerate(parts):
            joint[i * width : (i + 1) * width, i * rank : (i + 1) * rank] = part
        return [(np.concatenate([part for part, _ in parts]), joint)]
    ours = entry.row.transform
    first = list(ours.save(a))
    second = [b.T if first[0].ndim == 2 else b.T[:, :, None, None]] if a.ndim == 2 else list(ours.save(b))
    return list(zip(first, second, strict=True))


def _padded(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    """A factor with zeros up to a rank: older readers take one alpha for all ranks of a file."""
    axis = 0 if ".lora_A." in name else 1
    pad = [(0, rank - size if at == axis else 0) for at, size in enumerate(array.shape)]
    return np.ascontiguousarray(np.pad(array, pad), np.float32)


def _check(
    entry: state_dicts.Entry, pairs: Sequence[tuple[np.ndarray, np.ndarray] | None], change: np.ndarray
) -> None:
    """Makes sure that the factors make the same change under the other names; a row may be a user's own.

    Without factors, for a module that a file does not have, there must be no change.
    """
    wanted = entry.row.transform.save(change)
    for whole, pair in zip(wanted, pairs, strict=True):
        product = np.zeros_like(whole) if pair is None else _whole(*pair)
        if whole.shape != product.shape or not np.allclose(
            whole, product, rtol=1e-3, atol=1e-4 * max(1e-8, float(np.abs(whole).max(initial=0)))
        ):
            raise UserError(
                f"{entry.path} is no product of two factors under the names {', '.join(entry.names)}"
            )


def _fill(
    entry: state_dicts.Entry,
    present: Mapping[str, Module],
    names: list[str],
    a: np.ndarray,
    b: np.ndarray,
    split: Form,
) -> None:
    """Writes the factors of the modules of one entry into ours, in place."""
    for name, module in present.items():
        one, other = module.a, module.b * module.scale
        rank = one.shape[0]
        if len(entry.names) == 1 and split.apart:
            width = b.shape[split.output]
            axis = split.apart[0]
            places = [
                (_at(a, axis, i), _at(b, axis, i), other[i * width : (i + 1) * width])
                for i in range(a.shape[axis])
            ]
            found = [(one.T, part.T) for _, _, part in places]
            views = [(mine_a, mine_b) for mine_a, mine_b, _ in places]
        elif split.apart:
            axis, i = split.apart[0], names.index(name)
            found, views = [(one.T, other.T)], [(_at(a, axis, i), _at(b, axis, i))]
        elif a.ndim == 2:
            found, views = [(entry.row.transform.load(one), other.reshape(other.shape[:2]).T)], [(a, b)]
        else:
            found, views = [(entry.row.transform.load(one), entry.row.transform.load(other))], [(a, b)]
        for (new_a, new_b), (mine_a, mine_b) in zip(found, views, strict=True):
            shapes = (*mine_a.shape[:-1], rank), (*mine_b.shape[:-2], rank, mine_b.shape[-1])
            if (new_a.shape, new_b.shape) != shapes:
                raise UserError(
                    f"the adapter of {name} is {module.a.shape} and {module.b.shape}, which does not fit {entry.path}"
                )
            mine_a[..., :rank] = new_a
            mine_b[..., :rank, :] = new_b


def _at(array: np.ndarray, axis: int, i: int) -> np.ndarray:
    """A view of one place along an axis."""
    return array[(slice(None),) * axis + (i,)]


def _drop_copies(rows: Any, modules: dict[str, Module]) -> None:
    """Removes in place the modules that are copies of others here.

    Raises:
      UserError: one that differs from the other.
    """
    for row in rows:
        for copy, original in row.pairs if isinstance(row, Copy) else ():
            first, second = (modules.get(name.removesuffix(_WEIGHT)) for name in (copy, original))
            if first is None and second is None:
                continue
            same = (
                first is not None
                and second is not None
                and np.allclose(
                    first.scale * _product(first), second.scale * _product(second), rtol=1e-5, atol=1e-7
                )
            )
            if not same:
                raise UserError(
                    f"{copy.removesuffix(_WEIGHT)} and {original.removesuffix(_WEIGHT)} are one parameter here, so "
                    "they must have the same adapter"
                )
            del modules[copy.removesuffix(_WEIGHT)]


def _product(module: Module) -> np.ndarray:
    return _whole(module.a, module.b)


def _whole(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """B A as a weight in torch's order, [out, in] or [out, in, h, w]."""
    return (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(b.shape[0], *a.shape[1:])


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *above, last = path.split("/")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree

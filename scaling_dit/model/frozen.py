"""The weights that a run holds without training them, and pretrained ones that it starts from.

A component (codec, text encoder) with a field `weights` loads them from that place at every start; the workdir holds no
copy. A component without the field, or with "random" in it, is initialised from the run's seed, and its weights are
kept in the workdir. Checkpoints hold a hash of all frozen weights, so a run never resumes with others, wherever its
files have moved.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from scaling_dit import trees
from scaling_dit.errors import UserError
from scaling_dit.files import write_whole
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules
from scaling_dit.trees import Params
from scaling_dit.weights import places

# Between the keys of a weight's path in the file that keeps it.
_SEPARATOR = "/"


def open_frozen(
    kept: epath.Path | None, model: Model, seed: int, mesh: jax.sharding.Mesh, boxed: Params
) -> Params:
    """The run's frozen weights, each in its sharding: loaded from their places or from `kept`, or initialised.

    Initialised ones are kept and read back, because another kind of processor computes other last bits.

    Args:
      kept: the file that `save_frozen` writes; it need not exist. None for a run that has none yet.
      model: of the run.
      seed: of the run.
      mesh: to lie on.
      boxed: what `model.init` gives as frozen, abstract and with logical axes.

    Raises:
      UserError: a component without weights that needs them, a place that has none, or `kept` is of another run.
    """
    abstract, shardings = trees.unbox(boxed), rules.param_shardings(mesh, boxed)
    loaded = {name: component.load() for name, component in _pretrained(model).items() if name in boxed}
    for name, tree in loaded.items():
        _check_shapes(name, tree, abstract[name])
    rest = {name: tree for name, tree in abstract.items() if name not in loaded}
    if kept is not None and kept.exists():
        loaded |= _read_kept(kept, rest)
    elif jax.tree.leaves(rest):
        initialise = jax.jit(
            lambda rng: {name: trees.unbox(model.init(rng)[1])[name] for name in rest},
            out_shardings={name: shardings[name] for name in rest},
        )
        loaded |= initialise(jax.random.key(seed))
    else:
        loaded |= rest
    return {name: jax.tree.map(_place, loaded[name], shardings[name]) for name in boxed}


def open_trained(model: Model, mesh: jax.sharding.Mesh, boxed: Params) -> Params:
    """The pretrained weights from which a new run trains its parameters, in their shardings; {} if it has none.

    Args:
      model: of the run.
      mesh: to lie on.
      boxed: what `model.init` gives as params, abstract and with logical axes.

    Raises:
      UserError: as `open_frozen`.
    """
    abstract, shardings = trees.unbox(boxed), rules.param_shardings(mesh, boxed)
    loaded = {name: component.load() for name, component in _pretrained(model).items() if name in boxed}
    for name, tree in loaded.items():
        _check_shapes(name, tree, abstract[name])
    return {name: jax.tree.map(_place, tree, shardings[name]) for name, tree in loaded.items()}


def save_frozen(path: epath.Path, model: Model, frozen: Params, *, replace: bool = False) -> None:
    """Writes the frozen weights that were initialised, once; nothing if there are none or the file exists.

    All processes call it; the first one writes.

    Args:
      replace: write the file again if it exists: a start that failed half way left it.
    """
    given = _pretrained(model)
    leaves = trees.by_path({name: tree for name, tree in frozen.items() if name not in given})
    # Gathered before the file is looked for: another process may have written it by now.
    arrays: dict[str, Any] = {_SEPARATOR.join(names): _on_host(leaf) for names, leaf in leaves.items()}
    if arrays and jax.process_index() == 0 and (replace or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_whole(path, buffer.getvalue())


def frozen_hash(frozen: Params, *components: Any) -> str:
    """sha256 over paths, dtypes, shapes and bytes of the frozen weights; "" if there are none.

    Checkpoints hold this instead of the weights. All processes call it.

    Args:
      frozen: tree of weights, on the host or on devices.
      components: codec and text encoder of the run. Their `architecture`, where they have one, is part of the hash: it
        may come from a file beside the weights, and the same weights mean something else with another.
    """
    leaves = trees.by_path(frozen)
    described = [component.architecture for component in components if hasattr(component, "architecture")]
    digest = hashlib.sha256()
    for path, leaf in leaves.items():
        digest.update(f"{'/'.join(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(_on_host(leaf)).tobytes())
    for architecture in described:
        digest.update(repr(architecture).encode())
    return digest.hexdigest() if leaves or described else ""


def check_frozen(now: str, saved: Mapping[str, Any], where: str) -> None:
    """Makes sure that trained weights are used with the frozen weights they were trained with.

    Args:
      now: `frozen_hash` of the frozen weights at hand.
      saved: the checkpoint's `extra`.
      where: the folder that the error names.

    Raises:
      UserError: the hashes differ.
    """
    then = saved.get("frozen_sha256", "")
    if now != then:
        raise UserError(
            f"the checkpoint in {where} was trained with other frozen weights (sha256 {then[:12] or 'of none'}, now "
            f"{now[:12] or 'none'}); put those back, or start a new run"
        )


def _pretrained(model: Model) -> dict[str, Any]:
    """The components of a model whose weights come from a place.

    Raises:
      UserError: one that has weights, and whose place is not set.
    """
    found = {}
    for name in ("codec", "text_encoder"):
        component: Any = getattr(model, name)
        if not hasattr(component, "load"):
            continue
        if component.weights == places.NONE:
            raise places.missing(f"{name}.weights")
        if places.is_place(component.weights):
            found[name] = component
    return found


def _check_shapes(name: str, found: Any, wanted: Any) -> None:
    """Refuses what a component of a user's own loads and its `init` does not describe."""
    shapes = [
        {path: np.shape(leaf) for path, leaf in trees.by_path(tree).items()} for tree in (found, wanted)
    ]
    if shapes[0] != shapes[1]:
        paths = sorted({path for path, _ in shapes[0].items() ^ shapes[1].items()})
        raise UserError(
            f"{name}.load gives other parameters than its init: {', '.join('/'.join(path) for path in paths[:3])}"
        )


def _read_kept(path: epath.Path, abstract: Params) -> Params:
    try:
        with path.open("rb") as file, np.load(file) as saved:
            values = dict(saved)
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); put the run's own file back") from None
    paths = [_SEPARATOR.join(names) for names in trees.by_path(abstract)]
    if not set(paths) <= set(values):
        raise UserError(f"{path} does not hold the frozen weights of this run; put the run's own file back")
    tree: Params = jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in paths])
    return tree


def _place(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array in its sharding; each process sends its own devices their parts."""
    if isinstance(value, jax.Array):
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _on_host(leaf: Any) -> np.ndarray:
    """The whole array on this host, also where other processes hold parts of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

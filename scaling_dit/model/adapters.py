"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained matrices beside the frozen kernels of a base.

An adapted kernel W becomes W + (alpha / rank) A B. A is random and B zero at first, so step 0 is the base exactly. The
sum is made before the backbone is called, and is float32 whatever type the base is stored in: bfloat16 would round away
all changes below 2^-9 of a weight. So adapters work in every family, in convolutions, in scanned layers and
under every implementation of attention, and the adapted model is the base with other kernels. Sources of the form:
q, k and v of a fused kernel have an A and a B each, as diffusers and peft have them; a stacked kernel has them for each
layer; the A of a convolution is a convolution to `rank` channels and its B a 1x1 one.

Parameters: the tree of the base with the adapted kernels alone, each a dict {"lora_a": A, "lora_b": B}. A has the
kernel's shape with `rank` for its output axis, B with `rank` for its input axis (and 1 for the sides of a convolution):

    kernel [in, out]              A [in, rank]              B [rank, out]
    kernel [in, parts, out]       A [in, parts, rank]       B [rank, parts, out]
    kernel [parts, in, out]       A [parts, in, rank]       B [parts, rank, out]
    kernel [h, w, in, out]        A [h, w, in, rank]        B [1, 1, rank, out]
    scanned layers                a leading axis of layers before each
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.errors import UserError, nearest
from scaling_dit.parallel import rules
from scaling_dit.trees import Params

# Keys of an adapted kernel, and of the base in the frozen weights of a run that trains adapters.
A, B = "lora_a", "lora_b"
BASE = "base"
Path = tuple[str, ...]


class Form(NamedTuple):
    """The axes of a kernel: those it sums over, its outputs, and those along which products are separate."""

    inputs: tuple[int, ...]
    output: int
    apart: tuple[int, ...]


def form(path: Path, leaf: Any) -> Form:
    """How a kernel is split into A and B, from its shape and the names of its axes.

    Args:
      path: of the kernel, for the error.
      leaf: the kernel as `init` gives it, boxed with the names of its axes or bare.

    Raises:
      UserError: three axes or more whose roles no names tell.
    """
    names = tuple(leaf.names) if trees.is_box(leaf) else None
    rank = len(_shape(leaf))
    first = 1 if names and names[0] == "layers" else 0
    layers = (0,) if first else ()
    axes = range(first, rank)
    match len(axes), names and [name is not None for name in names[first:]]:
        case 2, _:
            return Form((first,), first + 1, layers)
        case 3, [True, False, True]:
            return Form((first,), first + 2, (*layers, first + 1))
        case 3, [False, True, True]:
            return Form((first + 1,), first + 2, (*layers, first))
        case 4, _:
            return Form(tuple(axes[:3]), first + 3, layers)
    raise UserError(
        f"config.adapter.targets matches {'/'.join(path)} with {rank} axes, which no adapter can tell apart; name the "
        "axes of the kernel, or leave it out"
    )


def kernels(boxed: Params, targets: tuple[str, ...]) -> dict[Path, Any]:
    """The kernels that regexes choose, by their paths, as they stand in the tree.

    Raises:
      UserError: a regex that no kernel's path matches.
    """
    leaves = {
        trees.names(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=trees.is_box)
    }
    # A boxed leaf is one leaf here, as `is_leaf` says.
    found = {path: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    chosen: set[Path] = set()
    for target in targets:
        matched = {path for path in found if re.search(target, "/".join(path))}
        if not matched:
            raise UserError(
                f"config.adapter.targets: {target!r} matches no kernel; "
                f"{nearest(target, ['/'.join(path) for path in found])}"
            )
        chosen |= matched
    return {path: leaf for path, leaf in found.items() if path in chosen}


class Adapters:
    """The adapters of a run: which kernels of its base they change, and how.

    Attributes:
      rank: of the products A B.
      scale: what multiplies them, alpha / rank.
      leaves: path of each adapted kernel -> the kernel, abstract, with the names of its axes where it has some.
      forms: path of each adapted kernel -> its axes.
    """

    def __init__(
        self, rank: int, alpha: float, leaves: Mapping[Path, Any], mesh: jax.sharding.Mesh | None = None
    ) -> None:
        self.rank, self.scale, self.leaves = rank, (alpha or rank) / rank, dict(leaves)
        self.forms = {path: form(path, leaf) for path, leaf in self.leaves.items()}
        self._shardings = None if mesh is None else rules.param_shardings(mesh, self.leaves)
        self._merge: Any = None

    @classmethod
    def of(
        cls, config: ConfigDict, boxed: Params, mesh: jax.sharding.Mesh | None = None
    ) -> "Adapters | None":
        """Those of a resolved config; None if it trains its parameters themselves.

        Args:
          config: of the run.
          boxed: the base's parameters as `Model.init` gives them; shapes are enough.
          mesh: of a program that `add` is part of: the changes are then made where their kernels lie.

        Raises:
          UserError: as `kernels` and `form`.
        """
        chosen = config.adapter
        if not chosen.rank:
            return None
        return cls(chosen.rank, chosen.alpha, kernels(boxed, tuple(chosen.targets)), mesh)

    @property
    def size(self) -> int:
        """How many numbers the adapters hold."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def init(self, key: jax.Array) -> Params:
        """Fresh adapters, float32, boxed like their kernels; the base as it is, for every B is zero.

        A is uniform in +-1 / sqrt(inputs), as peft has it. An adapter's numbers depend on the key and its path alone.
        """
        tree: Params = {}
        for path, leaf in self.leaves.items():
            shape, split = _shape(leaf), self.forms[path]
            a_shape = [self.rank if axis == split.output else size for axis, size in enumerate(shape)]
            b_shape = [1 if axis in split.inputs else size for axis, size in enumerate(shape)]
            b_shape[split.inputs[-1]] = self.rank
            bound = math.prod(shape[axis] for axis in split.inputs) ** -0.5
            rng = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            a = jax.random.uniform(rng, a_shape, jnp.float32, -bound, bound)
            node[A] = _boxed_like(leaf, a, (split.output,))
            node[B] = _boxed_like(leaf, jnp.zeros(b_shape, jnp.float32), split.inputs)
        return tree

    def add(self, base: Params, adapters: Params) -> Params:
        """The base's parameters with `adapters` added to their kernels, which are float32 then; pure.

        `adapters` are those of `init`, trained or not, or an average of them.
        """
        return _with_leaves(base, self._added(self._held(base), adapters))

    def merge(self, base: Params, adapters: Params) -> Params:
        """`add` on arrays: adapted kernels in the shardings of the base's, every other leaf the base's own array."""
        held = self._held(base)
        if self._merge is None:
            shardings = {path: leaf.sharding for path, leaf in held.items()}
            self._merge = jax.jit(self._added, out_shardings=shardings)
        return _with_leaves(base, self._merge(held, adapters))

    def _held(self, base: Params) -> dict[Path, Any]:
        flat = trees.by_path(base)
        return {path: flat[path] for path in self.leaves}

    def _added(self, held: dict[Path, jax.Array], adapters: Params) -> dict[Path, jax.Array]:
        flat, added = trees.by_path(adapters), {}
        for path, kernel in held.items():
            change = self.scale * delta(self.forms[path], flat[(*path, A)], flat[(*path, B)])
            if self._shardings is not None:
                # Or XLA may gather the product instead of its small factors.
                change = jax.lax.with_sharding_constraint(change, self._shardings[path])
            added[path] = kernel.astype(jnp.float32) + change
        return added


def delta(split: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """A B in the kernel's shape, float32."""
    letters = "abcdefgh"[: a.ndim]
    # Of a convolution's inputs B has the last alone.
    kept = [axis for axis in range(a.ndim) if axis not in split.inputs[:-1]]
    left = "".join("r" if axis == split.output else letters[axis] for axis in range(a.ndim))
    right = "".join("r" if axis == split.inputs[-1] else letters[axis] for axis in kept)
    small = b.reshape([b.shape[axis] for axis in kept])
    return jnp.einsum(f"{left},{right}->{letters}", a, small, precision="highest")


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(jnp.shape(leaf.value if trees.is_box(leaf) else leaf))


def _boxed_like(leaf: Any, value: jax.Array, unnamed: tuple[int, ...]) -> Any:
    """`value` with the axis names of a kernel, but for the axes that are not the kernel's own."""
    if not trees.is_box(leaf):
        return value
    names = tuple(None if axis in unnamed else name for axis, name in enumerate(leaf.names))
    return leaf.replace(value=value, names=names)


def _with_leaves(tree: Params, changed: Mapping[Path, Any]) -> Params:
    """The tree with other leaves at some paths; what is not on a path is the tree's own."""
    new, below = dict(tree), dict[str, dict[Path, Any]]()
    for (name, *rest), leaf in changed.items():
        if rest:
            below.setdefault(name, {})[tuple(rest)] = leaf
        else:
            new[name] = leaf
    return new | {name: _with_leaves(tree[name], inner) for name, inner in below.items()}

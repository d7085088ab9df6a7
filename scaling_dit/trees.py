"""Trees of parameters: the boxes that flax puts around leaves, and the paths of leaves as text."""

from typing import Any

import jax
from flax.core import meta

# A tree of arrays: nested dicts with texts for keys.
Params = dict[str, Any]


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a box of flax's: a value with the logical names of its axes."""
    return isinstance(leaf, meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without flax's boxes.

    Unlike `flax.linen.unbox` it puts no sharding constraint on the leaves, so it works on abstract ones under a mesh.
    """
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path of `jax.tree_util`, whatever their kind, as text: ("params", "backbone", "kernel")."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by the `names` of their paths, in the order of `jax.tree.leaves`."""
    return {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

"""Parameter trees: removes the boxes that flax puts around leaves, and names leaves by their paths."""

from typing import Any

import jax
from flax.core import meta

# Nested dicts of arrays with string keys.
Params = dict[str, Any]


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a flax box, which holds a value and the logical names of its axes."""
    return isinstance(leaf, meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without flax boxes.

    Unlike `flax.linen.unbox` it adds no sharding constraints, so it works on abstract leaves under a mesh.
    """
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a `jax.tree_util` path as strings, whatever their kind: ("params", "backbone", "kernel")."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves keyed by the `names` of their paths, in the order of `jax.tree.leaves`."""
    return {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

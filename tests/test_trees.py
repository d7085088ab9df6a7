"""Boxes of logical axis names, and paths as text."""

import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from scaling_dit import trees
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh


class State(flax.struct.PyTreeNode):
    params: typing.Any
    counts: tuple[int, ...]


def test_unbox_takes_axis_names_off():
    boxed = {"a": nn.LogicallyPartitioned(jnp.ones(3), ("embed",)), "b": jnp.zeros(2)}
    assert [trees.is_box(leaf) for leaf in boxed.values()] == [True, False]
    plain = trees.unbox(boxed)
    assert {name: leaf.shape for name, leaf in plain.items()} == {"a": (3,), "b": (2,)}
    assert trees.unbox(plain) == plain


def test_unbox_works_on_abstract_values_under_a_mesh():
    dense = nn.Dense(6, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed", None)))
    boxed = jax.eval_shape(dense.init, jax.random.key(0), jnp.zeros((1, 16)))
    with rules.activate(make_mesh(fsdp=8)):
        plain = trees.unbox(boxed)
    assert plain["params"]["kernel"].shape == (16, 6)


def test_paths_are_text_whatever_the_containers():
    state = State(params={"b": {"kernel": 1}, "a": [2, 3]}, counts=(4,))
    found = trees.by_path(state)
    assert found == {
        ("params", "a", "0"): 2,
        ("params", "a", "1"): 3,
        ("params", "b", "kernel"): 1,
        ("counts", "0"): 4,
    }
    assert list(found.values()) == jax.tree.leaves(state)

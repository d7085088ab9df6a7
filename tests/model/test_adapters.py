"""Low-rank adapters as functions over parameters: forms of kernels, the start, the sum, which kernels are adapted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from scaling_dit import backbones, config, trees
from scaling_dit.backbones import contract
from scaling_dit.errors import UserError
from scaling_dit.model.adapters import Adapters, Form, form
from tests.support.layouts import FIELDS

# Families whose layers can be scanned.
SCANNED = ("uvit", "pixart", "large_dit", "next_dit", "unet")


@functools.cache
def boxed(name, **fields):
    """The parameters of a tiny backbone, abstract and with the names of their axes."""
    backbone = backbones.create(name, in_channels=4, text_dim=16, **FIELDS[name], **fields)
    inputs = contract.example_inputs(backbone, (8, 8, 4), (6, 16))
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)
    return {"backbone": shapes["params"]}


def adapters_of(tree, rank=2, **changes):
    settings = config.defaults()
    settings.adapter.rank = rank
    settings.adapter.update(changes)
    found = Adapters.of(settings, tree)
    assert found is not None
    return found


def fresh(adapters):
    """Fresh adapters, abstract."""
    return jax.eval_shape(adapters.init, jax.random.key(1))


def random_like(tree, seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), trees.unbox(tree))


def by_hand(kernel, a, b, scale, split):
    """The sum computed kernel by kernel in float64: one matrix product for each part and layer."""
    changed = np.array(kernel, np.float64)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for place in np.ndindex(*[kernel.shape[axis] for axis in split.apart]):
        index = [slice(None)] * kernel.ndim
        for axis, at in zip(split.apart, place, strict=True):
            index[axis] = at
        part = changed[tuple(index)]
        product = a[tuple(index)].reshape(-1, a.shape[split.output]) @ b[tuple(index)].reshape(
            -1, part.shape[-1]
        )
        changed[tuple(index)] = part + scale * product.reshape(part.shape)
    return changed


FAST = [("uvit", {}), ("next_dit", {"scan_layers": True})]
CASES = FAST + [
    pytest.param(name, fields, marks=pytest.mark.slow)
    for name in FIELDS
    for fields in ({}, {"scan_layers": True})
    if (name, fields) not in FAST and (name in SCANNED or not fields)
]


@pytest.mark.parametrize("name,fields", CASES)
def test_fresh_adapters_leave_every_family_exactly_as_it_is(name, fields):
    tree = boxed(name, **fields)
    adapters = adapters_of(tree, alpha=16.0)
    base = random_like(tree)
    start = jax.jit(lambda key: trees.unbox(adapters.init(key)))(jax.random.key(1))
    after = trees.by_path(jax.jit(adapters.add)(base, start))
    for path, leaf in trees.by_path(base).items():
        np.testing.assert_array_equal(after[path], leaf, err_msg="/".join(path))
    # And they can learn: no A is zero, and no two are the same.
    numbers = [np.asarray(leaf) for path, leaf in trees.by_path(start).items() if path[-1] == "lora_a"]
    assert all(np.abs(a).max() > 0 for a in numbers)
    assert len({a.tobytes() for a in numbers}) == len(numbers)


@pytest.mark.parametrize("name,fields", CASES)
def test_the_sum_is_alpha_over_rank_times_the_product_of_every_part_and_layer(name, fields):
    tree = boxed(name, **fields)
    adapters = adapters_of(tree, rank=3, alpha=6.0)
    base, trained = random_like(tree), random_like(fresh(adapters), seed=1)
    after, flat = trees.by_path(jax.jit(adapters.add)(base, trained)), trees.by_path(trained)
    for path, kernel in trees.by_path(base).items():
        if path not in adapters.leaves:
            np.testing.assert_array_equal(after[path], kernel)
            continue
        split = form(path, adapters.leaves[path])
        wanted = by_hand(kernel, flat[(*path, "lora_a")], flat[(*path, "lora_b")], 2.0, split)
        np.testing.assert_allclose(after[path], wanted, rtol=1e-4, atol=1e-4, err_msg="/".join(path))


@pytest.mark.parametrize("name,fields", CASES)
def test_by_default_all_projections_of_every_attention_are_adapted_and_nothing_else(name, fields):
    tree = boxed(name, **fields)
    found = {"/".join(path) for path in adapters_of(tree).leaves}
    ends = {path.split("/")[-2] for path in found}
    assert ends <= {"q", "kv", "qkv", "text_kv", "proj", "out"}
    attended = {
        "/".join(path)
        for path, leaf in trees.by_path(trees.unbox(tree)).items()
        if path[-1] == "kernel" and path[-2] in ends and "skip" not in path[-2]
    }
    assert found == attended


def test_convolutions_have_a_one_by_one_second_factor():
    tree = boxed("unet")
    adapters = adapters_of(tree, targets=("conv_in/kernel", "down_0_res_0/conv1/kernel"))
    shapes = {path[-3:]: leaf.shape for path, leaf in trees.by_path(trees.unbox(fresh(adapters))).items()}
    assert shapes["conv_in", "kernel", "lora_a"] == (3, 3, 4, 2)
    assert shapes["conv_in", "kernel", "lora_b"] == (1, 1, 2, 32)
    base, trained = random_like(tree), random_like(fresh(adapters), seed=1)
    path = ("backbone", "conv_in", "kernel")
    a, b = (trees.by_path(trained)[(*path, name)] for name in ("lora_a", "lora_b"))
    after = trees.by_path(adapters.add(base, trained))[path]
    x = random_like(jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    plain = convolve(x, trees.by_path(base)[path])
    np.testing.assert_allclose(convolve(x, after), plain + convolve(convolve(x, a), b), rtol=1e-3, atol=1e-3)


def test_adapters_and_the_sum_are_float32_whatever_type_the_base_has():
    tree = boxed("uvit", param_dtype="bfloat16")
    adapters = adapters_of(tree)
    start = jax.jit(lambda key: trees.unbox(adapters.init(key)))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype(jnp.float32)}
    base = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), trees.unbox(tree))
    # Changes of 2^-12 of a weight, which bfloat16 cannot hold.
    small = {
        path: np.full(leaf.shape, 2.0**-6 * 2**-0.5, np.float32)
        for path, leaf in trees.by_path(start).items()
    }
    structure = jax.tree.structure(start)
    trained = jax.tree.unflatten(structure, list(small.values()))
    for path, leaf in trees.by_path(jax.jit(adapters.add)(base, trained)).items():
        if path in adapters.leaves:
            np.testing.assert_allclose(leaf - 1, 2.0**-12, rtol=1e-3)
        else:
            assert leaf.dtype == jnp.bfloat16


def test_small_factors_carry_the_names_of_their_kernels_axes():
    tree = boxed("uvit", scan_layers=True)
    qkv = fresh(adapters_of(tree))["backbone"]["in_blocks"]["attn"]["qkv"]["kernel"]
    assert qkv["lora_a"].names == ("layers", "embed", None, None)
    assert qkv["lora_b"].names == ("layers", None, None, "heads")


def test_merging_keeps_every_array_that_no_adapter_changes():
    tree = boxed("uvit")
    adapters = adapters_of(tree)
    base = jax.tree.map(jnp.asarray, random_like(tree))
    trained = random_like(fresh(adapters), seed=1)
    merged, added = trees.by_path(adapters.merge(base, trained)), trees.by_path(adapters.add(base, trained))
    for path, leaf in trees.by_path(base).items():
        if path in adapters.leaves:
            np.testing.assert_allclose(merged[path], added[path], rtol=1e-6, atol=1e-6)
        else:
            assert merged[path] is leaf


def test_a_target_that_matches_no_kernel_is_one_line():
    tree = boxed("uvit")
    with pytest.raises(UserError, match=r"'atn/qkv' matches no kernel; .*"):
        adapters_of(tree, targets=("atn/qkv",))


def test_a_kernel_whose_axes_nobody_named_is_refused_where_its_form_is_unknown():
    bare = jax.ShapeDtypeStruct((4, 2, 8), jnp.float32)
    with pytest.raises(UserError, match=r"backbone/mine/kernel with 3 axes.*name the axes"):
        form(("backbone", "mine", "kernel"), bare)
    assert form(("kernel",), jax.ShapeDtypeStruct((4, 8), jnp.float32)) == Form((0,), 1, ())
    named = nn.LogicallyPartitioned(bare, (None, "text", "heads"))
    assert form(("kernel",), named) == Form((1,), 2, (0,))


def test_a_run_without_a_rank_has_no_adapters():
    tree = boxed("uvit")
    assert Adapters.of(config.defaults(), tree) is None

"""Image conditions of every backbone: the base without them, rows apart, gradients, positions, modes and mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones, trees
from scaling_dit.backbones import contract
from scaling_dit.errors import UserError
from scaling_dit.nn import layers
from scaling_dit.nn.rotary import rotary_1d, rotary_2d
from tests.support import parity
from tests.support.layouts import FIELDS
from tests.support.uvit_golden import FAST_KEY, fill, initial, run

PLAIN = """
from flax import linen as nn


class Plain(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
        return nn.Dense(latents.shape[-1])(latents)
"""
TRANSFORMERS = ("uvit", "pixart", "large_dit", "next_dit")
CASES = [("uvit", "token"), ("uvit", "channel")]
SLOW = [
    *((name, "token") for name in TRANSFORMERS if name != "uvit"),
    *((name, "channel") for name in FIELDS if name != "uvit"),
]


def small(name, *rows, **fields):
    # UNets of one level: the input layer is the subject, and the rest takes half a minute to compile.
    one_level = {"unet": {"transformer_depth": (1,)}, "unet_if": {"attention_levels": (0,)}}
    sizes = {"channel_mult": (1,)} | one_level[name] if name in one_level else {"depth": 1}
    return backbones.create(name, text_dim=16, conditions=rows, **FIELDS[name] | sizes | fields)


def given(backbone, batch=3, side=4, present=(True, False, True), seed=7):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(size=(batch, side, side, channels)).astype("f4"),
            np.array(present),
        )
        for name, channels, *_ in backbone.conditions
    }


def without(variables, *prefixes):
    return {
        "params": {key: value for key, value in variables["params"].items() if not key.startswith(prefixes)}
    }


@pytest.mark.parametrize(
    "name, concat", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_condition_acts_where_it_is_present_and_the_base_is_the_base(name, concat):
    """One program for all of it, for most of the time goes into compiling."""
    # Shifted positions in one of the families that have them as an own table, and in one that computes them.
    positions = "shifted" if name in ("uvit", "next_dit") else "shared"
    base, full = small(name), small(name, ("first", 5, concat, positions))
    inputs, conditions = parity.example(full, 4, 4, batch=3), given(full)
    variables = fill(contract.abstract_variables(full, (*inputs, conditions)))

    def outcomes(variables, conditions, *inputs):
        own = {key: value for key, value in variables["params"].items() if key.startswith("condition")}

        def loss(own, image):
            # The gradients of all other parameters would be half of what is compiled.
            given = {"first": (image, conditions["first"][1])}
            found = full.apply({"params": variables["params"] | own}, *inputs, given)
            return (found * jnp.cos(jnp.arange(found.size)).reshape(found.shape)).sum(), found

        grads, found = jax.grad(loss, (0, 1), has_aux=True)(own, conditions["first"][0])
        backwards = jax.tree.map(lambda x: x[::-1], (inputs, conditions))
        silent = jax.tree.map_with_path(
            lambda path, x: jnp.zeros_like(x) if "condition_embed" in trees.names(path) else x, variables
        )
        return {
            "base": base.apply(without(variables, "condition_"), *inputs),
            "absent": full.apply(variables, *inputs),
            "silent": full.apply(silent, *inputs, conditions),
            "given": found,
            "backwards": full.apply(variables, *backwards[0], backwards[1])[::-1],
            "grads": grads,
        }

    found = jax.device_get(run(outcomes, variables, conditions, *inputs))
    # Not given: exactly the base, whatever the parameters of the condition are.
    np.testing.assert_array_equal(found["absent"], found["base"])
    if concat == "channel":
        # Step 0: those parameters are zero.
        np.testing.assert_array_equal(found["silent"], found["base"])
    scale = np.abs(found["base"]).max()
    np.testing.assert_allclose(found["given"][1], found["base"][1], atol=1e-5 * scale)
    for row in (0, 2):
        assert np.abs(found["given"][row] - found["base"][row]).max() > 1e-4 * scale
    np.testing.assert_allclose(found["backwards"], found["given"], atol=1e-5 * scale)
    of_weights, of_image = found["grads"]
    for path, value in trees.by_path(of_weights).items():
        assert path[0].startswith("condition") and np.abs(value).max() > 0, path
    moved = np.abs(of_image).max(axis=(1, 2, 3))
    assert moved[0] > 0 and moved[2] > 0 and moved[1] == 0


@pytest.mark.parametrize(
    "name",
    # One with a table of positions and one that computes them.
    [pytest.param(name, marks=[] if name in ("uvit", "next_dit") else pytest.mark.slow) for name in FIELDS],
)
def test_parameters_of_a_condition_change_no_other_initial_value(name):
    """Nor do they depend on whether a condition is given to `init`."""
    concat = "token" if name in TRANSFORMERS else "channel"
    rows = ("first", 5, concat, "shared"), ("second", 4, "channel", "shared")
    full, base = small(name, *rows), small(name)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parity.example(full, 4, 4))
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = trees.unbox(jax.eval_shape(full.init, key, *inputs))
    with_given = trees.unbox(
        jax.eval_shape(full.init, key, *inputs, contract.example_inputs(full, (4, 4, 4), (5, 16), 2)[4])
    )
    assert shapes == with_given
    assert without(shapes, "condition_") == trees.unbox(jax.eval_shape(base.init, key, *inputs))
    names = {path[2] for path in trees.by_path(shapes) if path[1] == "condition_embed"}
    assert names == {"first", "second"}


# Of UNets one, for both have the same input layer; the fields that add parameters are compared above in all.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRANSFORMERS, "unet"])
def test_initial_values_are_those_of_the_base_and_channels_start_at_zero(name):
    """So step 0 of a run with a channel condition is the base, whatever is given."""
    rows = [("a", 5, "channel", "shared")]
    rows += [("b", 4, "token", "shifted")] if name in TRANSFORMERS else []
    base, full = small(name), small(name, *rows)
    inputs = parity.example(full, 4, 4)
    # Compiled together.
    variables, both = run(lambda *x: trees.unbox([one.init(FAST_KEY, *x) for one in (base, full)]), *inputs)
    for path, value in trees.by_path(without(both, "condition_")).items():
        np.testing.assert_array_equal(value, trees.by_path(variables)[path])
    embed = both["params"]["condition_embed"]
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(embed["a"]))
    if name in TRANSFORMERS:
        assert np.abs(embed["b"]["kernel"]).max() > 0 and embed["b"]["kernel"].shape[-1] == 32
    if name == "uvit":
        assert both["params"]["condition_pos_b"].shape[-1] == 32


def test_channels_are_a_widened_input():
    """The sum of two products is the product of both inputs joined, in the order that weight files have."""
    backbone = small("uvit", ("a", 3, "channel", "shared"), patch=1)
    wide = small("uvit", in_channels=7, out_channels=4, patch=1)
    inputs = parity.example(backbone, 2, 2, batch=2)
    conditions = given(backbone, batch=2, side=2, present=(True, True))
    variables = fill(contract.abstract_variables(backbone, inputs))
    joined = without(variables, "condition_")
    kernel = [
        variables["params"]["patch_embed"]["kernel"],
        variables["params"]["condition_embed"]["a"]["kernel"],
    ]
    joined["params"] |= {
        "patch_embed": variables["params"]["patch_embed"] | {"kernel": np.concatenate(kernel)}
    }
    together = np.concatenate([inputs[0], conditions["a"][0]], axis=-1)
    found = run(backbone.apply, variables, *inputs, conditions)
    np.testing.assert_allclose(found, run(wide.apply, joined, together, *inputs[1:]), atol=1e-5)


def test_shifted_positions_are_those_of_the_next_image():
    wide = layers.sincos_2d(2, 6, 16).reshape(2, 6, 16)
    np.testing.assert_array_equal(layers.sincos_2d(2, 3, 16, shift=1).reshape(2, 3, 16), wide[:, 3:])
    wide = [table.reshape(2, 9, 4) for table in rotary_2d(2, 9, 8)]
    for table, right in zip(rotary_2d(2, 3, 8, shifts=(2, 0)), wide, strict=True):
        np.testing.assert_array_equal(table[:6].reshape(2, 3, 4), right[:, 6:])
        np.testing.assert_array_equal(table[6:].reshape(2, 3, 4), right[:, :3])
    for table, right in zip(rotary_1d(np.array([4, 0, 6]), 8), rotary_1d(7, 8), strict=True):
        np.testing.assert_array_equal(table, right[jnp.array([4, 0, 6])])


def test_learned_tables_that_begin_with_sincos_begin_shifted():
    rows = ("a", 4, "token", "shifted"), ("b", 4, "token", "shifted")
    backbone = small("uvit", *rows, patch=1, positions="sincos_init")
    inputs = parity.example(backbone, 2, 3)
    params = initial(backbone, inputs, "condition_pos_a", "condition_pos_b")
    for name, shift in (("a", 1), ("b", 2)):
        np.testing.assert_allclose(
            params[f"condition_pos_{name}"], layers.sincos_2d(2, 3, 32, shift=shift), atol=1e-6
        )


def test_a_learned_table_of_a_shifted_condition_is_resized_from_a_square():
    backbone = small("uvit", ("a", 4, "token", "shifted"), patch=1)
    inputs = parity.example(backbone, 2, 2)
    variables = fill(contract.abstract_variables(backbone, inputs))
    larger = parity.example(backbone, 4, 4)
    conditions = given(backbone, batch=2, present=(True, True))
    shape = jax.eval_shape(backbone.apply, variables, *larger, conditions).shape
    assert shape == (2, 4, 4, 4)
    variables["params"]["condition_pos_a"] = np.zeros((6, 32), np.float32)
    with pytest.raises(UserError, match="condition_pos_a holds 6 tokens, but these shapes need 16"):
        jax.eval_shape(backbone.apply, variables, *larger, conditions)


def test_a_learned_table_of_a_shifted_condition_is_made_for_table_side():
    backbone = small("uvit", ("a", 4, "token", "shifted"), patch=1, table_side=3)
    inputs = contract.example_inputs(backbone, (4, 4, 4), (5, 16))
    shapes = trees.unbox(contract.abstract_variables(backbone, tuple(inputs)))["params"]
    assert shapes["condition_pos_a"].shape == (9, 32) and shapes["pos_embed"].shape == (1 + 5 + 9, 32)
    with pytest.raises(UserError, match="condition_pos_a holds 9 tokens, but table_side=2 needs 4"):
        jax.eval_shape(
            backbone.clone(table_side=2).apply,
            {"params": dict(shapes) | {"pos_embed": jax.ShapeDtypeStruct((1 + 5 + 4, 32), np.float32)}},
            *inputs,
        )


@pytest.mark.slow
# One family with a table of positions, and one that computes them: what conditions add is the same code in all.
@pytest.mark.parametrize("name", ["uvit", "next_dit"])
def test_scanned_and_rematerialised_are_the_same(name):
    rows = ("a", 5, "token", "shifted"), ("b", 4, "channel", "shared"), ("c", 4, "token", "shared")
    make = functools.partial(small, name, *rows, depth=2)
    inputs = (*parity.example(make(), 4, 4), given(make(), batch=2, present=(True, False)))
    # In each way in one family, and there its prediction eagerly as well.
    ways = ("remat full", "scanned, remat dots") if name == "uvit" else ("scanned, remat dots",)
    modes, eager = {mode: parity.MODES[mode] for mode in ways}, "prediction" if name == "uvit" else "nothing"
    parity.check_scan_remat_jit(make, inputs, modes, eager=eager)


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("unet", [("a", 4, "token", "shared")], "UNet has no sequence of image tokens.*concat to 'channel'"),
        ("unet_if", [("a", 4, "token", "shared")], "UNetIF has no sequence of image tokens"),
        ("uvit", [("a", 4, "tokens", "shared")], "each must be .name, channels, 'token' or 'channel'"),
        ("uvit", [("a", 4)], "each must be .name, channels"),
        ("uvit", [("a b", 4, "token", "shared")], "each must be .name, channels"),
        ("uvit", [("a", 0, "token", "shared")], "condition 'a' has 0 channels"),
        ("uvit", [("a", 4, "token", "shared")] * 2, "names a, a; each name may stand once"),
    ],
)
def test_rows_are_checked_when_a_backbone_is_made(name, rows, message):
    with pytest.raises(UserError, match=message) as error:
        small(name, *rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({"b": 4}, "does not read the condition 'b'; .*'a'|does not read the condition 'b'; known: a"),
        (
            {"a": 3},
            r"condition 'a' must be \(image \[2, 4, 4, 4\], present \[2\]\), got shapes \[2, 4, 4, 3\], \[2\]",
        ),
    ],
)
def test_a_call_with_another_condition_is_one_line(conditions, message):
    backbone = small("uvit", ("a", 4, "token", "shared"))
    inputs = parity.example(backbone, 4, 4)
    wrong = {
        name: (jnp.zeros((2, 4, 4, channels)), jnp.ones(2, bool)) for name, channels in conditions.items()
    }
    with pytest.raises(UserError, match=message):
        jax.eval_shape(backbone.init, jax.random.key(0), *inputs, wrong)
    with pytest.raises(UserError, match="PixArt reads no conditions, got .'a'.; leave conditions out"):
        jax.eval_shape(small("pixart").init, jax.random.key(0), *inputs, {"a": wrong.popitem()[1]})


def test_a_class_without_the_field_is_refused_when_a_run_has_conditions(tmp_path, monkeypatch):
    (tmp_path / "plain_backbone.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    assert backbones.create_for("plain_backbone:Plain", in_channels=4, text_dim=8).width == 8
    rows = (("a", 4, "token", "shared"),)
    with pytest.raises(UserError, match="reads no conditions, for it has no field `conditions`"):
        backbones.create_for("plain_backbone:Plain", in_channels=4, text_dim=8, conditions=rows)

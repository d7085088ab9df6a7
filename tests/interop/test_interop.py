"""Weights in and out in the published names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones, interop, trees
from scaling_dit.backbones import contract
from scaling_dit.errors import UserError
from scaling_dit.weights import state_dicts, table
from tests.support import uvit_golden


@pytest.mark.parametrize("name", uvit_golden.NAMES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_round_trip_is_identical(name, scan_layers):
    golden = uvit_golden.load(name)
    backbone = golden.backbone(scan_layers=scan_layers)
    written = interop.to_state_dict(backbone, interop.load_state_dict(backbone, golden.params))
    assert set(written) == set(golden.params)
    for key, value in golden.params.items():
        assert written[key].dtype == value.dtype
        assert written[key].flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_scanned_and_unrolled_exchange_weights():
    golden = uvit_golden.load("uvit_tiny")
    unrolled, scanned = golden.backbone(), golden.backbone(scan_layers=True)
    stacked = interop.load_state_dict(scanned, golden.params)
    plain = interop.load_state_dict(unrolled, golden.params)
    np.testing.assert_array_equal(
        stacked["params"]["out_blocks"]["skip_linear"]["kernel"][1],
        plain["params"]["out_blocks_1"]["skip_linear"]["kernel"],
    )
    there = interop.load_state_dict(scanned, interop.to_state_dict(unrolled, plain))
    jax.tree.map(np.testing.assert_array_equal, there, stacked)


def test_fresh_weights_boxed_or_not():
    golden = uvit_golden.load("uvit_tiny")
    backbone = golden.backbone(positions="sincos_init")
    boxed = uvit_golden.fill(jax.eval_shape(backbone.init, jax.random.key(0), *golden.inputs))
    written = interop.to_state_dict(backbone, boxed)
    plain = interop.to_state_dict(backbone, trees.unbox(boxed))
    assert set(written) == set(golden.params)
    for key in written:
        assert written[key].shape == golden.params[key].shape
        np.testing.assert_array_equal(written[key], plain[key])
    loaded = interop.load_state_dict(backbone, written)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, trees.unbox(boxed)))


def test_positions_may_have_any_length_but_not_width():
    golden = uvit_golden.load("uvit_tiny")
    params = dict(golden.params, pos_embed=np.zeros((1, 100, 64), np.float32))
    backbone = golden.backbone()
    variables = interop.load_state_dict(backbone, params)
    assert variables["params"]["pos_embed"].shape == (100, 64)
    assert interop.to_state_dict(backbone, variables)["pos_embed"].shape == (1, 100, 64)
    params["pos_embed"] = np.zeros((1, 24, 65), np.float32)
    with pytest.raises(UserError, match=r"pos_embed is \(1, 24, 65\), it must be .*64\) but for its length"):
        interop.load_state_dict(backbone, params)


def test_one_error_lists_everything():
    golden = uvit_golden.load("uvit_tiny")
    params = dict(golden.params)
    del params["in_blocks.1.norm1.bias"], params["norm.weight"]
    params["extra.weight"] = params["pad_token"] = np.zeros(3)
    params["decoder_pred.weight"] = np.zeros((16, 65))
    params["out_blocks.0.attn.qkv.weight"] = np.zeros((64, 192))
    with pytest.raises(UserError) as error:
        interop.load_state_dict(golden.backbone(scan_layers=True), params)
    message = str(error.value)
    assert "missing: in_blocks.1.norm1.bias, norm.weight" in message
    assert "unknown: extra.weight, pad_token" in message
    assert "decoder_pred.weight is (16, 65), it must be (16, 64)" in message
    assert "out_blocks.0.attn.qkv.weight is (64, 192), it must be (192, 64)" in message
    assert "\n" not in message


def test_a_wrong_field_shows_in_the_error():
    golden = uvit_golden.load("uvit_tiny")
    with pytest.raises(UserError, match="unknown: final_layer.bias, final_layer.weight"):
        interop.load_state_dict(golden.backbone(final_conv=False), golden.params)
    with pytest.raises(UserError, match=r"missing: time_embed.0.bias, time_embed.0.weight, time_embed.2"):
        interop.load_state_dict(golden.backbone(time_mlp=True), golden.params)


def test_quantised_weights_are_not_taken_for_floats():
    golden = uvit_golden.load("uvit_tiny")
    whole = {
        key: golden.params[key].astype(dtype) for key, dtype in (("norm.bias", "i1"), ("norm.weight", bool))
    }
    with pytest.raises(UserError) as error:
        interop.load_state_dict(golden.backbone(), golden.params | whole | {"extra": np.zeros(2, int)})
    message = str(error.value)
    assert "unknown: extra; norm.weight is bool, it must be floating; norm.bias is int8, it must" in message


@pytest.mark.parametrize("patch", [3, 5, 64])
def test_patches_of_any_size(patch):
    backbone = backbones.create("uvit", size="h16-d1-n2", text_dim=4, patch=patch)
    inputs = contract.example_inputs(backbone, (patch, 2 * patch, 4), (3, 4))
    variables = uvit_golden.fill(contract.abstract_variables(backbone, inputs))
    again = interop.load_state_dict(backbone, interop.to_state_dict(backbone, variables))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_writing_checks_the_parameters_too():
    golden = uvit_golden.load("uvit_tiny")
    backbone = golden.backbone()
    variables = interop.load_state_dict(backbone, golden.params)
    del variables["params"]["norm"]["scale"]
    variables["params"]["other"] = np.zeros(2)
    variables["params"]["decoder_pred"]["bias"] = np.zeros(5)
    with pytest.raises(UserError) as error:
        interop.to_state_dict(backbone, variables)
    for part in ("missing: norm/scale", "unknown: other", "decoder_pred/bias is (5,), it must be (16,)"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="must be {'params'"):
        interop.to_state_dict(backbone, variables["params"])


def test_values_take_the_dtype_of_the_parameters():
    golden = uvit_golden.load("uvit_tiny")
    halves = {key: value.astype(np.float16) for key, value in golden.params.items()}
    loaded = interop.load_state_dict(golden.backbone(), halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    loaded = interop.load_state_dict(golden.backbone(param_dtype="bfloat16"), golden.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}


def test_a_class_without_a_weight_table():
    class Mine(type(backbones.create("uvit")).__mro__[1]):
        pass

    with pytest.raises(UserError, match="Mine has no weight table; give the class the attribute WEIGHTS"):
        interop.load_state_dict(Mine(), {})


def test_several_upstream_names_make_one_parameter():
    """As where q, k and v are entries of their own: the table splits and joins, per layer and stacked."""
    rows = [table.Row(("b.{i}.q", "b.{i}.k"), "b_{i}/qk", table.joined(2), layers=2)]
    source = {
        f"b.{i}.{n}": np.random.default_rng(i).normal(size=(3, 4)).astype("f4") for i in (0, 1) for n in "qk"
    }
    shape = jax.ShapeDtypeStruct
    for abstract in (
        {"b": {"qk": shape((2, 4, 2, 3), "f4")}},
        {f"b_{i}": {"qk": shape((4, 2, 3), "f4")} for i in (0, 1)},
    ):
        params = state_dicts.load(rows, abstract, source, "it")
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, abstract)
        written = state_dicts.save(rows, abstract, params, "it")
        assert set(written) == set(source)
        assert all(np.array_equal(written[key], source[key]) for key in source)

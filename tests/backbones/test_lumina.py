"""What Large-DiT and Next-DiT share: layers against closed forms, modes against each other, masks and mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones, trees
from scaling_dit.backbones import contract, lumina_layers
from scaling_dit.errors import UserError
from scaling_dit.nn import rotary as rotary_tables
from tests.support import parity
from tests.support.uvit_golden import FAST_KEY, fill, relative_error, run

BOTH = pytest.mark.parametrize("name", ["large_dit", "next_dit"])
# What they share and takes seconds to compile: of one of them at once.
ONE_AT_ONCE = pytest.mark.parametrize("name", [pytest.param("large_dit", marks=pytest.mark.slow), "next_dit"])


def small(name, **fields):
    return backbones.create(name, **({"size": "h32-d1-n4", "text_dim": 12, "kv_heads": 2} | fields))


def inputs(height=4, width=8, length=5, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, height, width, 4)).astype("f4"),
        rng.uniform(0, 1000, batch).astype("f4"),
        rng.normal(size=(batch, length, 12)).astype("f4"),
    )


def variables_of(backbone, args):
    """Random variables, gates and zero-initialised layers too."""
    return fill(contract.abstract_variables(backbone, args))


@pytest.mark.slow
@BOTH
def test_scanned_rematerialised_compiled_and_eager_are_the_same(name):
    make = functools.partial(small, name, depth=2)
    # Each way to save memory in one of them, and its eager gradients: of the other, which has the same layers, the
    # eager prediction.
    ways = ("remat full", "scanned, remat dots") if name == "next_dit" else ("scanned, remat dots",)
    modes = {mode: parity.MODES[mode] for mode in ways}
    eager = "gradients" if name == "next_dit" else "prediction"
    parity.check_scan_remat_jit(make, parity.example(make(), 4, 8), modes, eager=eager)


@pytest.mark.slow
@BOTH
def test_bfloat16_is_close_to_float32(name):
    make = functools.partial(small, name, depth=4, hidden=64, scan_layers=True)
    parity.check_bf16(make, parity.example(make(), 4, 8))


@ONE_AT_ONCE
def test_padded_text_has_no_influence_and_a_row_may_be_all_padding(name):
    backbone, (latents, timesteps, text) = small(name), inputs(batch=3)
    variables = variables_of(backbone, (latents, timesteps, text))
    mask = np.array([[True, True, False, False, False], [False] * 5, [True] * 5])
    changed = np.where(mask[..., None], text, np.float32(100.0))

    def call(text, mask):
        def loss(text):
            prediction = backbone.apply(variables, latents, timesteps, text, mask)
            return prediction.sum(), prediction

        grad, prediction = jax.grad(loss, has_aux=True)(text)
        return prediction, grad

    call = jax.jit(call)
    prediction, grad = call(text, mask)
    again, grad_again = call(changed, mask)
    np.testing.assert_array_equal(prediction, again)
    assert np.isfinite(grad).all() and np.isfinite(grad_again).all()
    assert not np.asarray(grad)[~mask].any()
    assert np.asarray(grad)[mask].all(axis=-1).any()
    # No mask: all tokens are real.
    everything = run(backbone.apply, variables, latents, timesteps, text)
    assert relative_error(everything[2], prediction[2]) < 1e-5
    assert relative_error(everything[0], prediction[0]) > 1e-3
    assert relative_error(everything[1], prediction[1]) > 1e-3


def test_a_mask_of_numpy_stays_as_it_was_and_may_be_of_integers():
    attend = lumina_layers.TextGatedAttention(heads=1, kv_heads=1, qk_norm=False)
    x, text = np.ones((2, 1, 4), "f4"), np.asarray(inputs()[2])[..., :4]
    rotary = run(lambda: rotary_tables.rotary_1d(1, 4))
    mask = np.array([[True, True, False, False, False], [False] * 5])
    kept = mask.copy()
    variables = variables_of(attend, (x, text, mask, rotary))
    # Not an argument of the program, so the module is given the array of numpy itself.
    out = [
        run(lambda *args, mask=m: attend.apply(*args, mask, rotary), variables, x, text)
        for m in (mask, mask.astype("i4"))
    ]
    np.testing.assert_array_equal(*out)
    np.testing.assert_array_equal(mask, kept)


@ONE_AT_ONCE
def test_initial_values(name):
    backbone = small(name, hidden=128, kv_heads=None, depth=2, scan_layers=True)
    args = inputs()
    prediction, variables = jax.device_get(run(backbone.init_with_output, FAST_KEY, *args))
    params = trees.unbox(variables)["params"]
    attention = params["layers"]["attention"]
    # Gates, modulations, the caption's share and the head start at zero, so the prediction does.
    for zero in (
        attention["gate"],
        params["layers"]["modulation"]["linear"],
        params["conditioning"]["text_embed"],
        params["head"],
    ):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))
    assert not prediction.any()
    # Each of q, k, v, and of the SwiGLU's two inputs, is Xavier-uniform by its own widths.
    for kernel, fans in ((attention["qkv"], 2 * 128), (params["layers"]["feed_forward"]["w13"], 128 + 512)):
        bound = np.sqrt(6 / fans)
        assert 0.99 * bound < np.abs(kernel["kernel"]).max() <= bound
        assert np.std(kernel["kernel"]) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert np.std(params["conditioning"]["time_fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert not np.any(params["patch_embed"]["bias"])
    if name == "large_dit":
        assert np.std(params["eol_token"]) == pytest.approx(0.02, rel=0.2)


@BOTH
@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_names_its_axes(name, scan_layers):
    backbone = small(name, depth=2, scan_layers=scan_layers)
    params = jax.eval_shape(backbone.init, jax.random.key(0), *inputs())["params"]
    for box in jax.tree.leaves(params, is_leaf=trees.is_box):
        assert len(box.names) == box.value.ndim
        named = [n for n in box.names if n]
        # None twice.
        assert len(set(named)) == len(named)
    layer = params["layers"] if scan_layers else params["layers_1"]
    stacked = ("layers",) if scan_layers else ()
    assert layer["attention"]["text_kv"]["kernel"].names == (*stacked, None, "text", "heads")
    assert layer["attention"]["kv"]["kernel"].value.shape == (*([2] if scan_layers else []), 32, 2, 16)
    assert layer["feed_forward"]["w2"]["kernel"].names == (*stacked, "mlp", "embed")


def test_param_dtype():
    variables = contract.abstract_variables(small("large_dit", param_dtype="bfloat16"), inputs())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


@BOTH
def test_one_set_of_weights_runs_at_every_shape(name):
    backbone = small(name, patch=2, out_channels=3, learn_sigma=True)
    variables = contract.abstract_variables(backbone, inputs())
    for height, width in ((2, 2), (4, 8), (16, 6)):
        out = jax.eval_shape(backbone.apply, variables, *inputs(height, width))
        assert out.shape == (2, height, width, 6) and out.dtype == jnp.float32


def test_rotary_positions_turn_pairs_by_their_angle():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 7, 2, 8)).astype("f4")
    turned = np.asarray(run(lambda x: rotary_tables.rotate(x, rotary_tables.rotary_1d(7, 8)), x))
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    wanted = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(turned[..., ::2], wanted.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], wanted.imag, atol=1e-6)


def test_rotary_positions_of_a_grid_alternate_between_row_and_column():
    cos, sin = rotary_tables.rotary_2d(2, 3, 8)
    angles = [
        [row * f if axis == 0 else column * f for f in (1.0, 0.01) for axis in (0, 1)]
        for row in range(2)
        for column in range(3)
    ]
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)


@pytest.mark.parametrize("hidden, width", [(32, 256), (1024, 2816), (2304, 6144), (4096, 11008)])
def test_width_of_the_feed_forward(hidden, width):
    """11008 is that of LLaMA 7B, whose rule it is."""
    x = jax.ShapeDtypeStruct((1, 2, hidden), jnp.float32)
    params = trees.unbox(jax.eval_shape(lumina_layers.SwiGLU().init, jax.random.key(0), x))["params"]
    assert params["w13"]["kernel"].shape == (2, hidden, width)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("large_dit", {"size": "h2048-d28-n1x"}, "did you mean 'h2048-d28-n16'"),
        ("next_dit", {"size": None}, "hidden must be a positive integer"),
        ("large_dit", {"kv_heads": 3}, "kv_heads=3 must be a divisor of heads=4"),
        ("next_dit", {"kv_heads": 0}, "kv_heads=0 must be a divisor"),
        ("large_dit", {"hidden": 12}, "heads of size 3; .* LargeDiT need a multiple of 2"),
        ("next_dit", {"hidden": 24}, "heads of size 6; .* NextDiT need a multiple of 4"),
        ("large_dit", {"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ("large_dit", {"attention": "xle"}, "did you mean 'xla'"),
        ("next_dit", {"remat": "ful"}, "did you mean 'full'"),
        ("next_dit", {"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ("large_dit", {"param_dtype": "int8"}, "param_dtype='int8'"),
    ],
)
def test_wrong_fields_are_told_when_the_backbone_is_made(name, fields, message):
    with pytest.raises(UserError, match=message) as error:
        small(name, **fields)
    assert "\n" not in str(error.value)


@BOTH
@pytest.mark.parametrize(
    "call, message",
    [
        ({"height": 5}, "patches of 2"),
        ({"conditions": {"mask": None}}, r"no conditions, got \['mask'\]"),
        ({"extras": {"pooled": None}}, "the extra 'pooled'"),
    ],
)
def test_wrong_inputs_are_told_in_one_line(name, call, message):
    backbone = small(name)
    args = inputs(call.get("height", 4))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda *args: backbone.init(
                jax.random.key(0), *args, None, call.get("conditions"), call.get("extras")
            ),
            *args,
        )

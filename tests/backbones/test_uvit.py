"""U-ViT against the published code's tensors, and its own modes against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones, interop
from scaling_dit.backbones import contract, uvit
from scaling_dit.errors import UserError
from scaling_dit.nn import layers
from tests.support import uvit_golden
from tests.support.uvit_golden import fill, initial, relative_error, run

MODES = {
    "unrolled": {},
    "scanned": {"scan_layers": True},
    "remat": {"remat": "full"},
    "scanned_remat": {"scan_layers": True, "remat": "dots"},
}


def small(**fields):
    return backbones.create("uvit", **({"size": "h32-d4-n2", "text_dim": 12, "in_channels": 3} | fields))


def inputs(height=8, width=8, length=5, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, height, width, 3)).astype("f4"),
        rng.uniform(0, 1000, batch).astype("f4"),
        rng.normal(size=(batch, length, 12)).astype("f4"),
    )


def variables_of(backbone, args):
    """Random variables of the right shapes."""
    return fill(contract.abstract_variables(backbone, args))


@pytest.fixture(scope="module")
def small_variables():
    return variables_of(small(depth=1), inputs())


QUICK_CASES = [("uvit_tiny", "scanned_remat")]
SLOW_CASES = [(name, mode) for name in uvit_golden.NAMES for mode in MODES if (name, mode) not in QUICK_CASES]


@pytest.mark.parametrize(
    "name, mode", QUICK_CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]
)
def test_outputs_and_all_gradients_equal_the_published_code(name, mode):
    golden = uvit_golden.load(name)
    backbone = golden.backbone(**MODES[mode])
    variables = interop.load_state_dict(backbone, golden.params)
    latents, timesteps, text = golden.inputs

    def loss(variables, latents):
        prediction = backbone.apply(variables, latents, timesteps, text)
        return (prediction * golden.cotangent).sum(), prediction

    (grads, grad_latents), prediction = run(jax.grad(loss, (0, 1), has_aux=True), variables, latents)
    assert relative_error(prediction, golden.prediction) < 1e-4
    assert relative_error(grad_latents, golden.grad_latents) < 1e-3
    upstream = interop.to_state_dict(backbone, grads)
    assert set(upstream) == set(golden.grads)
    errors = {key: relative_error(upstream[key], golden.grads[key]) for key in golden.grads}
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.slow
def test_eager_equals_jit():
    backbone, args = small(depth=1), inputs()
    variables = variables_of(backbone, args)
    eager = backbone.apply(variables, *args)
    assert relative_error(run(backbone.apply, variables, *args), eager) < 1e-5


def test_padded_text_has_no_influence():
    backbone, (latents, timesteps, text) = small(depth=2), inputs()
    variables = variables_of(backbone, (latents, timesteps, text))
    mask = np.array([[True, True, False, False, False], [True] * 4 + [False]])
    changed = np.where(mask[..., None], text, np.float32(100.0))
    apply = jax.jit(backbone.apply)
    masked = apply(variables, latents, timesteps, text, mask)
    np.testing.assert_array_equal(masked, apply(variables, latents, timesteps, changed, mask))
    seen = run(backbone.apply, variables, latents, timesteps, changed, None)
    assert relative_error(seen, masked) > 1e-3
    moved = np.array(text)
    moved[:, 0] += 1.0
    real = apply(variables, latents, timesteps, moved, mask)
    assert relative_error(real, masked) > 1e-4


def test_scanned_parameters_are_stacked_with_a_layer_axis():
    args = inputs()
    params = jax.eval_shape(small(scan_layers=True).init, jax.random.key(0), *args)["params"]
    kernel = params["out_blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.names == ("layers", "embed", None, "heads")
    assert kernel.value.shape == (2, 32, 3, 32)
    unrolled = jax.eval_shape(small().init, jax.random.key(0), *args)["params"]
    assert unrolled["out_blocks_1"]["mlp"]["fc2"]["kernel"].names == ("mlp", "embed")


def test_every_parameter_names_its_axes():
    params = jax.eval_shape(small(time_mlp=True).init, jax.random.key(0), *inputs())["params"]
    is_box = lambda leaf: hasattr(leaf, "names")  # noqa: E731
    for box in jax.tree.leaves(params, is_leaf=is_box):
        assert len(box.names) == box.value.ndim
        # None twice.
        assert len({n for n in box.names if n}) == len([n for n in box.names if n])


def keys_cubic(size, wanted):
    """Matrix [wanted, size] of cubic interpolation (Keys 1981, a = -1/2) between the centres of cells."""
    distance = np.abs((np.arange(wanted)[:, None] + 0.5) * size / wanted - 0.5 - np.arange(size))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "height, width",
    [
        (8, 12),
        pytest.param(16, 16, marks=pytest.mark.slow),
        pytest.param(12, 4, marks=pytest.mark.slow),
    ],
)
def test_positions_are_resized_for_other_images(height, width):
    """The table of 4 x 4 tokens, resized here by hand, is that of a model made for the other images."""
    backbone, trained, other = small(depth=1), inputs(), inputs(height=height, width=width)
    variables = variables_of(backbone, trained)
    table = variables["params"]["pos_embed"]
    rows, columns = height // 2, width // 2
    image = np.einsum(
        "ri,cj,ijd->rcd", keys_cubic(4, rows), keys_cubic(4, columns), table[6:].reshape(4, 4, 32)
    )
    resized = np.concatenate([table[:6], image.reshape(rows * columns, 32)]).astype("f4")
    by_hand = {"params": variables["params"] | {"pos_embed": resized}}
    found = run(backbone.apply, variables, *other)
    assert relative_error(found, run(backbone.apply, by_hand, *other)) < 1e-5
    grads = run(
        jax.grad(lambda table: uvit.resize_grid(table, rows, columns).sum()), np.ones((4, 4, 1), "f4")
    )
    # Every new position is a mean of old ones.
    assert np.sum(grads) == pytest.approx(rows * columns, rel=1e-5)


def test_a_table_is_resized_only_from_a_square():
    backbone, made = small(depth=1), inputs(height=4, width=12)
    variables = variables_of(backbone, made)
    assert jax.eval_shape(backbone.apply, variables, *made).shape == (2, 4, 12, 3)
    with pytest.raises(
        UserError, match="holds 18 tokens, but these shapes need 22 .*a square .*not from 12"
    ) as error:
        jax.eval_shape(backbone.apply, variables, *inputs())
    assert "\n" not in str(error.value)
    halves = variables_of(small(depth=1, param_dtype="bfloat16"), inputs())
    out = jax.eval_shape(small(depth=1, param_dtype="bfloat16").apply, halves, *inputs(height=16))
    assert out.shape == (2, 16, 8, 3)


def test_non_square_and_fewer_output_channels():
    args = inputs(height=4, width=12)
    backbone = small(out_channels=2, patch=4, depth=1)
    variables = variables_of(backbone, args)
    assert variables["params"]["pos_embed"].shape == (1 + 5 + 3, 32)
    out = run(backbone.apply, variables, *args)
    assert out.shape == (2, 4, 12, 2)
    assert np.isfinite(out).all()


def test_patches_keep_their_place():
    """Without long-range paths (zero attention output) a change in one patch stays in it."""
    backbone, args = small(final_conv=False, depth=2), inputs(height=4, width=8)
    variables = variables_of(backbone, args)
    for block in ("in_blocks_0", "mid_block", "out_blocks_0"):
        variables["params"][block]["attn"]["proj"]["kernel"][:] = 0
    moved = np.array(args[0])
    moved[0, 2, 5] += 1.0
    apply = jax.jit(backbone.apply)
    difference = np.asarray(apply(variables, moved, *args[1:])) - apply(variables, *args)
    changed = np.abs(difference).max(axis=-1) > 1e-6
    expected = np.zeros((2, 4, 8), bool)
    expected[0, 2:4, 4:6] = True
    np.testing.assert_array_equal(changed, expected)


def test_bfloat16_is_close_to_float32():
    args = inputs()
    variables = variables_of(small(depth=2), args)
    full = run(small(depth=2).apply, variables, *args)
    half = run(small(depth=2, dtype="bfloat16").apply, variables, *args)
    assert half.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(half) - full) / np.linalg.norm(full)
    assert 0 < error < 0.02


def test_param_dtype():
    variables = contract.abstract_variables(small(param_dtype="bfloat16", time_mlp=True), inputs())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


def test_initial_values():
    args = inputs(height=16, width=16)
    names = ("in_blocks_0", "pos_embed", "patch_embed", "final_layer")
    params = initial(small(hidden=128, depth=2), args, *names)
    block = params["in_blocks_0"]
    assert block["attn"]["qkv"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert block["mlp"]["fc1"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert params["pos_embed"].std() == pytest.approx(0.02, rel=0.05)
    assert not block["attn"]["proj"]["bias"].any()
    assert "bias" not in block["attn"]["qkv"]
    bound = (2 * 2 * 3) ** -0.5
    for leaf in jax.tree.leaves(params["patch_embed"]):
        assert 0.9 * bound < np.abs(leaf).max() <= bound
    bound = (3 * 3 * 3) ** -0.5
    for leaf in jax.tree.leaves(params["final_layer"]):
        assert 0.3 * bound < np.abs(leaf).max() <= bound


def test_sincos_start_fills_the_image_rows_only():
    args = inputs(height=8, width=4)
    table = initial(small(positions="sincos_init", depth=1), args, "pos_embed")["pos_embed"]
    np.testing.assert_array_equal(table[-8:], layers.sincos_2d(4, 2, 32))
    assert np.abs(table[:-8]).max() < 0.2


@pytest.mark.parametrize("depth, blocks", [(1, 1), (2, 3), (3, 3)])
def test_depth_is_rounded_to_equal_halves(depth, blocks):
    variables = contract.abstract_variables(small(depth=depth), inputs())
    assert sum("block" in key for key in variables["params"]) == blocks
    stacked = small(depth=depth, scan_layers=True)
    variables = contract.abstract_variables(stacked, inputs())
    assert jax.eval_shape(stacked.apply, variables, *inputs()).shape == inputs()[0].shape


def test_sizes_and_overrides():
    assert small(size="h2048-d42-n16").widths == (2048, 42, 16)
    assert small(size="h96-d6-n3").widths == (96, 6, 3)
    assert small(size="h1024-d20-n16", depth=2).widths == (1024, 2, 16)
    assert small(size=None, hidden=8, depth=1, heads=1).widths == (8, 1, 1)
    for name, row in uvit.SIZES.items():
        assert name == f"h{row['hidden']}-d{row['depth']}-n{row['heads']}"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": "h2048-d42-n1x"}, "did you mean 'h2048-d42-n16'"),
        ({"size": None}, "hidden must be a positive integer"),
        ({"hidden": 33}, "multiple of heads"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"attention": "xle"}, "did you mean 'xla'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"positions": "learn"}, "did you mean 'learned'"),
    ],
)
def test_wrong_fields_are_told_when_the_backbone_is_made(fields, message):
    with pytest.raises(UserError, match=message) as error:
        small(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": (2, 8, 8, 4)}, "in_channels=3"),
        ({"text": (2, 5, 16)}, "text_dim=12"),
        ({"latents": (2, 7, 8, 3)}, "patches of 2"),
        (
            {"text": (2, 6, 12)},
            "holds 22 tokens, but these shapes need 23 .*a square of image tokens, not from 15",
        ),
        ({"text": (2, 30, 12)}, "holds 22 tokens, but these shapes need 47 .*not from -9"),
        ({"conditions": {"mask": None}}, r"no conditions, got \['mask'\]"),
        ({"extras": {"pooled": None}}, "the extra 'pooled'"),
    ],
)
def test_wrong_inputs_are_told_in_one_line(small_variables, change, message):
    backbone = small(depth=1)
    latents, timesteps, text = inputs()
    call = {"latents": latents, "text": text, "conditions": None, "extras": None}
    call |= {
        key: np.zeros(value, "f4") if isinstance(value, tuple) else value for key, value in change.items()
    }
    with pytest.raises(UserError, match=message) as error:
        backbone.apply(
            small_variables,
            call["latents"],
            timesteps,
            call["text"],
            None,
            call["conditions"],
            call["extras"],
        )
    assert "\n" not in str(error.value)

"""PixArt against diffusers' PixArtTransformer2DModel, and its own modes against each other."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from scaling_dit import backbones, interop
from scaling_dit.backbones import contract, pixart
from scaling_dit.errors import UserError
from scaling_dit.nn import layers
from tests.support import parity
from tests.support.uvit_golden import fill, initial, relative_error


def small(**fields):
    return backbones.create("pixart", **({"size": "h32-d2-n4", "text_dim": 12, "base_size": 4} | fields))


def reference(backbone, seed=0):
    """diffusers' model of the same shape, every parameter random."""
    hidden, depth, heads = backbone.widths
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        in_channels=backbone.in_channels,
        out_channels=(backbone.out_channels or backbone.in_channels) * (1 + backbone.learn_sigma),
        num_layers=depth,
        cross_attention_dim=hidden,
        sample_size=backbone.base_size * backbone.patch,
        patch_size=backbone.patch,
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=backbone.text_dim if backbone.embeds_caption else None,
    )
    return parity.randomise_(model, seed)


# fields of ours, height and width of the latents, with a mask
CASES = [
    pytest.param({"remat": "dots"}, (8, 8), True, id="base-remat", marks=pytest.mark.slow),
    pytest.param(
        {"learn_sigma": True, "scan_layers": True, "remat": "full"},
        (4, 12),
        True,
        id="wide-sigma-scanned-remat",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"caption_embedding": False, "text_dim": 32, "patch": 4}, (24, 16), False, id="tall-no-caption-patch4"
    ),
    pytest.param({"learn_sigma": True}, (16, 16), False, id="larger", marks=pytest.mark.slow),
    pytest.param({"in_channels": 3, "out_channels": 2}, (6, 10), True, id="channels", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fields, shape, masked", CASES)
def test_outputs_and_all_gradients_equal_diffusers(fields, shape, masked):
    backbone = small(**fields)
    model = reference(backbone)
    latents, timesteps, text, mask = parity.example(backbone, *shape)
    variables = interop.load_state_dict(backbone, model.state_dict())
    inputs = (latents, timesteps, text, mask if masked else None)
    prediction, grads, grad_latents = parity.value_and_grads(backbone, variables, inputs)

    x = torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2).copy()).requires_grad_()
    out = model(
        x,
        encoder_hidden_states=torch.from_numpy(np.array(text)),
        timestep=torch.from_numpy(np.array(timesteps)),
        encoder_attention_mask=torch.from_numpy(np.array(mask)) if masked else None,
        added_cond_kwargs={},
    ).sample.permute(0, 2, 3, 1)
    cotangent = np.random.default_rng(5).normal(size=out.shape).astype("f4")
    (out * torch.from_numpy(cotangent)).sum().backward()
    assert out.shape[-1] == (fields.get("out_channels") or backbone.in_channels) * (1 + backbone.learn_sigma)
    assert relative_error(prediction, out.detach()) < 1e-4
    assert relative_error(grad_latents, x.grad.permute(0, 2, 3, 1)) < 1e-3
    ours = interop.to_state_dict(backbone, grads)
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert set(ours) == set(theirs)
    # One shift of all keys is nothing to a softmax: the gradient of this bias is rounding.
    silent = {name for name in theirs if name.endswith("to_k.bias")}
    largest = max(np.abs(value).max() for value in theirs.values())
    assert all(np.abs(ours[name]).max() < 1e-5 * largest for name in silent)
    errors = {name: relative_error(ours[name], theirs[name]) for name in set(theirs) - silent}
    assert max(errors.values()) < 1e-3, errors


def test_other_grids_get_scaled_positions():
    square = layers.sincos_2d(4, 4, 16, base=4)
    np.testing.assert_array_equal(square, layers.sincos_2d(4, 4, 16))
    twice = layers.sincos_2d(8, 2, 16, base=4).reshape(8, 2, 16)
    np.testing.assert_allclose(twice[::2, 1], square.reshape(4, 4, 16)[:, 2], atol=1e-6)


@pytest.mark.slow
def test_modes_compute_the_same():
    parity.check_scan_remat_jit(small, parity.example(small(), 4, 8))


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    def deep(**fields):
        return small(size="h64-d4-n4", scan_layers=True, **fields)

    parity.check_bf16(deep, parity.example(deep(), 8, 8))


def test_padded_text_has_no_influence_and_a_row_may_be_all_padding():
    backbone = small(depth=1)
    latents, timesteps, text, _ = inputs = parity.example(backbone, 4, 4, batch=3)
    variables = fill(contract.abstract_variables(backbone, inputs))
    mask = np.array([[True, True, False, False, False], [False] * 5, [True] * 5])

    def loss(text, mask):
        prediction = backbone.apply(variables, latents, timesteps, text, mask)
        return prediction.sum(), prediction

    call = jax.jit(jax.grad(loss, has_aux=True))
    grad, prediction = call(text, mask)
    assert np.isfinite(prediction).all() and np.isfinite(grad).all()
    assert not np.asarray(grad)[0, 2:].any() and np.asarray(grad)[0, :2].any()
    _, changed = call(np.where(mask[..., None], text, np.float32(100.0)), mask)
    np.testing.assert_array_equal(changed[::2], prediction[::2])
    _, unmasked = call(text, np.ones_like(mask))
    np.testing.assert_array_equal(unmasked[2], prediction[2])
    assert relative_error(unmasked[0], prediction[0]) > 1e-4


def test_a_learned_variance_doubles_the_last_map():
    def parameters(**fields):
        backbone = backbones.create("pixart", scan_layers=True, **fields)
        inputs = contract.example_inputs(backbone, (32, 32, 4), (77, 1024))
        return sum(leaf.size for leaf in jax.tree.leaves(contract.abstract_variables(backbone, inputs)))

    more = parameters(size="h1152-d28-n16", learn_sigma=True) - parameters(size="h1152-d28")
    assert more == 2 * 2 * 4 * (1152 + 1)


def test_every_size_is_named_by_its_numbers():
    for name, row in pixart.SIZES.items():
        assert name == f"h{row['hidden']}-d{row['depth']}"
        assert row["heads"] == 16


def test_the_size_decides_about_the_caption_embedding_unless_told():
    create = backbones.create
    assert not create("pixart", size="h1024-d28").embeds_caption
    assert not create("pixart", size="h1024-d28-n16").embeds_caption
    assert create("pixart", size="h1024-d28", caption_embedding=True).embeds_caption
    assert create("pixart", size="h1536-d28").embeds_caption
    assert create("pixart", size="h1024-d29-n16").embeds_caption
    assert create("pixart", size=None, hidden=8, depth=1, heads=1).embeds_caption
    assert create("pixart", size="h1536-d28", depth=2).widths == (1536, 2, 16)


def test_initial_values():
    backbone = small(size="h128-d2-n4", text_dim=64)
    names = ("blocks_0/table", "blocks_1", "head", "patch_embed", "time", "caption_embed")
    params = initial(backbone, parity.example(backbone, 8, 8), *names)
    block = params["blocks_1"]
    for zero in (block["cross_attn"]["proj"], params["head"]["linear"]):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zero))
    for kernel, fans in (
        # One map from 128 to 3 * 128.
        (block["attn"]["qkv"]["kernel"], 4 * 128),
        (block["cross_attn"]["kv"]["kernel"], 3 * 128),
        (block["cross_attn"]["q"]["kernel"], 2 * 128),
        (block["mlp"]["fc1"]["kernel"], 5 * 128),
        (params["patch_embed"]["kernel"], 16 + 128),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    for leaf in (params["time"]["modulation"], params["time"]["fc1"], params["caption_embed"]["fc2"]):
        assert leaf["kernel"].std() == pytest.approx(0.02, rel=0.05)
        assert not leaf["bias"].any()
    tables = np.stack([params["blocks_0/table"], block["table"]])
    assert tables.shape == (2, 6, 128)
    assert tables.std() == pytest.approx(128**-0.5, rel=0.1)
    assert params["head"]["table"].std() == pytest.approx(128**-0.5, rel=0.2)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_names_its_axes(scan_layers):
    backbone = small(scan_layers=scan_layers)
    inputs = parity.example(backbone, 4, 4)
    params = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"]
    is_box = lambda leaf: hasattr(leaf, "names")  # noqa: E731
    for box in jax.tree.leaves(params, is_leaf=is_box):
        assert len(box.names) == box.value.ndim
        # None twice.
        assert len({n for n in box.names if n}) == len([n for n in box.names if n])
    assert not scan_layers or params["blocks"]["table"].names == ("layers", None, "embed")
    halves = contract.abstract_variables(small(param_dtype="bfloat16"), inputs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(halves)} == {"bfloat16"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": "h1535-d28"}, "did you mean 'h1536-d28'"),
        ({"caption_embedding": False}, "text_dim=12, hidden=32 .*set caption_embedding=True or text_dim=32"),
        ({"size": "h1024-d28-n16"}, "text_dim=12, hidden=1024"),
        ({"base_size": 0}, "base_size must be at least 1"),
        ({"hidden": 18, "heads": 2}, "hidden=18 must be a multiple of 4"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"hidden": 36, "heads": 5}, "multiple of heads"),
        ({"attention": "xle"}, "did you mean 'xla'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_wrong_fields_are_told_when_the_backbone_is_made(fields, message):
    with pytest.raises(UserError, match=message) as error:
        small(**fields)
    assert "\n" not in str(error.value)

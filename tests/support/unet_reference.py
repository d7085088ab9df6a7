"""diffusers' UNet2DConditionModel with the shape of one of our UNets and random weights, and what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from scaling_dit import backbones, interop
from scaling_dit.backbones import unet
from tests.support.uvit_golden import relative_error, run

# Forms of the UNet, as fields: in full, and cut to two levels or one, which compile faster.
SD2 = {"channel_mult": (1, 2, 4, 4), "transformer_depth": (1, 1, 1), "res_blocks": 1}
SDXL = {"channel_mult": (1, 2, 4), "transformer_depth": (0, 1, 2), "res_blocks": 1}
TD = {"channel_mult": (1, 2, 2), "transformer_depth": (0, 2, 3), "res_blocks": 2}
TEXT_TIME = {"text_time": True, "pooled_dim": 10}
SD2_CUT = {"channel_mult": (1, 2), "transformer_depth": (1,)}
TD_CUT = {"channel_mult": (1, 2), "transformer_depth": (0, 3), "res_blocks": 2}
SDXL_CUT = {"channel_mult": (1, 2), "transformer_depth": (0, 2)}
IF = {"channel_mult": (1, 2, 3), "attention_levels": (0, 1), "res_blocks": 1}
IF_CUT = {"channel_mult": (1, 2), "attention_levels": (0,)}
ONE_LEVEL = {"channel_mult": (1,), "transformer_depth": (2,)}
IF_ONE_LEVEL = {"channel_mult": (1,), "attention_levels": (0,)}
# Different modes, so that all of them are held against the reference.
SCANNED = {"scan_layers": True, "remat": "full"}
SCANNED_DOTS = {"scan_layers": True, "remat": "dots"}


def small(**fields):
    """A UNet of 32 channels and heads of 16; SDXL's form by default."""
    tiny = {"size": "sdxl", "channels": 32, "head_dim": 16, "in_channels": 3, "text_dim": 12}
    return backbones.create("unet", **(tiny | SDXL | fields))


def small_if(**fields):
    """IF's UNet of 32 channels and heads of 16; three levels with attention at two by default."""
    tiny = {"channels": 32, "head_dim": 16, "in_channels": 3, "text_dim": 12}
    return backbones.create("unet_if", **(tiny | IF | fields))


def model(backbone, seed=0):
    """The diffusers model of a backbone, every parameter random and as large as PyTorch's initial values."""
    shape = backbone.shape
    levels = range(len(shape.widths))
    common = {
        "in_channels": backbone.in_channels,
        "out_channels": backbone.out_channels or backbone.in_channels,
        "block_out_channels": list(shape.widths),
        "layers_per_block": shape.res_blocks,
        "cross_attention_dim": backbone.text_dim,
    }
    if isinstance(backbone, unet.UNet):
        attended = [shape.depths[level] > 0 for level in levels]
        names = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        # Diffusers: number of heads.
        common |= {
            "transformer_layers_per_block": [
                *map(max, shape.depths[:-1], [1] * len(levels)),
                shape.mid_depth,
            ],
            "attention_head_dim": [width // shape.head_dim for width in shape.widths],
            "use_linear_projection": True,
        }
        if shape.text_time:
            common |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": backbone.pooled_dim + 6 * 256,
            }
    else:
        attended = [level in shape.attention_levels for level in levels]
        names = (
            ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        )
        common |= {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "attention_head_dim": shape.head_dim,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
        }
    common["down_block_types"] = [names[0][has] for has in attended]
    common["up_block_types"] = [names[1][has] for has in reversed(attended)]
    reference = UNet2DConditionModel(**common)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            scale = 0.1 if parameter.ndim == 1 else (3 * parameter[0].numel()) ** -0.5
            parameter.copy_(noise * scale + (1.0 if norm else 0.0))
    return reference


def state_dict(reference):
    return {name: value.detach().numpy() for name, value in reference.state_dict().items()}


def inputs(backbone, height, width, *, length=5, batch=2, seed=0):
    """(latents, timesteps, text, text_mask, None, extras) of one call; text is padded in the first example only."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), bool)
    mask[0, 3:] = False
    extras = None
    if backbone.EXTRAS:
        extras = {
            "pooled": rng.normal(size=(batch, backbone.pooled_dim)).astype("f4"),
            "sizes": rng.integers(0, 1024, (batch, 6)).astype("f4"),
        }
    return (
        rng.normal(size=(batch, height, width, backbone.in_channels)).astype("f4"),
        rng.uniform(0, 1000, batch).astype("f4"),
        rng.normal(size=(batch, length, backbone.text_dim)).astype("f4"),
        mask,
        None,
        extras,
    )


def forward(reference, args):
    """(prediction, gradients of sum(prediction * latents of seed 1) by latents and text, and by every parameter)."""
    latents, timesteps, text, mask, _, extras = args
    x = torch.tensor(latents.transpose(0, 3, 1, 2), requires_grad=True)
    context = torch.tensor(text, requires_grad=True)
    added = None
    if extras:
        added = {"text_embeds": torch.tensor(extras["pooled"]), "time_ids": torch.tensor(extras["sizes"])}
    prediction = reference(
        x,
        torch.tensor(timesteps),
        context,
        encoder_attention_mask=torch.tensor(mask),
        added_cond_kwargs=added,
    ).sample
    weights = cotangent(latents.shape)
    reference.zero_grad()
    (prediction * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()
    by_input = {"latents": x.grad.numpy().transpose(0, 2, 3, 1), "text": context.grad.numpy()}
    by_parameter = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    return prediction.detach().numpy().transpose(0, 2, 3, 1), by_input, by_parameter


def check(backbone, height, width, *, gradients=True, tolerance=1e-3):
    """Holds outputs and gradients, by inputs and all parameters, against diffusers; mask and extras included.

    `tolerance` is the largest difference of gradients, over the largest value of each.
    """
    reference = model(backbone)
    args = inputs(backbone, height, width)
    wanted, by_input, by_parameter = forward(reference, args)
    variables = interop.load_state_dict(backbone, state_dict(reference))
    # Compiles in a third of the time.
    if not gradients:
        assert relative_error(run(backbone.apply, variables, *args), wanted) < 1e-4
        return

    def loss(variables, latents, text):
        prediction = backbone.apply(variables, latents, args[1], text, *args[3:])
        return (prediction * cotangent(latents.shape)).sum(), prediction

    (grads, by_latents, by_text), prediction = run(
        jax.grad(loss, (0, 1, 2), has_aux=True), variables, args[0], args[2]
    )
    assert relative_error(prediction, wanted) < 1e-4
    assert relative_error(by_latents, by_input["latents"]) < tolerance
    assert relative_error(by_text, by_input["text"]) < tolerance
    # Padded text has no influence.
    assert not np.asarray(by_text)[~args[3]].any()
    assert np.asarray(by_text)[args[3]].all()
    found = interop.to_state_dict(backbone, grads)
    assert set(found) == set(by_parameter)
    # A norm cancels a bias before it where a group is one channel: that gradient is rounding, so there is a floor.
    floor = 1e-3 * max(np.abs(value).max() for value in by_parameter.values())
    errors = {
        name: np.abs(found[name] - value).max() / max(np.abs(value).max(), floor)
        for name, value in by_parameter.items()
    }
    assert max(errors.values()) < tolerance, errors


def check_bfloat16(full, half):
    """Products in bfloat16 change the prediction by less than 2 %; float32 equals diffusers without a mask, eagerly."""
    reference = model(full)
    args = list(inputs(full, 4, 4))
    args[3] = np.ones_like(args[3])
    wanted = forward(reference, args)[0]
    variables = interop.load_state_dict(full, state_dict(reference))
    eager = full.apply(*jax.tree.map(jnp.asarray, (variables, *args[:3])))
    assert relative_error(eager, wanted) < 1e-4
    found = run(half.apply, variables, *args)
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02


def cotangent(shape):
    return np.random.default_rng(1).normal(size=shape).astype("f4")

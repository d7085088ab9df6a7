"""Next-DiT against diffusers' LuminaNextDiT2DModel; what it shares with Large-DiT is in test_lumina.py."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from scaling_dit import backbones, interop
from scaling_dit.costs.count import count
from tests.support import parity
from tests.support.uvit_golden import relative_error

# fields of ours, height and width of the latents
CASES = [
    pytest.param({"kv_heads": None}, (8, 8), id="square", marks=pytest.mark.slow),
    pytest.param({"kv_heads": 2, "scan_layers": True, "remat": "full"}, (4, 12), id="grouped-wide-scanned"),
    pytest.param(
        {"qk_norm": False, "patch": 4, "remat": "dots"},
        (12, 4),
        id="no-norm-tall-patch4",
        marks=pytest.mark.slow,
    ),
    pytest.param({"kv_heads": 1, "learn_sigma": False}, (6, 10), id="one-kv-head", marks=pytest.mark.slow),
]


def reference(backbone):
    """diffusers' model of the same shape, every parameter random, its text queries those of the image."""
    hidden, depth, heads = backbone.widths
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=32,
        patch_size=backbone.patch,
        in_channels=backbone.in_channels,
        hidden_size=hidden,
        num_layers=depth,
        num_attention_heads=heads,
        num_kv_heads=backbone.kv_heads or heads,
        qk_norm=backbone.qk_norm,
        learn_sigma=backbone.learn_sigma,
        cross_attention_dim=backbone.text_dim,
    )
    parity.randomise_(model, seed=1)
    for layer in model.layers:
        layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
        if backbone.qk_norm:
            layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    return model


@pytest.mark.parametrize("fields, shape", CASES)
def test_outputs_and_all_gradients_equal_diffusers(fields, shape):
    fields = {"size": "h48-d2-n4", "text_dim": 20, "learn_sigma": True} | fields
    backbone = backbones.create("next_dit", **fields)
    model = reference(backbone)
    latents, timesteps, text, mask = inputs = parity.example(backbone, *shape)
    variables = interop.load_state_dict(backbone, model.state_dict())
    prediction, grads, grad_latents = parity.value_and_grads(backbone, variables, inputs)

    x = torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2).copy()).requires_grad_()
    rows, columns = (side // backbone.patch for side in shape)
    out = model(
        x,
        *(torch.from_numpy(np.array(value)) for value in (timesteps, text, mask)),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(backbone.head_size, rows, columns),
        cross_attention_kwargs={},
    ).sample.permute(0, 2, 3, 1)
    # As in value_and_grads.
    weights = np.random.default_rng(5).normal(size=prediction.shape).astype("f4")
    (out * torch.from_numpy(weights)).sum().backward()
    assert relative_error(prediction, out.detach()) < 1e-4
    assert relative_error(grad_latents, x.grad.permute(0, 2, 3, 1)) < 1e-3

    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    ours = interop.to_state_dict(backbone, grads)
    assert set(ours) - set(theirs) == {"pad_token"}
    # Ours is one parameter for both attentions, so its gradient is the sum.
    for name in theirs:
        if ".attn1." in name and name.split(".")[-2] in ("to_q", "norm_q"):
            copy = name.replace("attn1", "attn2")
            theirs[name] = theirs[copy] = theirs[name] + theirs[copy]
    # One shift of all keys of the text is nothing to their softmax: the gradient of this bias is rounding.
    silent = {name for name in theirs if name.endswith("attn2.norm_k.bias")}
    assert all(np.abs(ours[name]).max() < 1e-4 for name in silent)
    errors = {name: relative_error(ours[name], theirs[name]) for name in set(theirs) - silent}
    assert max(errors.values()) < 1e-3, errors


def test_grouped_queries_of_the_published_variant():
    """8 heads of keys and values: diffusers' model on the meta device, without what it has twice."""
    backbone = backbones.create("next_dit", kv_heads=8, scan_layers=True)
    with torch.device("meta"):
        model = diffusers.LuminaNextDiT2DModel(
            hidden_size=2304,
            num_layers=24,
            num_attention_heads=32,
            num_kv_heads=8,
            cross_attention_dim=1024,
            learn_sigma=False,
        )
    extra = ("attn2.to_q", "attn2.norm_q")
    wanted = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in extra))
    assert count(backbone).params == wanted

"""Next-DiT against diffusers' LuminaNextDiT2DModel; what it shares with Large-DiT is in test_lumina.py."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from uvit_golden import fill, relative_error, run

from scaling_dit import backbones, interop
from scaling_dit.backbones import contract
from scaling_dit.scaling.count import count

FIELDS = {"hidden": 48, "depth": 2, "heads": 4, "text_dim": 20, "learn_sigma": True}
# kv_heads, qk_norm, height, width, patch, and how ours runs
CASES = [
    pytest.param(4, True, (8, 8), 2, {}, id="square"),
    pytest.param(2, True, (4, 12), 2, {"scan_layers": True, "remat": "full"}, id="grouped-wide-scanned"),
    pytest.param(4, False, (12, 4), 4, {"remat": "dots"}, id="no-norm-tall-patch4", marks=pytest.mark.slow),
    pytest.param(1, False, (6, 10), 2, {"scan_layers": True}, id="one-kv-head", marks=pytest.mark.slow),
]


def reference(backbone, variables):
    """diffusers' model with the weights of ours."""
    _, _, heads = backbone.widths
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=32,
        patch_size=backbone.patch,
        in_channels=4,
        hidden_size=FIELDS["hidden"],
        num_layers=FIELDS["depth"],
        num_attention_heads=heads,
        num_kv_heads=backbone.kv_heads,
        qk_norm=backbone.qk_norm,
        learn_sigma=backbone.learn_sigma,
        cross_attention_dim=FIELDS["text_dim"],
    )
    weights = interop.to_state_dict(backbone, variables)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=True)
    return model


def random_variables(backbone, args):
    """Norms near one and no gate at zero."""
    variables = fill(contract.abstract_variables(backbone, args))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if path[-1].key == "scale" else leaf, variables
    )


@pytest.mark.parametrize("kv_heads, qk_norm, shape, patch, mode", CASES)
def test_outputs_and_all_gradients_equal_diffusers(kv_heads, qk_norm, shape, patch, mode):
    backbone = backbones.create("next_dit", kv_heads=kv_heads, qk_norm=qk_norm, patch=patch, **FIELDS, **mode)
    rng = np.random.default_rng(3)
    latents, cotangent = (rng.normal(size=(2, *shape, c)).astype("f4") for c in (4, 8))
    timesteps, text = np.array([17.0, 303.0], "f4"), rng.normal(size=(2, 7, 20)).astype("f4")
    mask = np.arange(7) < np.array([[7], [3]])
    variables = random_variables(backbone, (latents, timesteps, text))

    def loss(variables, latents):
        prediction = backbone.apply(variables, latents, timesteps, text, mask)
        return (prediction * cotangent).sum(), prediction

    (grads, grad_latents), prediction = run(jax.grad(loss, (0, 1), has_aux=True), variables, latents)

    model = reference(backbone, variables)
    x = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).requires_grad_()
    rotary = get_2d_rotary_pos_embed_lumina(backbone.head_size, shape[0] // patch, shape[1] // patch)
    out = model(
        x,
        *map(torch.from_numpy, (timesteps, text, mask.astype("i8"))),
        image_rotary_emb=rotary,
        cross_attention_kwargs={},
    ).sample.permute(0, 2, 3, 1)
    (out * torch.from_numpy(cotangent)).sum().backward()
    assert relative_error(prediction, out.detach()) < 1e-4
    assert relative_error(grad_latents, x.grad.permute(0, 2, 3, 1)) < 1e-3

    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    ours = interop.to_state_dict(backbone, grads)
    assert set(ours) - set(theirs) == {"pad_token"}
    for name in theirs:  # ours is one parameter for both attentions, so its gradient is the sum
        if ".attn1." in name and name.split(".")[-2] in ("to_q", "norm_q"):
            copy = name.replace("attn1", "attn2")
            theirs[name] = theirs[copy] = theirs[name] + theirs[copy]
    # One shift of all keys of the text is nothing to their softmax: the gradient of this bias is rounding.
    silent = {name for name in theirs if name.endswith("attn2.norm_k.bias")}
    assert all(np.abs(ours[name]).max() < 1e-5 for name in silent)
    errors = {name: relative_error(ours[name], theirs[name]) for name in set(theirs) - silent}
    assert max(errors.values()) < 1e-3, errors


def test_parameters_and_macs_of_the_named_size():
    """The closed form of diffusers' class without attn2's queries, minus the padding token that nothing reads."""
    backbone = backbones.create("next_dit", size="h2304-d24-n32", learn_sigma=True, scan_layers=True)
    found = count(backbone)
    assert found.params == 1_874_203_168 - 2304
    assert found.macs_paper / 1e9 == pytest.approx(400.4, abs=0.1)


def test_grouped_queries_of_the_published_variant():
    """8 heads of keys and values: diffusers' model on the meta device, without what it has twice or does not read."""
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
    extra = ("attn2.to_q", "attn2.norm_q", "pad_token")
    wanted = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in extra))
    assert count(backbone).params == wanted

"""Weights of backbones with conditions: diffusers' widened UNets there and back, and own names for the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scaling_dit import backbones, interop
from scaling_dit.backbones import contract
from scaling_dit.errors import UserError
from scaling_dit.interop.diffusers.config import write_config
from tests.support import parity, unet_reference
from tests.support.layouts import FIELDS
from tests.support.uvit_golden import fill, relative_error, run

# Stable Diffusion's inpainting layout: noise, mask, masked image.
INPAINT = (("inpaint", 5, "channel", "shared"),)
# InstructPix2Pix's: noise, image.
EDIT = (("edit", 4, "channel", "shared"),)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, cut, rows",
    [
        (unet_reference.small, unet_reference.ONE_LEVEL, INPAINT),
        (unet_reference.small, unet_reference.SD2_CUT, EDIT),
        pytest.param(
            unet_reference.small_if, unet_reference.IF_ONE_LEVEL, INPAINT + EDIT, marks=pytest.mark.slow
        ),
    ],
)
def test_a_unet_with_channels_is_diffusers_with_a_widened_convolution(make, cut, rows):
    ours = make(in_channels=4, conditions=rows, **cut)
    channels = 4 + sum(row[1] for row in rows)
    reference = unet_reference.model(make(in_channels=channels, out_channels=4, **cut)).eval()
    assert reference.conv_in.in_channels == channels
    state_dict = unet_reference.state_dict(reference)
    variables = interop.load_state_dict(ours, state_dict)
    back = interop.to_state_dict(ours, variables)
    assert set(back) == set(state_dict)
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name], value)
    config = write_config("unet", ours, (8, 8))
    assert (config["in_channels"], config["out_channels"]) == (channels, 4)

    latents, timesteps, text, mask, _, _ = unet_reference.inputs(ours, 8, 8)
    rng = np.random.default_rng(3)
    images = {name: rng.normal(size=(2, 8, 8, width)).astype("f4") for name, width, *_ in rows}
    joined = [latents]
    for name, *_ in rows:
        # The mask comes before the image in files, and behind it here.
        joined += [images[name][..., 4:], images[name][..., :4]]
    with torch.no_grad():
        wanted = reference(
            torch.tensor(np.concatenate(joined, axis=-1).transpose(0, 3, 1, 2)),
            torch.tensor(timesteps),
            torch.tensor(text),
            encoder_attention_mask=torch.tensor(mask),
        ).sample.numpy().transpose(0, 2, 3, 1)  # fmt: skip
    conditions = {name: (jnp.asarray(image), jnp.ones(2, bool)) for name, image in images.items()}
    found = run(ours.apply, variables, latents, timesteps, text, mask, conditions)
    assert relative_error(found, wanted) < 1e-5


def test_a_convolution_of_other_channels_is_one_line():
    ours = unet_reference.small(in_channels=4, conditions=INPAINT, **unet_reference.ONE_LEVEL)
    message = r"conv_in.weight is \(32, 4, 3, 3\), axis 1 must be 9 = 4 \(.*noise.*\) \+ 1 \(.*masks.*\) \+ 4 \(.*image"
    with pytest.raises(UserError, match=message):
        interop.load_state_dict(ours, {"conv_in.weight": np.zeros((32, 4, 3, 3), np.float32)})


@pytest.mark.parametrize(
    "name",
    ["uvit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pixart", "large_dit", "next_dit"))],
)
def test_transformers_keep_their_conditions_under_names_of_their_own(name):
    rows = ("a", 5, "token", "shifted"), ("b", 4, "channel", "shared")
    ours = backbones.create(name, text_dim=16, conditions=rows, **FIELDS[name])
    variables = fill(contract.abstract_variables(ours, parity.example(ours, 4, 4)))
    weights = interop.to_state_dict(ours, variables)
    own = {key: value.shape for key, value in weights.items() if key.startswith("condition")}
    assert own.pop("condition_pos.a", (1, 4, 32)) == (1, 4, 32)
    assert own == {
        "condition_embed.a.weight": (32, 5, 2, 2),
        "condition_embed.a.bias": (32,),
        "condition_embed.b.weight": (32, 4, 2, 2),
    }
    again = interop.load_state_dict(ours, weights)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(again["params"], dict(variables["params"]))
    with pytest.raises(UserError, match="missing: condition_embed.a.bias, condition_embed.a.weight"):
        interop.load_state_dict(
            ours, {key: value for key, value in weights.items() if "condition" not in key}
        )
    if name in ("pixart", "next_dit"):
        with pytest.raises(
            UserError, match="reads no image conditions, and this backbone reads a, b; use --to=safet"
        ):
            write_config(name, ours, (4, 4))

"""The autoencoder against diffusers' `AutoencoderKL` with the same weights, from files that diffusers wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from scaling_dit.encoders.vae import Autoencoder

SIDE = 32  # px
KEY = jax.random.key(0)
SIZES = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
    "sample_size": 16,
}


def tiny(**changes):
    """A random torch model; norms are moved from the identity, or their parameters could be lost unseen."""
    torch.manual_seed(0)
    options = SIZES | changes
    levels = len(options["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    model = AutoencoderKL(**kinds, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)


@functools.cache
def opened(place, **fields):
    """(codec, its weights, the jitted moments and decoding)."""
    vae = Autoencoder(weights=str(place), **fields)
    return vae, vae.load(), jax.jit(vae.moments), jax.jit(vae.decode_float)


def torch_moments(model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).permute(0, 2, 3, 1).numpy()


def torch_decode(model, latents):
    z = torch.from_numpy(np.asarray(latents)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.decode(z).sample.permute(0, 2, 3, 1).numpy()


def test_moments_and_decoding_equal_those_of_diffusers(model, folder, images):
    vae, params, moments_of, decode = opened(folder.parent)  # the part of a whole pipeline is found
    moments = moments_of(params, images)
    assert moments.dtype == jnp.float32
    assert moments.shape == (2, *vae.moments_shape(SIDE)) == (2, 16, 16, 6)
    np.testing.assert_allclose(moments, torch_moments(model, images), atol=1e-4)
    latents = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(decode(params, latents), torch_decode(model, latents / 0.7), atol=1e-4)

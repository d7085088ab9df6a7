"""Codecs: to latents and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.encoders import codec
from scaling_dit.errors import UserError

RNG = jax.random.key(0)


def test_every_level_comes_back():
    pixels = codec.create_codec("pixels")
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    latents = jax.jit(pixels.encode)({}, images, RNG)
    assert latents.dtype == jnp.float32
    assert latents.shape == (1, *pixels.shape(16))
    assert (float(latents.min()), float(latents.max())) == pytest.approx((-1.0, 1.0), abs=1e-6)
    decoded = jax.jit(pixels.decode)({}, latents)
    assert decoded.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, images)


def test_decode_rounds_and_clips():
    values = jnp.array(
        [-9.0, -1.0, 0.499 / 127.5 - 1, 0.501 / 127.5 - 1, 1.0, 1.7, jnp.inf, -jnp.inf, jnp.nan]
    )
    decoded = codec.create_codec("pixels").decode({}, values)
    np.testing.assert_array_equal(decoded, [0, 0, 0, 1, 255, 255, 255, 0, 0])


def test_low_precision_latents_are_decoded_in_float32():
    values = jnp.linspace(-1, 1, 64).astype(jnp.bfloat16)
    pixels = codec.create_codec("pixels")
    np.testing.assert_array_equal(pixels.decode({}, values), pixels.decode({}, values.astype(jnp.float32)))


def test_names_and_fields():
    assert codec.codec_fields("pixels") == {}
    pixels = codec.create_codec("pixels")
    assert (pixels.channels, pixels.bounded) == (3, True)
    with pytest.raises(UserError, match="unknown codec 'pixel'; did you mean 'pixels'"):
        codec.create_codec("pixel")
    with pytest.raises(UserError, match="codec 'pixels' has no field 'channels'"):
        codec.create_codec("pixels", channels=4)

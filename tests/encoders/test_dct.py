"""The block DCT: an orthonormal basis, coarse before fine, and images that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from scaling_dit.data import sources
from scaling_dit.encoders import codec
from scaling_dit.encoders.dct import BlockDct
from scaling_dit.errors import UserError

RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def images():
    source = sources.create_source(name="shapes", preset="free64")
    return np.stack([source[index]["image"] for index in range(256)])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_basis_is_orthonormal(patch):
    basis = BlockDct(patch, 3 * patch**2).basis
    np.testing.assert_allclose(basis @ basis.T, np.eye(3 * patch**2), atol=1e-6)


@pytest.mark.parametrize("patch, height, width", [(1, 4, 4), (2, 8, 12), (4, 16, 8)])
def test_all_coefficients_give_the_image_back_exactly(patch, height, width):
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    dct = BlockDct(patch, 3 * patch**2)
    latents = jax.jit(dct.encode)({}, images, RNG)
    assert latents.dtype == jnp.float32
    assert latents.shape == (3, height // patch, width // patch, 3 * patch**2)
    np.testing.assert_array_equal(jax.jit(dct.decode)({}, latents), images)


def test_coefficients_are_those_of_scipy():
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    latents = np.asarray(jax.jit(BlockDct(4, 48, scale=1.0).encode)({}, images, RNG))
    expected = fft.dctn(images[0] / 127.5 - 1, norm="ortho")
    order = sorted(np.ndindex(4, 4, 3), key=lambda n: (n[0] + n[1], n[2], n))
    np.testing.assert_allclose(latents.ravel(), [expected[n] for n in order], atol=1e-5)


def test_energy_falls_from_coarse_to_fine(images):
    """What is kept holds more, per coefficient, than what is dropped, so the error is as small as it can be."""
    encode = jax.jit(BlockDct(2, 12, scale=1.0).encode)
    latents = np.asarray(encode({}, images, RNG))
    energy = np.square(latents).mean((0, 1, 2))
    # Of 0, 1 and 2 changes within a block.
    means, lines, crossings = energy[:3], energy[3:9], energy[9:]
    assert means.min() > 10 * lines.max()
    assert lines.min() > crossings.max()
    # So that nothing is clipped.
    pale = (images // 2 + 64).astype(np.uint8)
    energy = np.square(np.asarray(encode({}, pale, RNG))).mean((0, 1, 2))
    # Dropped coefficients are all that is lost.
    for channels in (3, 4, 9):
        dct = BlockDct(2, channels, scale=1.0)
        there_and_back = jax.jit(lambda images, dct=dct: dct.decode({}, dct.encode({}, images, RNG)))
        decoded = np.asarray(there_and_back(pale), np.float32)
        error = np.square((decoded - pale) / 127.5).mean()
        assert error == pytest.approx(energy[channels:].sum() / 12, rel=0.02)


def test_latents_of_shapes_have_the_scale_of_noise(images):
    dct = codec.create_codec("dct")
    assert dct.shape(64) == (32, 32, 4)
    assert not dct.bounded
    assert 0.5 < np.asarray(jax.jit(dct.encode)({}, images, RNG)).var() < 2.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch": 0}, "codec.patch is 0"),
        ({"channels": 13}, "codec.channels is 13; it must be 1 to 12"),
        ({"patch": 4, "channels": 0}, "1 to 48, three colours of 4 x 4 pixels"),
        ({"scale": 0.0}, "codec.scale is 0.0"),
        ({"chanels": 4}, "did you mean 'channels'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        codec.create_codec("dct", **fields)


def test_images_that_do_not_divide():
    dct = BlockDct(patch=4)
    with pytest.raises(UserError, match=r"images of 30 px do not divide into blocks of codec\.patch=4"):
        dct.shape(30)
    with pytest.raises(UserError, match="images of 6 px"):
        dct.encode({}, np.zeros((1, 8, 6, 3), np.uint8), RNG)

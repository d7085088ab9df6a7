"""Rotary positions in the TPU's kernel, interpreted, against XLA's form of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.nn import rotary
from tests.support.attention_checks import pretend_tpu
from tests.support.uvit_golden import run


@pytest.mark.parametrize(
    "length, heads, size, into",
    [
        pytest.param(20, 4, 64, "float32", marks=pytest.mark.slow),
        (7, 16, 72, "bfloat16"),
        pytest.param(9, 6, 128, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_turns_as_xla_does_forward_and_back(length, heads, size, into, monkeypatch):
    rng = np.random.default_rng(0)
    x, gradient = (rng.normal(size=(2, length, heads, size)).astype("f4") for _ in range(2))
    gradient = gradient.astype(jnp.dtype(into))

    def forward_and_back(x, gradient):
        found, pull = jax.vjp(lambda x: rotary.rotate(x, rotary.rotary_1d(length, size), into), x)
        return found, pull(gradient)[0]

    wanted, wanted_back = run(forward_and_back, x, gradient)
    pretend_tpu(monkeypatch)
    interpreted = functools.partial(rotary._on_one_device, interpret=True)
    monkeypatch.setattr(rotary, "_on_one_device", interpreted)
    found, back = run(lambda *args: forward_and_back(*args), x, gradient)
    assert found.dtype == jnp.dtype(into)
    near = {"float32": 1e-6, "bfloat16": 2**-7}[into]
    found, wanted = (np.asarray(x, "f4") for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=near, atol=near)
    assert back.dtype == x.dtype
    np.testing.assert_allclose(back, wanted_back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape, dtype, able",
    [
        ((1, 256, 16, 128), "bfloat16", True),
        ((1, 1024, 4, 64), "float32", True),
        ((1, 1025, 4, 64), "float32", False),
        ((1, 256, 32, 72), "float32", True),
        # More than a core's memory.
        ((1, 784, 32, 72), "float32", False),
        ((1, 256, 16, 128), "float16", False),
        # Half a tile.
        ((1, 256, 3, 64), "bfloat16", False),
    ],
)
def test_where_the_kernel_can_run(shape, dtype, able, monkeypatch):
    x = jax.ShapeDtypeStruct(shape, dtype)
    # No TPU here.
    assert not rotary._has_kernel(x, jnp.dtype(jnp.bfloat16))
    pretend_tpu(monkeypatch)
    assert rotary._has_kernel(x, jnp.dtype(jnp.bfloat16)) == able
    assert not rotary._has_kernel(x, jnp.dtype(jnp.float16))


def angles(tables):
    """Angles within (-pi, pi] from tables of cosines and sines."""
    return np.arctan2(np.asarray(tables[1], "f8"), np.asarray(tables[0], "f8"))


def same_angles(tables, expected):
    wrapped = np.angle(np.exp(1j * (angles(tables) - expected)))
    np.testing.assert_allclose(wrapped, 0.0, atol=2e-6)


@pytest.mark.parametrize("scaling", rotary.ROW_SCALINGS)
def test_at_the_base_s_grid_every_scaling_is_the_base_bit_for_bit(scaling):
    plain = rotary.rotary_rows(4, 4, 8)
    found = rotary.rotary_rows(4, 4, 8, scaling=scaling, base=4)
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(plain, rotary.rotary_1d(20, 8))
    if scaling != "grid":
        found = rotary.rotary_2d(4, 4, 8, scaling=scaling, base=4)
        np.testing.assert_array_equal(found, rotary.rotary_2d(4, 4, 8))
        # Smaller grids count on, but for where their middle is.
        smaller = rotary.rotary_2d(2, 2, 8, scaling=scaling, base=4)
        same = np.array_equal(smaller, rotary.rotary_2d(2, 2, 8))
        assert same == (scaling != "centred")


def test_scalings_of_a_grid_against_their_formulas():
    rows, columns, base, half = 8, 8, 4, 4
    row, column = np.divmod(np.arange(64), 8)

    def expected(row, column, theta=10_000.0):
        frequencies = theta ** -np.array([0, 2 / half])
        return np.stack([row[:, None] * frequencies, column[:, None] * frequencies], -1).reshape(64, -1)

    def found(scaling):
        return rotary.rotary_2d(rows, columns, 2 * half, scaling=scaling, base=base)

    same_angles(found("linear"), expected(row / 2, column / 2))
    same_angles(found("centred"), expected(row - 2, column - 2))
    # theta' = theta s^(d / (d - 2)): the fastest frequency stays, the slowest is divided by s.
    same_angles(found("ntk"), expected(row, column, 10_000.0 * 2 ** (half / (half - 2))))
    slow = rotary._frequencies(half)[-1], rotary._frequencies(half, 10_000.0 * 2 ** (half / (half - 2)))[-1]
    np.testing.assert_allclose(slow[0] / slow[1], 2.0)


@pytest.mark.parametrize("scaling", rotary.ROW_SCALINGS)
def test_further_images_in_a_sequence_stand_where_the_next_one_would(scaling):
    """Two rows of three tokens and an end-of-line token; images of shift 0, 1 and 2 without these come first."""
    options = {"scaling": scaling, "base": 2}
    found = angles(rotary.rotary_rows(2, 3, 2, shifts=(0, 1, 2), **options))[:, 0]
    image = angles(rotary.rotary_rows(2, 3, 2, **options))[:, 0]
    assert len(found) == 3 * 6 + 8
    np.testing.assert_array_equal(found[18:], image)
    shown = np.delete(image, [3, 7])
    # One row of eight is where the next image would begin; the fastest frequency is 1.
    ratio = {"linear": 8 / 6, "grid": np.sqrt(6) / 2}.get(scaling, 1.0)
    span = 2 / ratio * (3 / ratio + 1) if scaling == "grid" else 8 / ratio
    for shift in range(3):
        part = found[6 * shift : 6 * shift + 6]
        wrapped = np.angle(np.exp(1j * (part - shown - shift * span)))
        np.testing.assert_allclose(wrapped, 0.0, atol=2e-6)


@pytest.mark.parametrize("scaling", ["none", "linear", "centred"])
def test_further_grids_stand_beside_a_scaled_one(scaling):
    found = rotary.rotary_2d(4, 4, 4, shifts=(1, 0), scaling=scaling, base=2)
    plain = rotary.rotary_2d(4, 4, 4, scaling=scaling, base=2)
    np.testing.assert_array_equal(np.asarray(found)[:, 16:], np.asarray(plain))
    beside = angles(found)[:16] - angles(plain)
    wide = 2.0 if scaling == "linear" else 4.0
    # Rows as they are, columns one grid further.
    np.testing.assert_allclose(np.angle(np.exp(1j * (beside - np.array([0.0, wide])))), 0.0, atol=2e-6)


def test_scalings_of_rows_in_one_sequence():
    place = np.arange(8 * 9)
    frequencies = 10_000.0 ** -np.array([0, 2 / 4])
    ratio = 72 / 20

    def found(scaling):
        return rotary.rotary_rows(8, 8, 4, scaling=scaling, base=4)

    same_angles(found("linear"), np.outer(place / ratio, frequencies))
    same_angles(found("centred"), np.outer(place - 26.0, frequencies))
    same_angles(found("ntk"), np.outer(place, (10_000.0 * ratio ** (4 / 2)) ** -np.array([0, 2 / 4])))
    row, column = np.divmod(place, 9)
    same_angles(found("grid"), np.outer(row / 2 * 5 + column / 2, frequencies))
    # With two features there is the fastest frequency alone.
    assert np.isfinite(rotary.rotary_rows(8, 8, 2, scaling="ntk", base=4)).all()

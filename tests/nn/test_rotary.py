"""Rotary positions in the TPU's kernel, interpreted, against XLA's form of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.nn import rotary
from tests.support.attention_checks import pretend_tpu


@pytest.mark.parametrize(
    "length, heads, size, into", [(20, 4, 64, "float32"), (7, 16, 72, "bfloat16"), (9, 6, 128, "bfloat16")]
)
def test_the_kernel_turns_as_xla_does_forward_and_back(length, heads, size, into, monkeypatch):
    x, gradient = (jax.random.normal(jax.random.key(i), (2, length, heads, size)) for i in (0, 1))
    tables = rotary.rotary_1d(length, size)
    wanted, pull = jax.vjp(lambda x: rotary.rotate(x, tables, into), x)
    pretend_tpu(monkeypatch)
    interpreted = functools.partial(rotary._on_one_device, interpret=True)
    monkeypatch.setattr(rotary, "_on_one_device", interpreted)
    found, kernel_pull = jax.vjp(lambda x: rotary.rotate(x, tables, into), x)
    assert found.dtype == jnp.dtype(into)
    near = {"float32": 1e-6, "bfloat16": 2**-7}[into]
    np.testing.assert_allclose(found.astype("f4"), wanted.astype("f4"), rtol=near, atol=near)
    (back,), (wanted_back,) = kernel_pull(gradient.astype(into)), pull(gradient.astype(into))
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

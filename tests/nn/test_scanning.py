"""The scan over layers computes what `jax.lax.scan` does, gradients included, and keeps no parameter twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.nn import per_device, scanning

LAYERS, WIDTH = 3, 8


def layer(params, x, own, shared):
    scale, mask = shared
    h = jnp.where(mask, jnp.tanh(x @ params["w"] + own) * scale, 0)
    return x + h @ params["w"], h.sum(axis=-1)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype("f4")

    params, x, own = {"w": normal(LAYERS, WIDTH, WIDTH)}, normal(4, WIDTH), normal(LAYERS, WIDTH)
    return params, x, own, (normal(WIDTH), np.arange(WIDTH) % 3 > 0)


def loss(run, params, x, own, scale, mask):
    x, outs = run(params, x, own, (scale, mask))
    return (x**2).sum() + (outs * jnp.cos(outs)).sum()


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    "wrap",
    # Eagerly each operation is a program of its own.
    [pytest.param(jax.jit, id="jitted"), pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow)],
)
def test_outputs_and_all_gradients_are_those_of_lax_scan(inputs, last_first, wrap):
    params, x, own, (scale, mask) = inputs

    def plain(params, x, own, shared):
        turned = own[::-1] if last_first else own
        return jax.lax.scan(lambda x, one: layer(one[0], x, one[1], shared), x, (params, turned))

    def ours(params, x, own, shared):
        return scanning.scan_layers(layer, last_first, params, x, own, shared)

    for left, right in zip(jax.jit(plain)(*inputs), jax.jit(ours)(*inputs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(lambda *a: loss(plain, *a, mask), (0, 1, 2, 3)))(
        params, x, own, scale
    )
    found, grads = wrap(jax.value_and_grad(lambda *a: loss(ours, *a, mask), (0, 1, 2, 3)))(
        params, x, own, scale
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, wanted_grads)


def test_what_lies_last_first_is_not_turned_round(inputs):
    params, x, own, (scale, mask) = inputs

    def total(own):
        return loss(lambda *a: scanning.scan_layers(layer, True, *a), params, x, own, scale, mask)

    assert " rev[" not in str(jax.make_jaxpr(jax.grad(total))(own))
    assert " rev[" in str(jax.make_jaxpr(jax.grad(lambda own: total(own[::-1])))(own))


def test_parameters_are_read_again_and_not_kept(inputs):
    params, x, own, (scale, mask) = inputs
    _, (_, kept, *_) = scanning._forward(layer, False, params, x, own, (scale, mask))
    assert kept and (LAYERS, WIDTH, WIDTH) not in [array.shape for array in kept]


def test_on_tpus_stacks_start_as_they_lie_in_memory(inputs, monkeypatch):
    params, x, own, (scale, mask) = inputs

    def program():
        step = jax.jit(lambda *a: scanning._forward(layer, False, *a, (scale, mask))[0])
        return str(step.trace(params, x, own).jaxpr)

    assert " empty[" not in program() and "layout_constraint[" not in program()
    monkeypatch.setattr(per_device, "target", lambda: per_device.Target("tpu", "TPU v5"))
    assert " empty[" in program() and "layout_constraint[" in program()

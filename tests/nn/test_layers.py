"""The shared pieces of backbones against closed forms and torch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.ad_checkpoint import checkpoint_name

from scaling_dit.errors import UserError
from scaling_dit.nn import layers
from scaling_dit.nn.attention import SelfAttention
from scaling_dit.trees import unbox
from tests.support.uvit_golden import FAST_KEY, fill, run


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("f4")


def made(module, *args):
    """Random parameters of a module's shapes, of numpy: no `init` is compiled for them."""
    return fill(unbox(jax.eval_shape(module.init, FAST_KEY, *args)))["params"]


@pytest.mark.parametrize("dim", [2, 7, 64])
def test_timestep_embedding_is_cos_then_sin(dim):
    t = np.array([0.0, 1.0, 0.5, 999.25])
    half = dim // 2
    angles = t[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
    wanted = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, dim % 2))], axis=1)
    embed = jax.jit(layers.timestep_embedding, static_argnums=1)
    found = embed(t.astype("f4"), dim)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    # Integers too.
    whole = np.array([3, 0, 1, 2])
    np.testing.assert_array_equal(embed(whole, dim), embed(whole.astype("f4"), dim))


def test_sincos_2d():
    table = layers.sincos_2d(3, 5, 16)
    assert table.shape == (15, 16)
    assert table.dtype == np.float32
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    row, column = 2, 4
    wanted = [f(c * frequencies) for c in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[row * 5 + column], np.concatenate(wanted), atol=1e-6)
    assert np.abs(table).max() == 1.0
    assert len(np.unique(table, axis=0)) == 15
    with pytest.raises(UserError, match="multiple of 4"):
        layers.sincos_2d(2, 2, 6)


@pytest.mark.parametrize("height, width, patch", [(4, 6, 2), (8, 4, 4), (3, 3, 1)])
def test_patchify(height, width, patch):
    x = normal(2, height, width, 3)
    tokens = layers.patchify(x, patch)
    corners = [(i, j) for i in range(0, height, patch) for j in range(0, width, patch)]
    wanted = [x[:, i : i + patch, j : j + patch].reshape(2, -1) for i, j in corners]
    np.testing.assert_array_equal(tokens, np.stack(wanted, axis=1))
    np.testing.assert_array_equal(layers.unpatchify(tokens, patch, height, width), x)


def test_dense_splits_features_and_names_its_axes():
    x = normal(2, 5, 6)
    module = layers.Dense((3, 4), ("embed", None, "heads"))
    variables = run(module.init, FAST_KEY, x)
    assert variables["params"]["kernel"].names == ("embed", None, "heads")
    assert variables["params"]["bias"].names == (None, None)
    kernel = np.asarray(unbox(variables)["params"]["kernel"])
    found = run(module.apply, variables, x)
    np.testing.assert_allclose(found, np.einsum("btd,dkh->btkh", x, kernel), atol=1e-6)
    plain = layers.Dense(4, (None, None), use_bias=False)
    assert "bias" not in jax.eval_shape(plain.init, FAST_KEY, x)["params"]


def test_dense_dtypes():
    x = normal(2, 6)
    module = layers.Dense(4, (None, None), dtype="bfloat16", param_dtype="float32")
    variables = jax.eval_shape(module.init, FAST_KEY, x)
    assert jax.eval_shape(module.apply, variables, x).dtype == jnp.bfloat16
    assert unbox(variables)["params"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    "activation, wanted",
    [
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("silu", torch.nn.functional.silu),
    ],
)
def test_mlp(activation, wanted):
    x = normal(2, 5, 6) * 3
    module = layers.Mlp(8, activation=activation)
    # Large enough for the bends of the activations.
    params = jax.tree.map(lambda value: 10 * value, made(module, x))
    hidden = wanted(torch.tensor(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])).numpy()
    found = run(module.apply, {"params": params}, x)
    expected = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [layers.Mlp, lambda _, **inits: SelfAttention(2, **inits)])
def test_the_last_map_of_a_branch_may_start_otherwise(module):
    x = normal(2, 5, 6)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    silent, loud = module(8, kernel_init=ones, out_init=zeros), module(8, kernel_init=ones)
    assert not np.any(np.asarray(run(silent.init_with_output, FAST_KEY, x)[0]))
    assert np.any(np.asarray(run(loud.init_with_output, FAST_KEY, x)[0]))


def test_layer_norm_is_float32_and_exact_far_from_zero():
    x = np.float32(1000.0) + normal(4, 64)
    module = layers.layer_norm("norm", epsilon=1e-6)
    wanted = torch.nn.functional.layer_norm(torch.tensor(x).double(), (64,), eps=1e-6).numpy()
    np.testing.assert_allclose(run(module.init_with_output, FAST_KEY, x)[0], wanted, atol=1e-3)
    half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    out, variables = jax.eval_shape(module.init_with_output, FAST_KEY, half)
    assert out.dtype == jnp.float32
    assert variables["params"]["scale"].names == ("norm",)


def test_conv3x3_equals_torch():
    x = normal(2, 5, 6, 3)
    module = layers.conv3x3("conv", 3, 4)
    params = made(module, x)
    weight = torch.tensor(params["kernel"].transpose(3, 2, 0, 1))
    image = torch.tensor(x.transpose(0, 3, 1, 2))
    wanted = torch.nn.functional.conv2d(image, weight, torch.tensor(params["bias"]), padding=1)
    found = run(module.apply, {"params": params}, x)
    np.testing.assert_allclose(found, wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_remat_names():
    assert [layers.check_remat(value) for value in (False, True, "dots")] == ["none", "full", "dots"]
    with pytest.raises(UserError, match="unknown remat policy 'ful'; did you mean 'full'"):
        layers.check_remat("ful")


class Step(nn.Module):
    """x -> x w + given + shared; hands out x."""

    @nn.compact
    def __call__(self, x, given, shared):
        out = layers.Dense(x.shape[-1], (None, None), use_bias=False, name="w")(jnp.tanh(x)) + shared
        out = checkpoint_name(out, layers.ATTENTION)
        return (out if given is None else out + given), x


class Stack(nn.Module):
    remat: str
    scan: bool

    @nn.compact
    def __call__(self, x, given, shared):
        return layers.stack(Step, 3, "steps", x, given, shared, remat=self.remat, scan=self.scan)


@functools.cache
def unrolled_stack(has_input):
    """Parameters, and what they give where nothing is rematerialised: read only."""
    args = normal(2, 4), normal(3, 2, 4) if has_input else None, 1.5
    plain = Stack("none", False)
    params = made(plain, *args)
    return params, *run(plain.apply, {"params": params}, *args)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "products", "attention", "offload"])
@pytest.mark.parametrize("has_input", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stack_scanned_equals_unrolled(remat, has_input):
    args = normal(2, 4), normal(3, 2, 4) if has_input else None, 1.5
    params, x1, outs1 = unrolled_stack(has_input)
    stacked = {
        "steps": jax.tree.map(lambda *leaves: np.stack(leaves), *(params[f"steps_{i}"] for i in range(3)))
    }

    def grads(stack, params):
        def loss(params):
            x, outs = stack.apply({"params": params}, *args)
            return x.sum(), (x, outs)

        return run(jax.grad(loss, has_aux=True), params)

    unrolled, _ = grads(Stack(remat, False), params)
    scanned, (x2, outs2) = grads(Stack(remat, True), stacked)
    np.testing.assert_allclose(x1, x2, atol=1e-6)
    np.testing.assert_allclose(np.stack(outs1), outs2, atol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(
            unrolled[f"steps_{i}"]["w"]["kernel"], scanned["steps"]["w"]["kernel"][i], atol=1e-5
        )


def test_remat_saves_less():
    """A rematerialised stack keeps fewer values for the backward pass."""
    x = normal(2, 4)
    params = unbox(jax.eval_shape(Stack("none", False).init, FAST_KEY, x, None, 0.0))

    def recomputed(remat):
        grad = jax.grad(lambda p: Stack(remat, False).apply(p, x, None, 0.0)[0].sum())
        return str(jax.make_jaxpr(grad)(params)).count(" tanh ")

    assert recomputed("none") == 3
    assert recomputed("full") > 3


class TwoProducts(nn.Module):
    """x + tanh(n) w2 with n = tanh(x) w1, to which the name of what attention gives is put."""

    @nn.compact
    def __call__(self, x, _):
        dense = functools.partial(layers.Dense, x.shape[-1], (None, None), use_bias=False)
        named = checkpoint_name(dense(name="w1")(jnp.tanh(x)), layers.ATTENTION)
        return x + dense(name="w2")(jnp.tanh(named)), None


@pytest.mark.parametrize("remat", ["none", "dots", "products", "attention", "offload", "full"])
def test_what_a_policy_makes_again(remat):
    """Of two products a layer the first is needed again: `full` makes it so, all others keep it. All redo tanh."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.stack(TwoProducts, 3, "steps", x, None, remat=remat, scan=False)[0]

    x = normal(2, 4)
    params = unbox(jax.eval_shape(Model().init, FAST_KEY, x))
    program = str(jax.make_jaxpr(jax.grad(lambda p: (Model().apply(p, x) ** 2).sum()))(params))
    # Forward 6, for weights 6, for inputs all but that of the first layer's first.
    assert program.count(" dot_general[") == 6 + 6 + 5 + (3 if remat == "full" else 0)
    assert program.count(" tanh ") == (6 if remat == "none" else 12)
    assert ("<host>" in program) == (remat == "offload")


def test_products_apart_are_the_parts_of_one_product():
    x = normal(2, 5, 6)
    one = layers.Dense((3, 8), ("embed", None, "mlp"))
    apart = layers.Dense((3, 8), (None, "embed", "mlp"), apart=True)
    fused, parted = (made(module, x) for module in (one, apart))
    assert parted["kernel"].shape == (3, 6, 8) and parted["bias"].shape == fused["bias"].shape == (3, 8)
    parted = {"kernel": np.moveaxis(fused["kernel"], 1, 0), "bias": fused["bias"]}
    whole, parts = (run(m.apply, {"params": p}, x) for m, p in ((one, fused), (apart, parted)))
    assert isinstance(parts, list)
    np.testing.assert_allclose(np.stack(parts, axis=2), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", [layers.NORMAL_002, nn.initializers.xavier_uniform()])
def test_a_kernel_apart_starts_with_the_spread_of_the_fused_one(init):
    """An initializer that depends on the shape sees the parts where the fused kernel has them."""
    x = np.ones((1, 6), "f4")
    one = layers.Dense((3, 8), ("embed", None, "mlp"), kernel_init=init)
    apart = layers.Dense((3, 8), (None, "embed", "mlp"), apart=True, kernel_init=init)
    fused, parted = (unbox(run(module.init, FAST_KEY, x))["params"]["kernel"] for module in (one, apart))
    np.testing.assert_array_equal(parted, np.moveaxis(fused, 1, 0))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_and_their_gradients_are_jax_own(name):
    own = {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "silu": jax.nn.silu,
    }[name]
    x = np.linspace(-8, 8, 401, dtype="f4")

    def value_and_slope(function):
        return run(lambda x: (function(x), jax.vmap(jax.grad(function))(x)), x)

    for found, wanted in zip(*map(value_and_slope, (layers.ACTIVATIONS[name], own)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)
    half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    kept = jax.eval_shape(lambda x: jax.vjp(layers.ACTIVATIONS[name], x)[1], half)
    # Its input and nothing else.
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [jnp.bfloat16]

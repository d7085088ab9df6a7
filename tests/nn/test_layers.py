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


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dim", [2, 7, 64])
def test_timestep_embedding_is_cos_then_sin(dim):
    t = np.array([0.0, 1.0, 0.5, 999.25])
    half = dim // 2
    angles = t[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
    wanted = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, dim % 2))], axis=1)
    found = layers.timestep_embedding(jnp.asarray(t), dim)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    # Integers too.
    whole = layers.timestep_embedding(jnp.asarray([3]), dim)
    np.testing.assert_array_equal(whole, layers.timestep_embedding(jnp.asarray([3.0]), dim))


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
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].names == ("embed", None, "heads")
    assert variables["params"]["bias"].names == (None, None)
    kernel = unbox(variables)["params"]["kernel"]
    np.testing.assert_allclose(module.apply(variables, x), np.einsum("btd,dkh->btkh", x, kernel), atol=1e-6)
    assert "bias" not in layers.Dense(4, (None, None), use_bias=False).init(jax.random.key(0), x)["params"]


def test_dense_dtypes():
    x = normal(2, 6)
    module = layers.Dense(4, (None, None), dtype="bfloat16", param_dtype="float32")
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x).dtype == jnp.bfloat16
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
    module = layers.Mlp(8, activation=activation, kernel_init=nn.initializers.normal(1.0))
    params = unbox(module.init(jax.random.key(0), x))["params"]
    hidden = wanted(torch.tensor(np.asarray(x @ params["fc1"]["kernel"]))).numpy()
    np.testing.assert_allclose(
        module.apply({"params": params}, x), hidden @ params["fc2"]["kernel"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("module", [layers.Mlp, lambda _, **inits: SelfAttention(2, **inits)])
def test_the_last_map_of_a_branch_may_start_otherwise(module):
    x = normal(2, 5, 6)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    assert not module(8, kernel_init=ones, out_init=zeros).init_with_output(jax.random.key(0), x)[0].any()
    assert module(8, kernel_init=ones).init_with_output(jax.random.key(0), x)[0].any()


def test_layer_norm_is_float32_and_exact_far_from_zero():
    x = (1000.0 + normal(4, 64)).astype(jnp.float32)
    module = layers.layer_norm("norm", epsilon=1e-6)
    wanted = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x)).double(), (64,), eps=1e-6).numpy()
    np.testing.assert_allclose(module.init_with_output(jax.random.key(0), x)[0], wanted, atol=1e-3)
    out, variables = module.init_with_output(jax.random.key(0), x.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    assert variables["params"]["scale"].names == ("norm",)


def test_conv3x3_equals_torch():
    x = normal(2, 5, 6, 3)
    module = layers.conv3x3("conv", 3, 4)
    params = unbox(module.init(jax.random.key(0), x))["params"]
    weight = torch.tensor(np.asarray(params["kernel"]).transpose(3, 2, 0, 1))
    image = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    wanted = torch.nn.functional.conv2d(image, weight, torch.tensor(np.asarray(params["bias"])), padding=1)
    np.testing.assert_allclose(
        module.apply({"params": params}, x), wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5
    )


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


@pytest.mark.parametrize("remat", ["none", "full", "dots", "products", "attention", "offload"])
@pytest.mark.parametrize("has_input", [True, False])
def test_stack_scanned_equals_unrolled(remat, has_input):
    x, given = normal(2, 4), normal(3, 2, 4) if has_input else None
    plain, other = Stack("none", False), Stack(remat, True)
    params = unbox(plain.init(jax.random.key(0), x, given, 1.5))["params"]
    stacked = {
        "steps": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"steps_{i}"] for i in range(3)))
    }
    (x1, outs1), (x2, outs2) = (
        m.apply({"params": p}, x, given, 1.5) for m, p in ((plain, params), (other, stacked))
    )
    np.testing.assert_allclose(x1, x2, atol=1e-6)
    np.testing.assert_allclose(np.stack(outs1), outs2, atol=1e-6)
    unrolled = jax.grad(lambda p: Stack(remat, False).apply({"params": p}, x, given, 1.5)[0].sum())(params)
    scanned = jax.grad(lambda p: other.apply({"params": p}, x, given, 1.5)[0].sum())(stacked)
    for i in range(3):
        np.testing.assert_allclose(
            unrolled[f"steps_{i}"]["w"]["kernel"], scanned["steps"]["w"]["kernel"][i], atol=1e-5
        )


def test_remat_saves_less():
    """A rematerialised stack keeps fewer values for the backward pass."""
    x = normal(2, 4)
    params = unbox(Stack("none", False).init(jax.random.key(0), x, None, 0.0))

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
    params = unbox(Model().init(jax.random.key(0), x))
    program = str(jax.make_jaxpr(jax.grad(lambda p: (Model().apply(p, x) ** 2).sum()))(params))
    # Forward 6, for weights 6, for inputs all but that of the first layer's first.
    assert program.count(" dot_general[") == 6 + 6 + 5 + (3 if remat == "full" else 0)
    assert program.count(" tanh ") == (6 if remat == "none" else 12)
    assert ("<host>" in program) == (remat == "offload")


def test_products_apart_are_the_parts_of_one_product():
    x = normal(2, 5, 6)
    one = layers.Dense((3, 8), ("embed", None, "mlp"))
    apart = layers.Dense((3, 8), (None, "embed", "mlp"), apart=True)
    fused, parted = (unbox(module.init(jax.random.key(0), x))["params"] for module in (one, apart))
    assert parted["kernel"].shape == (3, 6, 8) and parted["bias"].shape == fused["bias"].shape == (3, 8)
    fused["bias"] = parted["bias"] = normal(3, 8)
    whole, parts = one.apply({"params": fused}, x), apart.apply({"params": parted}, x)
    assert isinstance(parts, list)
    np.testing.assert_allclose(jnp.stack(parts, axis=2), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", [layers.NORMAL_002, nn.initializers.xavier_uniform()])
def test_a_kernel_apart_starts_with_the_spread_of_the_fused_one(init):
    """An initializer that depends on the shape sees the parts where the fused kernel has them."""
    x = jnp.ones((1, 6))
    one = layers.Dense((3, 8), ("embed", None, "mlp"), kernel_init=init)
    apart = layers.Dense((3, 8), (None, "embed", "mlp"), apart=True, kernel_init=init)
    fused, parted = (unbox(m.init(jax.random.key(1), x))["params"]["kernel"] for m in (one, apart))
    np.testing.assert_array_equal(parted, np.moveaxis(fused, 1, 0))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_and_their_gradients_are_jax_own(name):
    own = {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "silu": jax.nn.silu,
    }[name]
    x = jnp.linspace(-8, 8, 401)
    for of in (lambda f: f, lambda f: jax.vmap(jax.grad(f))):
        np.testing.assert_allclose(of(layers.ACTIVATIONS[name])(x), of(own)(x), rtol=1e-5, atol=2e-6)
    kept = jax.eval_shape(lambda x: jax.vjp(layers.ACTIVATIONS[name], x)[1], x.astype(jnp.bfloat16))
    # Its input and nothing else.
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [jnp.bfloat16]

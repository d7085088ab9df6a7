"""Counts against closed forms and XLA's own analysis; test_paper_tables.py has the published tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from scaling_dit import backbones
from scaling_dit.backbones import contract
from scaling_dit.costs import count as count_lib
from scaling_dit.costs.count import Cost, count
from scaling_dit.errors import UserError


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
        {"scan_layers": True, "remat": "dots"},
    ],
)
def test_modes_cost_the_same(fields, monkeypatch):
    plain = backbones.create("uvit", size="h64-d5-n2", text_dim=16)
    shapes = {"latents": (8, 12, 4), "text": (7, 16)}
    counted = count(plain, **shapes)
    # Each as it is: a count scans layers that are not.
    monkeypatch.setattr(count_lib, "_scanned", lambda backbone: backbone)
    found, expected = count(plain.clone(**fields), **shapes), count(plain, **shapes)
    assert counted == expected
    assert found.tree == expected.tree
    assert (found.params, found.macs_total) == (expected.params, expected.macs_total)


def test_closed_form():
    """Every product of a U-ViT written out."""
    h, d, length, tokens, text_dim = 48, 2, 9, 24, 20
    found = count(
        backbones.create("uvit", size=f"h{h}-d{d}-n3", text_dim=text_dim),
        latents=(8, 12, 4),
        text=(length, text_dim),
    )
    n = 1 + length + tokens
    blocks = n * ((d + 1) * 12 * h * h + (d // 2) * 2 * h * h)
    ends = tokens * 16 * h * 2 + length * text_dim * h + 8 * 12 * 9 * 4 * 4
    assert found.macs_paper == blocks + ends
    assert found.macs_total == blocks + ends + (d + 1) * 2 * n * n * h
    block_params = 12 * h * h + 10 * h
    params = (d + 1) * block_params + (d // 2) * (2 * h * h + h) + (text_dim + 1) * h + 17 * h + n * h + 2 * h
    assert found.params == params + 16 * h + 16 + 148


def test_modules_add_up_and_name_the_parts():
    found = count(backbones.create("uvit", size="h32-d4-n2", text_dim=8), latents=(8, 8, 4), text=(5, 8))
    assert sum(found.modules.values(), Cost()) == Cost(
        found.params, found.macs_paper, found.macs_attention, found.macs_total
    )
    assert "other" not in found.modules
    mid, ins = found.modules["mid_block"], found.modules["in_blocks"]
    assert (ins.params, ins.macs_total) == (2 * mid.params, 2 * mid.macs_total)
    assert found.modules["final_layer"] == Cost(148, 64 * 36 * 4, 0, 64 * 36 * 4)


class Nested(nn.Module):
    """Blocks of two kinds and a stack of equal ones, named as in UNets."""

    @nn.compact
    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        x = latents
        for i, width in enumerate((8, 16)):
            x = nn.Dense(width, use_bias=False, name=f"down_{i}")(x)
        for i in range(3):
            x = Layer(name=f"up_{i}")(x)
        return nn.Dense(4, name="out_1")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="transformer_0")(x) + nn.Dense(16, use_bias=False, name="res")(x)


def test_equal_layers_are_one_stack_and_others_keep_their_numbers():
    found = count(Nested(), latents=(2, 2, 4), text=(5, 8))
    # 3 layers, 4 pixels.
    layer = 3 * 4 * 256
    assert found.modules == {
        "down_0": Cost(32, 4 * 32, 0, 4 * 32),
        "down_1": Cost(128, 4 * 128, 0, 4 * 128),
        "up": Cost(3 * (272 + 256), 2 * layer, layer, 2 * layer),
        "out": Cost(68, 4 * 64, 0, 4 * 64),
    }
    assert found.by_module(2)["up/transformer"] == Cost(3 * 272, layer, layer, layer)
    assert found.by_module(2)["down_1"] == found.modules["down_1"]
    assert found.macs_attention == layer


class Squares(nn.Module):
    """Two products with a square in between."""

    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        x = nn.Dense(32, dtype=self.dtype, name="one")(latents)
        x = nn.Dense(4, dtype=self.dtype, name="two")(nn.Dropout(0.5, deterministic=not train)(x) ** 2)
        return x


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_activations_of_a_chain(dtype, size):
    """What is multiplied by a weight and what is squared, in its dtype; weights are not in it."""
    found = count(Squares(dtype), latents=(8, 8, 4), text=(5, 8))
    assert found.activation_bytes == 64 * size * (4 + 32 + 32)


def test_activations_of_rematerialised_blocks():
    """Of a whole block only the inputs are kept: x, and for out-blocks the skip, which are the same few arrays."""
    # One block, for tracing takes the time; out-blocks are among those of `deeper`.
    h, d, shapes = 64, 1, {"latents": (8, 8, 4), "text": (15, 16)}
    tokens = 1 + 15 + 16
    plain = backbones.create("uvit", size=f"h{h}-d{d}-n2", text_dim=16, dtype="bfloat16", final_conv=False)
    found = {
        policy: count(plain.clone(remat=policy), **shapes).activation_bytes
        for policy in ("full", "dots", "none")
    }
    blocks = d * tokens * h * 2
    ends = found["full"] - blocks
    # The last norm, in float32: its input, its output and two numbers a token.
    heads = 16 * 4 * (h * 2 + 2)
    inputs = 2 * (16 * 16 + 15 * 16)
    assert 0 < ends < 1.5 * (heads + inputs) + tokens * h * 2
    deeper = count(plain.clone(remat="full", size=f"h{h}-d{d + 2}-n2"), **shapes).activation_bytes
    assert deeper - found["full"] == 2 * tokens * h * 2
    assert found["full"] < found["dots"] < found["none"]


@pytest.mark.slow
def test_activations_grow_as_xla_says():
    """The memory that XLA takes for four more layers of one more example: what is kept, and some that is passing."""
    shapes = {"latents": (16, 16, 4), "text": (15, 32)}

    def measured(depth):
        backbone = backbones.create("uvit", size=f"h64-d{depth}-n2", text_dim=32, attention="xla")

        def temporary(batch):
            inputs = contract.example_inputs(backbone, **shapes, batch=batch)
            variables = contract.abstract_variables(backbone, inputs)
            grad = jax.grad(lambda variables, *inputs: (backbone.apply(variables, *inputs) ** 2).mean())
            return jax.jit(grad).lower(variables, *inputs).compile().memory_analysis().temp_size_in_bytes

        return (temporary(24) - temporary(8)) / 16, count(backbone, **shapes).activation_bytes

    (few, few_kept), (many, many_kept) = measured(2), measured(6)
    assert many - few == pytest.approx(many_kept - few_kept, rel=0.2)


def test_train_flops():
    found = count(backbones.create("uvit", size="h32-d2-n2", text_dim=8), latents=(8, 8, 4), text=(5, 8))
    assert found.train_flops(16, 100) == 6 * found.macs_total * 1600
    assert found.train_flops(16, 100, convention="paper") == 6 * found.macs_paper * 1600
    with pytest.raises(UserError, match="convention 'papr'; did you mean 'paper'"):
        found.train_flops(1, 1, convention="papr")


class Convolutions(nn.Module):
    """Grouped, strided, dilated and transposed convolutions, returning the input's shape."""

    @nn.compact
    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="strided")(latents)
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="grouped")(x)
        x = nn.Conv(8, (3, 3), kernel_dilation=2, use_bias=False, name="dilated")(x)
        return nn.ConvTranspose(4, (4, 4), strides=(2, 2), use_bias=False, name="transposed")(x)


def test_convolutions():
    found = count(Convolutions(), latents=(8, 8, 4), text=(5, 8))
    assert {name: part.macs_total for name, part in found.modules.items()} == {
        "strided": 16 * 8 * 9 * 4,
        "grouped": 16 * 8 * 9 * 2,
        "dilated": 16 * 8 * 9 * 8,
        # Each input reaches 16 outputs.
        "transposed": 16 * 16 * 8 * 4,
    }
    assert found.macs_paper == found.macs_total


class ControlFlow(nn.Module):
    """Products in jit, cond, scan and custom derivatives; `kind` picks one."""

    kind: str

    @nn.compact
    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        x = latents.reshape(-1, 4)
        w = self.param("w", nn.initializers.ones, (4, 4))
        return getattr(self, self.kind)(x, w, timesteps).reshape(latents.shape)

    def jit(self, x, w, t):
        return jax.jit(lambda a: a @ w)(x)

    def cond(self, x, w, t):
        return jax.lax.cond(t[0] > 1, lambda a: a @ w @ w, lambda a: a @ w, x)

    # The choice depends on an input, so the product is not one with a weight.
    def chosen_weight(self, x, w, t):
        return x @ jax.lax.cond(t[0] > 1, lambda: w, lambda: -w)

    def chain(self, x, w, t):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    def weights_only(self, x, w, t):
        return x @ (w @ w)

    def custom(self, x, w, t):
        f = jax.custom_vjp(lambda a: a @ w)
        f.defvjp(lambda a: (a @ w, None), lambda _, g: (g @ w.T,))
        return f(x)

    def bounded(self, x, w, t):
        return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c + 1, x)

    def loop(self, x, w, t):
        return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c @ w, x)


# Multiply-accumulates of one product [64, 4] x [4, 4].
N = 8 * 8 * 16


@pytest.mark.parametrize(
    "kind, paper, total",
    [
        ("jit", N, N),
        ("cond", 2 * N, 2 * N),
        ("chosen_weight", 0, N),
        ("chain", 7 * N, 7 * N),
        ("weights_only", N + 64, N + 64),
        ("custom", N, N),
        ("bounded", 0, 0),
    ],
)
def test_control_flow(kind, paper, total):
    found = count(ControlFlow(kind), latents=(8, 8, 4), text=(5, 8))
    assert (found.macs_paper, found.macs_total) == (paper, total)


def test_a_carry_is_followed_through_a_scan():
    class Carried(ControlFlow):
        kind: str = "carried"

        # The first carry is a weight until the third iteration.
        def carried(self, x, w, t):
            shift = lambda c, _: ((c[1], c[2], x.T @ x), None)  # noqa: E731
            return x @ jax.lax.scan(shift, (w, w, w), None, length=3)[0][0]

    found = count(Carried(), latents=(8, 8, 4), text=(5, 8))
    assert (found.macs_paper, found.macs_total) == (0, 4 * N)


class Broken(nn.Module):
    returns: str = "shape"

    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        if self.returns == "error":
            raise ValueError("first line\nsecond line")
        return {"shape": latents[:, :4], "tuple": (latents, None)}[self.returns]


@pytest.mark.parametrize(
    "backbone, shapes, message",
    [
        (Broken(), {}, r"Broken returns \(1, 4, 32, 4\); it must return one array \(1, 32, 32, 4\)"),
        (Broken("tuple"), {}, "Broken returns a tuple"),
        (Broken("error"), {}, "cannot be traced on latents .*: ValueError: first line$"),
        (nn.Dense(3), {}, "backbone Dense has the call"),
        (object(), {}, "must be a flax.linen.Module instance, this is a object"),
        (backbones.backbone_class("uvit")(in_channels=3), {}, "in_channels=3"),
        (backbones.backbone_class("uvit")(), {"text": (77, 768)}, "text_dim=1024"),
        (backbones.backbone_class("uvit")(), {"latents": (32, 32)}, r"latents=\(H, W, C\)"),
        (ControlFlow("loop"), {"latents": (8, 8, 4)}, "products inside 'while'"),
    ],
)
def test_mistakes_are_told_in_one_line(backbone, shapes, message):
    with pytest.raises(UserError, match=message) as error:
        count(backbone, **shapes)
    assert "\n" not in str(error.value)


def test_a_learned_variance_is_in_contract():
    class Doubled(Broken):
        def __call__(
            self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
        ):
            return jnp.concatenate([latents, latents], axis=-1)

    assert count(Doubled()) == count(Doubled(), text=(3, 5))
    assert count(Doubled()).params == 0

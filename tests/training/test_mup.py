"""Under muP activations keep their size as the width grows, and without it they do not: the coordinate check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_dit import backbones, trees
from scaling_dit.errors import UserError
from scaling_dit.training import mup
from tests.support.uvit_golden import FAST_KEY

LATENTS, TEXT = (8, 8, 4), (6, 16)
FAMILIES = {
    "uvit": {"depth": 2, "patch": 2},
    "pixart": {"depth": 2, "patch": 2},
    "large_dit": {"depth": 2, "patch": 2},
}
HEAD, STEPS = 16, 10
BASE = 32
# Far above what a run would take, and below where training becomes unstable: beyond that, widths differ in when and how
# far they overshoot, which says nothing of how their activations scale. Large-DiT is there at 1e-2: its gates,
# modulations and time embedding all grow from about nothing and multiply each other, its blocks' activations double
# within two steps, and at the width 64 the loss then rises from 0.68 to 0.76.
RATES = {"uvit": 1e-2, "pixart": 1e-2, "large_dit": 3e-3}


def create(name, width):
    return backbones.create_for(
        name, in_channels=4, text_dim=TEXT[1], hidden=width, heads=width // HEAD, **FAMILIES[name]
    )


@pytest.mark.parametrize(
    "shape, base, far, expected",
    [
        ((64, 3, 64), (32, 3, 32), (512, 3, 512), ("hidden", 2.0)),
        # Layers, then parts, in front; the FFN's width is rounded and grows by another factor.
        ((4, 2, 128, 512), (4, 2, 32, 256), (4, 2, 512, 1536), ("hidden", 4.0)),
        # Rounded to the base's own width.
        ((2, 64, 256), (2, 32, 256), (2, 512, 1536), ("hidden", 2.0)),
        ((256, 64), (256, 32), (1536, 512), ("hidden", 1.0)),
        ((16, 64), (16, 32), (16, 512), ("input", 1.0)),
        ((64, 16), (32, 16), (512, 16), ("output", 2.0)),
        ((3, 64, 16), (3, 32, 16), (3, 512, 16), ("output", 2.0)),
        ((64,), (32,), (512,), ("fixed", 1.0)),
        ((16, 4), (16, 4), (16, 4), ("fixed", 1.0)),
    ],
)
def test_how_a_parameter_grows(shape, base, far, expected):
    assert mup.growth(shape, base, far) == expected


def test_spreads_follow_the_table_and_constants_stay():
    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, 64), "input": (16, 64), "output": (64, 16), "bias": (64,)}
    small = {"hidden": (16, 16), "input": (16, 16), "output": (16, 16), "bias": (16,)}
    now = {name: jnp.asarray(rng.normal(0, 3, shape)) for name, shape in shapes.items()} | {
        "ones": jnp.ones((2, 64))
    }
    base = {name: jnp.asarray(rng.normal(0, 0.5, shape)) for name, shape in small.items()} | {
        "ones": jnp.ones((2, 16))
    }
    wide = {"hidden": (256, 256), "input": (16, 256), "output": (256, 16), "bias": (256,), "ones": (2, 256)}
    made = mup.initial(now, base, {name: jnp.zeros(shape) for name, shape in wide.items()})
    spread = {name: float(base[name].std()) for name in base}
    assert float(made["hidden"].std()) == pytest.approx(spread["hidden"] / 2, rel=1e-5)
    assert float(made["input"].std()) == pytest.approx(spread["input"], rel=1e-5)
    assert float(made["output"].std()) == pytest.approx(spread["output"] / 4, rel=1e-5)
    np.testing.assert_array_equal(made["bias"], now["bias"])
    np.testing.assert_array_equal(made["ones"], now["ones"])


def test_a_backbone_that_mup_does_not_cover_is_refused():
    with pytest.raises(UserError, match="muP is for transformers, and UNet has no hidden size"):
        mup.base_backbone(backbones.create("unet"), 64)
    with pytest.raises(
        UserError, match="mup_base is 40, which is no multiple of the head size 16; nearest: 32"
    ):
        mup.base_backbone(create("uvit", 64), 40)


def data():
    """Latents, timesteps, text and what to predict: one batch."""
    rng = np.random.default_rng(1)
    latents, text, target = (rng.normal(size=(8, *shape)).astype("f4") for shape in (LATENTS, TEXT, LATENTS))
    return latents, np.linspace(0, 999, 8, dtype="f4"), text, target


def initial(backbone):
    return trees.unbox(backbone.init(FAST_KEY, *data()[:3])["params"])


@functools.cache
def first(backbone):
    return jax.jit(functools.partial(initial, backbone))()


def activations(name, width):
    """After each of STEPS steps of Adam on one batch, with muP and without: mean |activation| of each block.

    [steps, blocks] each. One program trains both, for they differ in initial values and rates alone.
    """
    module = create(name, width)
    latents, times, text, target = data()
    plain, base = first(module), first(mup.base_backbone(module, BASE))
    far = jax.eval_shape(functools.partial(initial, mup.base_backbone(module, mup.FAR * BASE)))
    optimizer = optax.scale_by_adam()
    blocks = lambda mdl, _: "Block" in type(mdl).__name__  # noqa: E731

    @jax.jit
    def step(params, state, m):
        def loss(params):
            out, seen = module.apply(
                {"params": params},
                latents,
                times,
                text,
                capture_intermediates=blocks,
                mutable=["intermediates"],
            )
            sizes = [
                jnp.abs(leaf).mean() for leaf in jax.tree.leaves(seen["intermediates"]) if leaf.ndim == 3
            ]
            return ((out - target) ** 2).mean(), jnp.stack(sizes)

        grads, sizes = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        params = jax.tree.map(lambda p, u, f: p - RATES[name] * u / f, params, updates, m)
        return params, state, sizes

    fresh = jax.jit(optimizer.init)(plain)

    def trained(params, m):
        state, seen = fresh, []
        for _ in range(STEPS + 1):
            params, state, sizes = step(params, state, m)
            seen.append(np.asarray(sizes))
        return np.stack(seen[1:])

    factors = jax.tree.map(np.float32, mup.fan_ins(plain, base, far))
    scaled = jax.jit(functools.partial(mup.initial, far=far))(plain, base)
    return trained(scaled, factors), trained(plain, jax.tree.map(lambda _: np.float32(1), factors))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_activations_are_flat_in_width_under_mup_and_fan_out_without_it(name):
    narrow, wide = (activations(name, width) for width in (64, 256))
    flat, without = (many / few for many, few in zip(wide, narrow, strict=True))
    print(name, "with", flat.min(), flat.max(), "without", without[0].max(), without.max())
    assert flat.min() >= 1 / 1.2 and flat.max() <= 1.2
    # Without muP sizes differ before training as well: by initial values whose spread does not follow the table.
    assert (without / without[0]).max() > 1.5

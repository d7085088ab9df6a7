"""Attention of short sequences against XLA's: values and gradients in interpret mode, on meshes, compiled for TPUs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.errors import UserError
from scaling_dit.nn import attention as attention_lib
from scaling_dit.nn import short_attention
from scaling_dit.nn.attention import CrossAttention, attention, recorded_choices
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from tests.support import attention_checks
from tests.support.attention_checks import assert_same, compiled, inputs, pretend_tpu, value_and_grads, xla
from tests.support.uvit_golden import FAST_KEY, run

# Head size, heads whose lanes make whole tiles of 128, queries, keys; masked. Most lengths are no multiple of 8.
CASES = [
    (64, 4, 9, 13, True),
    (128, 1, 130, 11, False),
]
SLOW_CASES = [
    (192, 2, 14, 3, False),
    (96, 4, 13, 21, True),
    (64, 2, 16, 5, False),
    (72, 16, 11, 7, True),
    (80, 8, 21, 77, False),
    (128, 2, 6, 40, True),
    (160, 4, 5, 9, True),
    (32, 4, 8, 8, True),
]
interpreted = attention_checks.interpreted(short_attention)


@pytest.mark.parametrize(
    "size, heads, queries, keys, masked",
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES],
)
def test_values_and_gradients_are_those_of_xla(size, heads, queries, keys, masked):
    """No head sees its neighbours in a tile, and no lane is left unwritten: interpret mode starts with NaN."""
    qkv, mask = inputs(queries, keys, heads, heads, size)
    mask = mask if masked else None
    assert_same(value_and_grads(interpreted, qkv, mask), value_and_grads(xla, qkv, mask), 1e-5)


@pytest.mark.parametrize(
    "size, heads, masked", [(64, 4, True), pytest.param(96, 4, False, marks=pytest.mark.slow)]
)
def test_bfloat16_is_as_near_to_float32_as_xla_is(size, heads, masked):
    """Neither rounds what is added up: errors are a few roundings (2^-8) of the largest values."""
    qkv, mask = inputs(queries=24, keys=19, heads=heads, kv_heads=heads, size=size)
    mask = mask if masked else None
    half = [np.asarray(x).astype(jnp.bfloat16) for x in qkv]
    exact = value_and_grads(xla, [x.astype(np.float32) for x in half], mask)
    found = value_and_grads(interpreted, half, mask)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 4
    assert_same(found, exact, 2**-7)

    def error(results):
        results, wanted = ([np.asarray(x, np.float32) for x in given] for given in (results, exact))
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, wanted, strict=True))

    assert error(found) < 1.5 * error(value_and_grads(xla, half, mask))


def test_scores_so_large_that_exp_overflows_do_no_harm():
    (q, k, v), mask = inputs(queries=8, keys=9, heads=2, kv_heads=2, size=64)
    q, k, v = map(np.asarray, (q, k, v))
    both = [
        jax.jit(lambda *qkv, attend=attend: value_and_grads(attend, qkv, mask))
        for attend in (interpreted, xla)
    ]
    for sharp in ([30 * q, 30 * k, v], [-200 * np.abs(q), np.abs(k), v]):
        assert_same(*(attended(*sharp) for attended in both), 1e-4)


@pytest.mark.parametrize("size, heads, at_once", [(64, 6, 2), pytest.param(96, 8, 4, marks=pytest.mark.slow)])
def test_blocks_of_lanes_share_out_the_heads(monkeypatch, size, heads, at_once):
    """Three and two grid steps for each example, each with lanes of its own."""
    monkeypatch.setattr(short_attention, "_BLOCK_BYTES", 2 * 12 * at_once * size)
    assert short_attention.block_lanes(heads * size, size, 7, 12) == at_once * size
    qkv, mask = inputs(queries=7, keys=12, heads=heads, kv_heads=heads, size=size, batch=3)
    assert_same(value_and_grads(interpreted, qkv, mask), value_and_grads(xla, qkv, mask), 1e-5)


def test_a_mask_gets_no_gradient_and_hidden_keys_none_either():
    (q, k, v), _ = inputs(queries=5, keys=9, heads=2, kv_heads=2, size=64)
    mask = np.arange(9)[None] < np.array([[4], [9]])
    _, _, d_k, d_v = value_and_grads(interpreted, [q, k, v], mask)
    for grad in (d_k, d_v):
        assert not np.asarray(grad)[0, 4:].any() and np.asarray(grad)[0, :4].all()


def test_block_lanes_are_whole_heads_on_whole_tiles_that_divide_the_width():
    for size, heads, length in itertools.product(
        (32, 64, 72, 80, 96, 128, 192), (4, 12, 16, 20, 32), (8, 77, 334)
    ):
        width = size * heads
        least = math.lcm(size, 128)
        if width % 128:
            continue
        lanes = short_attention.block_lanes(width, size, length, 77)
        assert width % lanes == 0 == lanes % least
        if lanes > least:
            assert 2 * max(length, 77) * lanes <= short_attention._BLOCK_BYTES
            few = length * 77 <= short_attention._FEW_SCORES
            assert few or lanes // size <= short_attention._MOST_HEADS


@pytest.mark.parametrize(
    "width, size, queries, keys, lanes",
    [
        # Few scores: all heads at once.
        (2048, 64, 64, 77, 2048),
        # 20 heads are too many, 10 are not.
        (1280, 64, 256, 77, 640),
        (2048, 128, 334, 334, 1024),
        (1536, 96, 334, 334, 768),
        # 16 heads fill the first whole tile.
        (1152, 72, 64, 64, 1152),
        # As many as memory takes.
        (4096, 256, 512, 512, 1024),
    ],
)
def test_block_lanes_of_the_papers_backbones(width, size, queries, keys, lanes):
    assert short_attention.block_lanes(width, size, queries, keys) == lanes


@attention_checks.on_meshes
def test_on_a_mesh_each_device_takes_its_examples_heads_and_queries(axes):
    attention_checks.assert_same_on_a_mesh(interpreted, axes, kv_heads=4, tolerance=1e-5)


OBSTACLES = [
    ({"dtype": jnp.float32}, "dtype is float32, it needs bfloat16"),
    ({"kv_heads": 2}, "2 key heads for 4 heads, it needs as many"),
    ({"queries": 513}, "513 tokens, it takes 512 at most"),
    ({"keys": 600}, "600 tokens, it takes 512 at most"),
    ({"heads": 3, "kv_heads": 3}, "3 heads of 64 on a device are 192 wide, it needs a multiple of 128"),
    (
        {"heads": 16, "kv_heads": 16, "size": 72, "queries": 400, "keys": 384},
        "16 heads of 72 lie in whole tiles of 128, it takes 10 at once at these lengths",
    ),
    (
        {"heads": 64, "kv_heads": 64, "size": 90, "queries": 128},
        "heads of 90 lie in 5760 lanes of whole tiles, too many at 128 tokens",
    ),
]


def choice(**changed):
    """Inputs of the kernel, some changed, and what `auto` makes of them."""
    shape = {"queries": 6, "keys": 5, "heads": 4, "kv_heads": 4, "size": 64, "dtype": jnp.bfloat16} | changed
    (q, k, v), _ = inputs(**shape)
    with recorded_choices() as chosen:
        jax.eval_shape(lambda *qkv: attention(*qkv), q, k, v)
    return (q, k, v), next(iter(chosen)).implementation


@pytest.mark.parametrize("changed, reason", OBSTACLES)
def test_inputs_it_cannot_take_are_reported_and_left_to_xla(monkeypatch, changed, reason):
    pretend_tpu(monkeypatch)
    qkv, implementation = choice(**changed)
    assert implementation == ("splash" if changed.get("keys", 0) >= attention_lib.SPLASH_FROM else "xla")
    with pytest.raises(
        UserError, match=f"attention='short' cannot run: {reason}; use attention='xla' or 'auto'"
    ):
        attention(*qkv, implementation="short")


def test_heads_that_a_mesh_splits_are_counted_on_a_device(monkeypatch):
    pretend_tpu(monkeypatch)
    with rules.activate(make_mesh(data=1, tensor=4, devices=jax.devices()[:4])):
        qkv, implementation = choice()
        assert implementation == "xla"
        with pytest.raises(UserError, match="1 heads of 64 on a device are 64 wide"):
            attention(*qkv, implementation="short")
        assert choice(size=128)[1] == "short"
        with pytest.raises(UserError, match="6 heads cannot be split over tensor = 4"):
            attention(*choice(heads=6, kv_heads=6)[0], implementation="short")


@pytest.mark.parametrize(
    "queries, keys, implementation",
    [(64, 64, "short"), (334, 511, "short"), (512, 512, "short"), (64, 513, "splash"), (1024, 77, "xla")],
)
def test_auto_on_a_tpu(monkeypatch, queries, keys, implementation):
    # A CPU.
    assert choice(queries=queries, keys=keys)[1] == "xla"
    pretend_tpu(monkeypatch)
    assert choice(queries=queries, keys=keys)[1] == implementation


def test_an_explicit_short_never_falls_back():
    with pytest.raises(UserError, match="attention='short' cannot run: the backend is cpu, it needs tpu"):
        attention(*choice()[0], implementation="short")


def test_a_module_of_short_is_initialised_anywhere_and_computes_what_xla_does(monkeypatch):
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=shape).astype(jnp.bfloat16) for shape in ((2, 6, 128), (2, 5, 12)))
    mask = np.arange(5)[None] < np.array([[3], [0]])
    plain, kernel = (
        CrossAttention(2, implementation=name, kernel_init=nn.initializers.normal(0.3), dtype=jnp.bfloat16)
        for name in ("xla", "short")
    )
    params = trees.unbox(run(kernel.init, FAST_KEY, x, context, mask))
    pretend_tpu(monkeypatch)
    calls = []

    def attend(*args):
        calls.append([None if array is None else array.shape for array in args])
        return short_attention.attend(*args, interpret=True)

    monkeypatch.setitem(attention_lib._TPU_KERNELS, "short", attend)
    found = run(kernel.apply, params, x, context, mask)
    assert calls == [[(2, 6, 2, 64), (2, 5, 2, 64), (2, 5, 2, 64), (2, 5)]]
    assert_same([found], [run(plain.apply, params, x, context, mask)], 2e-2)


# Queries, keys, heads, head size: blocks as large as they get, so that memory is at its limit.
TPU_CASES = ["64:64:8:64", "64:77:8:64", "334:334:8:96", "512:512:10:64", "512:512:8:128"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_forward_and_backward_compile_for_tpus_and_declare_their_cycles(topology):
    cases = []
    # All shapes for one chip; for the others the smallest, and the largest, which asks for the most memory.
    for case in TPU_CASES if topology.startswith("v5e") else (TPU_CASES[0], TPU_CASES[-1]):
        queries, keys, heads, size = case.split(":")
        cases.append(f"{queries}:{keys}:{heads}:{heads}:{size}{':unmasked' if queries == keys else ''}")
    found = compiled(topology, "short", cases, tensor=1)
    assert list(found) == cases
    for cycles, implementation in found.values():
        assert implementation == "short" and len(cycles) == 2 and min(cycles) > 0
    # Scores of 512 x 512 tokens fill 32 times the registers of 64 x 64; a head's constant cost lessens the ratio.
    forward, backward = zip(*(sorted(found[case][0]) for case in (cases[0], cases[-1])), strict=True)
    ratios = [long / short for short, long in (forward, backward)]
    assert all(8 < ratio < 32 for ratio in ratios)


@pytest.mark.slow
def test_auto_for_a_tpu_that_is_not_here_is_what_that_tpu_would_take():
    narrow, short, long = "64:64:2:2:64", "64:511:4:4:64", "64:513:2:2:64"
    found = compiled("v5e:2x4", "auto", [narrow, short, long])
    assert {case: (len(cycles), chosen) for case, (cycles, chosen) in found.items()} == {
        # 64 lanes on a device.
        narrow: (0, "xla"),
        short: (2, "short"),
        long: (2, "splash"),
    }

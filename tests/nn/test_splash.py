"""Splash attention against XLA's: values and gradients in interpret mode, on meshes, and compiled for TPUs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_dit import backbones, trees
from scaling_dit.errors import UserError
from scaling_dit.nn import attention as attention_lib
from scaling_dit.nn import splash
from scaling_dit.nn.attention import attention, recorded_choices
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from tests.support import attention_checks
from tests.support.attention_checks import assert_same, compiled, inputs, pretend_tpu, value_and_grads, xla

HEAD_SIZES = (64, 72, 80, 96, 128)
interpreted = attention_checks.interpreted(splash)


FAST, SLOW = (72,), [size for size in HEAD_SIZES if size != 72]


@pytest.mark.parametrize(
    "size, masked",
    [
        *((size, True) for size in FAST),
        *(pytest.param(size, True, marks=pytest.mark.slow) for size in SLOW),
        # Without a mask one that fills no tile of 128 lanes, and one that does.
        *(pytest.param(size, False, marks=pytest.mark.slow) for size in (72, 128)),
    ],
)
def test_values_and_gradients_are_those_of_xla(size, masked):
    """Neither length is a multiple of a block; two blocks of keys; two queries share a key head."""
    qkv, mask = inputs(queries=150, keys=530 if masked else 40, heads=2, kv_heads=1, size=size)
    mask = mask if masked else None
    assert_same(value_and_grads(interpreted, qkv, mask), value_and_grads(xla, qkv, mask))


@pytest.mark.slow
def test_many_blocks_of_keys_take_the_unfused_backward_pass(monkeypatch):
    monkeypatch.setattr(splash, "_UNKNOWN_DEVICE", (256, 128))
    cut = splash.blocks(200, 1000, "cpu")
    assert cut.keys // cut.backward[1] > splash._FUSED_UP_TO
    qkv, mask = inputs(queries=200, keys=1000, heads=1, kv_heads=1, size=64)
    assert_same(value_and_grads(interpreted, qkv, mask), value_and_grads(xla, qkv, mask))


@attention_checks.on_meshes
def test_on_a_mesh_each_device_takes_its_examples_heads_and_queries(axes):
    """Heads of keys are split with those of queries."""
    attention_checks.assert_same_on_a_mesh(interpreted, axes, kv_heads=2)


def test_where_devices_run_alone_already_it_runs_as_it_is():
    qkv, mask = inputs(queries=33, keys=20, heads=2, kv_heads=2, size=64)
    mesh = make_mesh(devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    with rules.activate(mesh):
        local = jax.shard_map(
            lambda *args: interpreted(*args), in_specs=(rows,) * 4, out_specs=rows, check_vma=False
        )
        found = jax.jit(local)(*qkv, mask)
    assert_same([found], [jax.jit(xla)(*qkv, mask)])


@pytest.mark.parametrize(
    "queries, keys, kind, expected",
    [
        (334, 77, "TPU v5", splash.Blocks(384, 128, (384, 128), (384, 128))),
        (1024, 1101, "TPU v5", splash.Blocks(1024, 1152, (1024, 384), (512, 384))),
        (4096, 4096, "TPU v4", splash.Blocks(4096, 4096, (512, 512), (512, 512))),
        (1, 513, "none of these", splash.Blocks(128, 768, (128, 384), (128, 384))),
    ],
)
def test_lengths_are_padded_to_as_few_blocks_as_the_device_takes(queries, keys, kind, expected):
    assert splash.blocks(queries, keys, kind) == expected


def test_blocks_divide_whatever_the_length():
    for length in range(1, 5000, 37):
        cut = splash.blocks(length, length, "TPU v5")
        # Less than a tile of each block is padding.
        assert 0 <= cut.keys - length < 128 * -(-length // 512)
        for block in (*cut.forward, *cut.backward):
            assert block % 128 == 0 == cut.keys % block


@contextlib.contextmanager
def tpu(monkeypatch, calls):
    """Pretends that programs are for a TPU, and records what the kernel is given."""

    def kernel(q, k, v, mask=None):
        calls.append((q.shape[1], k.shape[1]))
        return q

    with monkeypatch.context() as patch:
        pretend_tpu(patch)
        patch.setitem(attention_lib._TPU_KERNELS, "splash", kernel)
        yield


def test_auto_takes_the_kernel_on_a_tpu_from_a_length_on(monkeypatch):
    calls = []
    with tpu(monkeypatch, calls), recorded_choices() as chosen:
        for keys in (attention_lib.SPLASH_FROM - 1, attention_lib.SPLASH_FROM):
            (q, k, v), _ = inputs(queries=6, keys=keys, heads=2, kv_heads=2, size=8)
            jax.eval_shape(attention, q, k, v)
        attention(*inputs(queries=6, keys=5, heads=2, kv_heads=2, size=8)[0], implementation="splash")
    assert [keys for _, keys in calls] == [attention_lib.SPLASH_FROM, 5]
    assert [choice.implementation for choice in sorted(chosen, key=lambda choice: choice.keys)] == [
        "splash",
        "xla",
        "splash",
    ]
    assert "6x5 tokens, 2 heads of 8: splash" in map(str, chosen)


def test_an_explicit_splash_never_falls_back(monkeypatch):
    qkv, _ = inputs(queries=6, keys=5, heads=3, kv_heads=3, size=8)
    with pytest.raises(UserError, match="attention='splash' cannot run: the backend is cpu, it needs tpu"):
        attention(*qkv, implementation="splash")
    for axes, message in (
        ({"data": 1, "fsdp": 4}, "2 examples cannot be split over data x fsdp = 4"),
        ({"data": 2, "tensor": 2}, "3 heads cannot be split over tensor = 2"),
    ):
        mesh = make_mesh(**axes, devices=jax.devices()[:4])
        with rules.activate(mesh), tpu(monkeypatch, []), pytest.raises(UserError, match=message):
            attention(*qkv, implementation="splash")


@pytest.mark.slow
def test_a_backbone_of_splash_is_initialised_anywhere_and_runs_as_xla(monkeypatch):
    fields = {"hidden": 32, "depth": 2, "heads": 2, "text_dim": 12}
    args = (jnp.ones((2, 4, 4, 4)), jnp.ones(2), jnp.ones((2, 5, 12)), jnp.ones((2, 5), bool))
    plain = backbones.create("uvit", attention="xla", **fields)
    kernel = backbones.create("uvit", attention="splash", **fields)
    variables = trees.unbox(jax.jit(kernel.init)(jax.random.key(0), *args))
    wanted = jax.jit(plain.apply)(variables, *args)
    pretend_tpu(monkeypatch)
    monkeypatch.setitem(
        attention_lib._TPU_KERNELS, "splash", functools.partial(splash.attend, interpret=True)
    )
    np.testing.assert_allclose(jax.jit(kernel.apply)(variables, *args), wanted, atol=1e-5)


@pytest.mark.slow
# Compiles in half a minute, but the TPU's compiler takes every core it finds.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_forward_and_backward_compile_for_tpus_at_every_head_size(topology):
    # All sizes for one chip; for the other one that is no power of two, and the largest by the long sequences below.
    sizes = HEAD_SIZES if topology.startswith("v5p") else (72,)
    cases = [f"334:77:4:2:{size}" for size in sizes] + ["1101:1101:4:4:128"]
    assert compiled(topology, "splash", cases) == dict.fromkeys(cases, ([0, 0], "splash"))

"""What tests of the attention kernels share: inputs, the comparison with XLA's attention, and compiling for TPUs."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.nn import per_device
from scaling_dit.nn.attention import attention
from scaling_dit.parallel import rules, topologies
from scaling_dit.parallel.mesh import make_mesh
from tests.support import xla as compiling


def inputs(queries, keys, heads, kv_heads, size, batch=2, dtype=jnp.float32):
    """q, k, v and a mask that hides some keys of the first example and all of the last one's."""
    rng = np.random.default_rng(size)
    q = rng.normal(size=(batch, queries, heads, size))
    k, v = (rng.normal(size=(batch, keys, kv_heads, size)) for _ in range(2))
    mask = np.ones((batch, keys), bool)
    mask[0] = rng.random(keys) < 0.5
    mask[-1] = False
    # Of numpy: jax compiles a program for each new shape to make an array, and for what is asked of it.
    return [x.astype(dtype) for x in (q, k, v)], mask


def value_and_grads(attend, qkv, mask):
    """The output and, of its product with fixed numbers, the gradients of q, k and v."""

    def loss(*qkv):
        out = attend(*qkv, mask)
        weights = np.random.default_rng(1).normal(size=out.shape)
        return (out * weights.astype(np.float32)).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return [out, *grads]


def xla(q, k, v, mask):
    """Attention written out for XLA."""
    return attention(q, k, v, key_mask=mask, implementation="xla")


def interpreted(kernel):
    """A kernel's `attend` run by XLA's operations, with masks as `attention` gives them."""

    def attend(q, k, v, mask):
        if mask is not None:
            mask = mask | ~mask.any(axis=1, keepdims=True)
        return kernel.attend(q, k, v, mask, interpret=True)

    return attend


def assert_same(found, wanted, tolerance=2e-5):
    """Equal up to `tolerance` x the largest value of each array, or x 1."""
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, float(np.abs(b).max())))


on_meshes = pytest.mark.parametrize(
    "axes",
    [
        {"data": 1, "context": 2},
        pytest.param({"data": 2, "fsdp": 1, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)


def assert_same_on_a_mesh(attend, axes, kv_heads, tolerance=2e-5):
    """As XLA's on one device; the 33 queries do not divide over context."""
    qkv, mask = inputs(queries=33, keys=20, heads=4, kv_heads=kv_heads, size=64)
    wanted = value_and_grads(xla, qkv, mask)
    mesh = make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    with rules.activate(mesh):
        assert_same(value_and_grads(attend, qkv, mask), wanted, tolerance)


def pretend_tpu(monkeypatch, kind="TPU v5"):
    """Makes the kernels take programs to be for a TPU."""
    monkeypatch.setattr(per_device, "target", lambda: per_device.Target("tpu", kind))


def tpu_environment(topology):
    """The variables of a process that compiles for a topology that is not here."""
    environment = compiling.plain_environment()
    topologies.prepare_environment([topology], environment)
    return environment


def compiled(topology, implementation, cases, tensor=2):
    """For each case the cycles that each Pallas kernel of the program for these TPUs declares, and what was chosen."""
    worker = Path(__file__).with_name("attention_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), topology, str(tensor), implementation, *cases],
        env=tpu_environment(topology),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for line in done.stdout.splitlines():
        case, *cycles, chosen = line.split(" | ")
        found[case] = list(map(int, cycles)), chosen.rsplit(" ", 1)[1]
    return found

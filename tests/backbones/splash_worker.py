"""Compiles attention, forward and backward, for TPUs that are not here; a process of its own, for libtpu wants its env.

usage: splash_worker.py TOPOLOGY IMPLEMENTATION LENGTH:KEYS:HEADS:KV_HEADS:HEAD_SIZE ...
Prints for each case how many kernels of Pallas the compiled program calls and what `attention` says it chose.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.backbones.attention import attention, recorded_choices
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh


def compile_case(mesh, implementation, queries, keys, heads, kv_heads, size):
    """The text of the compiled program and the choices of one case, a batch of 8 over fsdp, masked, in bfloat16."""

    def loss(q, k, v, mask):
        return attention(q, k, v, key_mask=mask, implementation=implementation).astype(jnp.float32).sum()

    def shaped(dtype, *shape):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(rules.BATCH_AXES))
        )

    q = shaped(jnp.bfloat16, 8, queries, heads, size)
    k = shaped(jnp.bfloat16, 8, keys, kv_heads, size)
    mask = shaped(jnp.bool_, 8, keys)
    with rules.activate(mesh), recorded_choices() as chosen:
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, mask).compile()
    return compiled.as_text(), chosen


if __name__ == "__main__":
    topology = topologies.get_topology_desc(sys.argv[1], platform="tpu")
    mesh = make_mesh(data=1, fsdp=-1, tensor=2, devices=topology.devices)
    for case in sys.argv[3:]:
        text, chosen = compile_case(mesh, sys.argv[2], *map(int, case.split(":")))
        print(case, text.count('custom_call_target="tpu_custom_call"'), *chosen, sep=" | ")

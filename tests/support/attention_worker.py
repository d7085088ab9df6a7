"""Compiles attention, forward and backward, for TPUs that are not here; a process of its own, for libtpu wants its env.

usage: attention_worker.py TOPOLOGY TENSOR IMPLEMENTATION LENGTH:KEYS:HEADS:KV_HEADS:HEAD_SIZE[:unmasked] ...
The mesh splits heads over TENSOR devices and the batch over the rest. Prints for each case the cycles that each Pallas
kernel of the compiled program declares (0: none) and what `attention` says it chose.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.nn.attention import attention, recorded_choices
from scaling_dit.parallel import rules, topologies
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.planning.hlo import Program


def compile_case(mesh, implementation, queries, keys, heads, kv_heads, size, masked):
    """The text of the compiled program and the choices of one case, a batch of 8 over fsdp in bfloat16."""

    def loss(q, k, v, mask):
        return attention(q, k, v, key_mask=mask, implementation=implementation).astype(jnp.float32).sum()

    def shaped(dtype, *shape):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(rules.BATCH_AXES))
        )

    q = shaped(jnp.bfloat16, 8, queries, heads, size)
    k = shaped(jnp.bfloat16, 8, keys, kv_heads, size)
    mask = shaped(jnp.bool_, 8, keys) if masked else None
    with rules.activate(mesh), recorded_choices() as chosen:
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, mask).compile()
    return compiled.as_text(), chosen


def declared_cycles(text):
    """Of each Pallas kernel of a program."""
    calls = [visit.instruction.attributes for visit in Program(text).walk()]
    calls = [attributes for attributes in calls if 'custom_call_target="tpu_custom_call"' in attributes]
    found = [re.search(r'"estimated_cycles":"(\d+)"', attributes) for attributes in calls]
    return [int(cycles[1]) if cycles else 0 for cycles in found]


if __name__ == "__main__":
    name, tensor, implementation, *cases = sys.argv[1:]
    mesh = make_mesh(data=1, fsdp=-1, tensor=int(tensor), devices=topologies.parse(name).devices())
    for case in cases:
        *numbers, last = case.split(":")
        masked = last != "unmasked"
        sizes = map(int, [*numbers, last] if masked else numbers)
        text, chosen = compile_case(mesh, implementation, *sizes, masked)
        print(case, *declared_cycles(text), *chosen, sep=" | ")

"""Compiles a stack of layers for TPUs that are not here; a process of its own, for libtpu wants its environment.

Prints one JSON object: slices of the mesh's rows, types of the sums over devices, bytes that remat keeps on the host,
and the compiler's cycles for cutting layers out of stacks that were gathered at once.
"""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from scaling_dit import trees
from scaling_dit.nn import layers, scanning
from scaling_dit.parallel import fsdp, rules
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.planning import hlo_cost
from scaling_dit.planning.hlo import Program


class Layer(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        return x + layers.Mlp(4 * x.shape[-1], dtype=self.dtype, name="mlp")(x), None


class Stack(nn.Module):
    dtype: str = "bfloat16"
    remat: str = "none"
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        run = {"remat": self.remat, "scan": True, "dtype": self.dtype}
        return layers.stack(Layer, self.depth, "layers", x, None, **run)[0]


def compile_stack(mesh, rows=64, width=512, gather_once=False, **fields):
    """The compiled gradients of a stack, `rows` of 128 tokens over the mesh."""
    stack = Stack(**fields)
    x = jax.ShapeDtypeStruct((rows, 128, width), jnp.dtype(stack.dtype), sharding=rules.batch_sharding(mesh))
    boxed = jax.eval_shape(stack.init, jax.random.key(0), x)
    shardings = rules.param_shardings(mesh, boxed)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        trees.unbox(boxed),
        shardings,
    )

    def loss(params, x):
        return jnp.square(stack.apply(params, x).astype(jnp.float32)).mean()

    grad = jax.grad(loss)
    if gather_once:
        whole = fsdp.value_and_grad(loss, mesh, shardings)

        def grad(params, x):
            return whole(params, x)[1]

    with rules.activate(mesh):
        return jax.jit(grad, out_shardings=shardings).lower(params, x).compile()


def summed_types(compiled):
    """Types of the arrays of over 1,000 entries that the program sums over devices."""
    found = set()
    for line in compiled.as_text().splitlines():
        result = re.search(r"= (.*?) (?:all-reduce|reduce-scatter|all-reduce-start)\(", line)
        for dtype, shape in re.findall(r"(bf16|f32)\[([\d,]+)\]", result.group(1) if result else ""):
            if jnp.prod(jnp.array([int(size) for size in shape.split(",")])) > 1000:
                found.add(dtype)
    return sorted(found)


def cutting(compiled):
    """Cycles for cutting layers out of stacks, a share of all."""
    program, cycles = Program(compiled.as_text()), {True: 0, False: 0}
    for visit in program.walk():
        scope = re.search(r'op_name="([^"]*)"', visit.instruction.attributes)
        cut = scope is not None and scope[1].endswith("/dynamic_slice")
        cycles[cut] += visit.times * hlo_cost.cycles_of(visit.instruction)
    return cycles[True] / sum(cycles.values())


if __name__ == "__main__":
    two = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2)
    across = make_mesh(data=2, fsdp=8, slices=2, devices=two.devices)
    one = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    mesh = make_mesh(data=1, fsdp=8, devices=one.devices)
    plain = compile_stack(mesh)
    offloaded = compile_stack(mesh, remat="offload")
    v6e = topologies.get_topology_desc("v6e:16x16", platform="tpu")
    many = make_mesh(data=1, fsdp=256, devices=v6e.devices)
    # Of so many chips and layers that XLA lays the layers of a stack innermost, where a tile holds several.
    cut = []
    for lay_out in (scanning._layer_by_layer, lambda stacks: stacks):
        scanning._layer_by_layer = lay_out
        cut.append(cutting(compile_stack(many, rows=256, width=640, depth=10, gather_once=True)))
    results = {
        "slices": [sorted({device.slice_index for device in row.flat}) for row in across.devices],
        "bfloat16": summed_types(plain),
        "float32": summed_types(compile_stack(mesh, dtype="float32")),
        "on host": [c.memory_analysis().host_temp_size_in_bytes for c in (plain, offloaded)],
        "cut out": cut,
    }
    print(json.dumps(results))

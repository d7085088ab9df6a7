"""Compiles a stack of layers for TPUs that are not here; a process of its own, for libtpu wants its environment.

Prints one JSON object: slices of the mesh's rows, types of the sums over devices, bytes that remat keeps on the host.
"""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from scaling_dit import trees
from scaling_dit.backbones import layers
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh

WIDTH = 512


class Layer(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        return x + layers.Mlp(4 * WIDTH, dtype=self.dtype, name="mlp")(x), None


class Stack(nn.Module):
    dtype: str = "bfloat16"
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        return layers.stack(Layer, 3, "layers", x, None, remat=self.remat, scan=True, dtype=self.dtype)[0]


def compile_stack(mesh, **fields):
    """The compiled gradients of a stack, 64 rows of 128 tokens over the mesh."""
    stack = Stack(**fields)
    x = jax.ShapeDtypeStruct((64, 128, WIDTH), jnp.dtype(stack.dtype), sharding=rules.batch_sharding(mesh))
    boxed = jax.eval_shape(stack.init, jax.random.key(0), x)
    shardings = rules.param_shardings(mesh, boxed)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        trees.unbox(boxed),
        shardings,
    )
    grad = jax.grad(lambda params, x: jnp.square(stack.apply(params, x).astype(jnp.float32)).mean())
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


if __name__ == "__main__":
    two = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2)
    across = make_mesh(data=2, fsdp=8, slices=2, devices=two.devices)
    one = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    mesh = make_mesh(data=1, fsdp=8, devices=one.devices)
    plain = compile_stack(mesh)
    offloaded = compile_stack(mesh, remat="offload")
    told = {
        "slices": [sorted({device.slice_index for device in row.flat}) for row in across.devices],
        "bfloat16": summed_types(plain),
        "float32": summed_types(compile_stack(mesh, dtype="float32")),
        "on host": [c.memory_analysis().host_temp_size_in_bytes for c in (plain, offloaded)],
    }
    print(json.dumps(told))

"""Loss and gradients with the parameters gathered explicitly, once a step, over the rings of a TPU's torus.

Without this file XLA chooses the collectives. For a kernel split over all 64 chips of a v5p:4x4x4 it writes each shard
into an array of zeros and all-reduces that array, and it all-reduces whole gradients before it slices them. That sends
twice the bytes of an all-gather and a reduce-scatter, and needs memory for the zeros (libtpu 0.0.51).

Here each device computes its rows of the batch alone. It casts a kernel to the type that the model reads it in,
gathers it over one dimension of the torus, then over the plane of the other two. Gradients are summed and scattered
along the same rings in reverse. With `config.sharding.sparse_core` the rings are chosen so that SparseCores run both
collectives beside the computation (options in `xla_flags`). Each device holds one whole copy of the parameters and of
the gradients, so this suits chips with enough memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import Mesh, PartitionSpec

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies
from scaling_dit.parallel.rules import BATCH_AXES

Params = Any
# (whole parameters, rows of the batch) -> mean loss of these rows
LossFn = Callable[[Params, Any], jax.Array]
# For each stage of a collective, groups of positions on the fsdp axis.
Rings = list[list[list[int]]]
# Primitives whose body is a jaxpr of its own with the same inputs.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_vjp_call",
    "custom_jvp_call",
    "scan",
}


def check_mesh(mesh: Mesh) -> None:
    """Checks that devices differ only in their rows of the batch and their shards of the parameters.

    Raises:
      UserError: the mesh splits context or tensor, or does not split fsdp.
    """
    mesh_text = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if mesh.shape["context"] > 1 or mesh.shape["tensor"] > 1 or mesh.shape["fsdp"] == 1:
        raise UserError(
            f"sharding.gather_once needs fsdp above 1, and context and tensor of 1; the mesh has {mesh_text}"
        )


def check_sparse_core(mesh: Mesh, gather_once: bool) -> None:
    """Checks that SparseCores have something to gather, and that the TPU has SparseCores.

    Raises:
      UserError: `sharding.sparse_core` without `sharding.gather_once`, or for a TPU without SparseCores.
    """
    if not gather_once:
        raise UserError(
            "sharding.sparse_core is for the gathers of sharding.gather_once, which is off; set that to True as well"
        )
    chip = topologies.find_chip(mesh.devices.flat[0].device_kind)
    if chip is not None and chip.torus and chip.name not in topologies.SPARSE_CORES:
        known = " and ".join(topologies.SPARSE_CORES)
        raise UserError(f"sharding.sparse_core is for {known}; the mesh is of {chip.name}")


def value_and_grad(
    loss_fn: LossFn, mesh: Mesh, shardings: Any, sparse_core: bool = False
) -> Callable[[Params, Any], tuple[jax.Array, Params]]:
    """A function (params, rows) -> (mean loss over all rows, its gradients in the shardings of the parameters).

    Args:
      loss_fn: mean loss of some rows. It gets whole parameters and runs on each device alone.
      mesh: a mesh that `check_mesh` accepts.
      shardings: tree of NamedSharding of the parameters. Rows are split over data and fsdp.
      sparse_core: use rings over which SparseCores can gather and sum beside the computation.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    along = _gatherer(*_rings(mesh, sparse_core))

    def gather(shard: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
        read = shard.astype(dtype)
        return along(read, tuple(spec).index("fsdp")) if "fsdp" in spec else read

    def local(params: Params, rows: Any) -> tuple[jax.Array, Params]:
        whole = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(s.shape, p.dtype), params, shapes)
        types = read_as(loss_fn, whole, rows)

        def loss(params: Params) -> jax.Array:
            return loss_fn(jax.tree.map(gather, params, specs, types), rows)

        # No logical axis is split inside the shard_map.
        with nn.logical_axis_rules(()):
            value, grads = jax.value_and_grad(loss)(params)
        # The backward pass of a gather has already summed its gradients over fsdp.
        grads = jax.tree.map(
            lambda g, spec: jax.lax.psum(g, "data" if "fsdp" in spec else BATCH_AXES) / shards, grads, specs
        )
        return jax.lax.pmean(value, BATCH_AXES), grads

    shapes: Any = None

    def run(params: Params, rows: Any) -> tuple[jax.Array, Params]:
        nonlocal shapes
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(BATCH_AXES)),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )(params, rows)

    return run


def read_as(loss_fn: LossFn, params: Params, rows: Any) -> Any:
    """The dtype in which `loss_fn` reads each parameter: a narrower one if every use casts to it, else its own."""
    with nn.logical_axis_rules(()):
        closed = jax.make_jaxpr(loss_fn)(params, rows)
    leaves, tree = jax.tree.flatten(params)
    found = _casts(closed.jaxpr)[: len(leaves)]
    return jax.tree.unflatten(
        tree, [cast if cast is not None else leaf.dtype for leaf, cast in zip(leaves, found, strict=True)]
    )


def _casts(jaxpr: Any) -> list[Any]:
    """For each input the one narrower dtype that every use casts it to, or None."""
    seen: dict[Any, set[Any]] = {var: set() for var in jaxpr.invars}
    for eqn in jaxpr.eqns:
        inner: list[Any] = [None] * len(eqn.invars)
        if eqn.primitive.name == "convert_element_type":
            inner = [eqn.params["new_dtype"]]
        elif eqn.primitive.name in _CALLS:
            body = next(v for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns"))
            inner = _casts(getattr(body, "jaxpr", body))
        for var, cast in zip(eqn.invars, inner, strict=True):
            if not isinstance(var, jex.Literal) and var in seen:
                seen[var].add(cast)
    for var in jaxpr.outvars:
        if not isinstance(var, jex.Literal) and var in seen:
            seen[var].add(None)

    def one(var: Any) -> Any:
        casts = seen[var]
        narrow = len(casts) == 1 and (cast := next(iter(casts))) is not None
        return cast if narrow and jnp.dtype(cast).itemsize < var.aval.dtype.itemsize else None

    return [one(var) for var in jaxpr.invars]


def _gatherer(gathers: Rings, sums: Rings) -> Callable[[jax.Array, int], jax.Array]:
    """A function (shard, axis) -> whole array: gathers over `gathers`, and its gradient is scattered over `sums`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def along(shard: jax.Array, axis: int) -> jax.Array:
        for ring in gathers:
            shard = jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True, axis_index_groups=ring)
        return shard

    def forward(shard: jax.Array, axis: int) -> tuple[jax.Array, None]:
        return along(shard, axis), None

    def backward(axis: int, _: None, whole: jax.Array) -> tuple[jax.Array]:
        for ring in reversed(sums):
            whole = jax.lax.psum_scatter(
                whole, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=ring
            )
        return (whole,)

    along.defvjp(forward, backward)
    return along


def _rings(mesh: Mesh, sparse_core: bool) -> tuple[Rings, Rings]:
    """The rings to gather over and the rings to sum over, each in order, the fastest varying dimension first.

    XLA uses all links of a plane at once but not of three dimensions, so a stage covers at most two dimensions of the
    torus, and the stages that carry most bytes come last. SparseCores gather over one dimension at a time. They can
    sum over a plane of a three-dimensional torus, but XLA does not scatter over a plane that is the whole torus
    (libtpu 0.0.51).
    """
    torus = _torus([getattr(device, "coords", None) for device in mesh.devices[0, :, 0, 0]])

    def rings(joined: int) -> Rings:
        ids = np.arange(mesh.shape["fsdp"]).reshape(math.prod(torus[:joined]), *torus[joined:])
        return [
            np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis]).tolist()
            for axis in reversed(range(ids.ndim))
        ]

    return rings(1 if sparse_core else 2), rings(1 if sparse_core and len(torus) < 3 else 2)


def _torus(coords: list[Any]) -> tuple[int, ...]:
    """The sizes of the torus dimensions that devices with these coordinates run along, the slowest varying first."""

    def changed(a: int) -> list[int]:
        return [i for i, (one, other) in enumerate(zip(coords[0], coords[a], strict=True)) if one != other]

    sizes: list[int] = []
    step, total = 1, len(coords)
    while coords[0] is not None and step < total:
        along = changed(step)
        length = 1
        while length * step < total and changed(length * step) in (along, []) and len(along) == 1:
            length += 1
        if length == 1 or total % (length * step):
            return (total,)
        sizes.insert(0, length)
        step *= length
    return tuple(sizes) or (total,)

"""A scan over layers with explicit control of what is kept for the backward pass.

`jax.lax.scan` writes the residuals of each layer into arrays that start as zeros. XLA omits the zeros if one loop owns
the array. If two loops have arrays of the same shape, it fills each of them first. That took a sixth of a train step
of U-ViT h2048-d42 on v5p, and a quarter of SDXL's (jax 0.10.2, libtpu 0.0.51).

Here, on TPUs, these arrays start uninitialised, and inputs of a layer, above all its parameters, are read again
instead of kept. Stacked parameters also get a layout with the layers outermost. XLA tends to gather them so that the
layers interleave, and then slicing out one layer can take longer than all its products (v6e:16x16, ten layers of width
1280: 40 % of a train step).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from scaling_dit.nn import per_device

# (parameters of a layer, x, the layer's own inputs, inputs of every layer) -> (x, out)
Layer = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_layers(
    layer: Layer, last_first: bool, params: Any, x: jax.Array, per_layer: Any, broadcast: Any
) -> tuple[jax.Array, Any]:
    """Applies all layers in order: x, out_i = layer(params_i, x, per_layer_i, broadcast).

    Args:
      layer: a pure function that closes over no array.
      last_first: whether `per_layer` is in reverse order, with the entry of the last layer first. It is read in that
        order, because reversing it would copy it, and its gradient as well.
      params: tree of arrays with a leading axis of layers.
      x: any array.
      per_layer: tree of arrays with a leading axis of layers, or None.
      broadcast: tree of arrays that every layer gets, or None.

    Returns:
      The last x, and the out_i stacked.
    """
    count = len(jax.tree.leaves(params)[0])

    def step(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
        own_params, index = given
        own = _entry(per_layer, count - 1 - index if last_first else index)
        return layer(own_params, x, own, broadcast)

    return jax.lax.scan(step, x, (params, jnp.arange(count)))


@jax.tree_util.register_static
class _Anatomy:
    """Describes how a layer's gradient function is rebuilt from the layer's inputs and the kept residuals."""

    def __init__(self, pullback: Any, given: Any) -> None:
        arrays, self.tree = jax.tree.flatten(pullback)
        inputs = jax.tree.leaves(given)
        self.sources = [next((i for i, one in enumerate(inputs) if one is array), None) for array in arrays]

    def kept(self, pullback: Any) -> list[jax.Array]:
        arrays = jax.tree.leaves(pullback)
        return [array for array, source in zip(arrays, self.sources, strict=True) if source is None]

    def pullback(self, kept: list[jax.Array], given: Any) -> Any:
        inputs, rest = jax.tree.leaves(given), iter(kept)
        return jax.tree.unflatten(self.tree, [next(rest) if i is None else inputs[i] for i in self.sources])


def _forward(
    layer: Layer, last_first: bool, params: Any, x: jax.Array, per_layer: Any, broadcast: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    anatomy: list[_Anatomy] = []
    params = _layer_by_layer(params)

    def step(x: jax.Array, given: Any, own: Any) -> tuple[jax.Array, Any, None]:
        (x, out), pullback = jax.vjp(layer, given, x, own, broadcast)
        anatomy.append(_Anatomy(pullback, (given, own, broadcast)))
        return x, (out, anatomy[-1].kept(pullback)), None

    x, (outs, kept), _ = _scan(step, x, params, per_layer, last_first)
    return (x, outs), (anatomy[-1], kept, params, per_layer, broadcast)


def _backward(layer: Layer, last_first: bool, residuals: Any, gradients: Any) -> tuple[Any, ...]:
    anatomy, kept, params, per_layer, broadcast = residuals
    dx, d_outs = gradients
    zeros = jax.tree.map(jnp.zeros_like, _inexact(broadcast))

    def step(carry: Any, given: Any, own: Any) -> tuple[Any, Any, Any]:
        dx, d_shared = carry
        kept, d_out, own_params = given
        d_params, dx, d_own, d_all = anatomy.pullback(kept, (own_params, own, broadcast))((dx, d_out))
        d_shared = jax.tree.map(jnp.add, d_shared, _inexact(d_all))
        return (dx, d_shared), _inexact(d_params), _inexact(d_own)

    (dx, d_shared), d_params, d_per_layer = _scan(
        step, (dx, zeros), (kept, d_outs, params), per_layer, last_first, backward=True
    )
    return d_params, dx, d_per_layer, d_shared


scan_layers.defvjp(_forward, _backward)


def _inexact(tree: Any) -> Any:
    """The tree with None for leaves that have no gradient: masks and integers."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _layer_by_layer(stacks: Any) -> Any:
    """The arrays; on TPUs laid out with the layers outermost, then the axes too short to fill the 8 rows of a tile."""
    if per_device.target().platform != "tpu":
        return stacks

    def place(x: jax.Array) -> jax.Array:
        short = [axis for axis in range(1, x.ndim - 1) if x.shape[axis] < 8]
        long = [axis for axis in range(1, x.ndim) if axis not in short]
        return with_layout_constraint(x, Layout((0, *short, *long)))

    return jax.tree.map(place, stacks)


def _entry(tree: Any, index: Any) -> Any:
    """One layer's entry of stacked arrays."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _filled(stacks: Any, entries: Any, index: Any) -> Any:
    """Stacked arrays with one layer's entry replaced."""
    return jax.tree.map(lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, index, 0), stacks, entries)


def _scan(
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    carry: Any,
    inputs: Any,
    per_layer: Any,
    last_first: bool,
    *,
    backward: bool = False,
) -> tuple[Any, Any, Any]:
    """carry, out_i, own_i = step(carry, inputs_i, per_layer_i), from the last layer to the first if `backward`.

    Works as `jax.lax.scan`, except that stacked results start uninitialised on TPUs: every entry is written before it
    is read. With `last_first`, `per_layer` and the own_i are in reverse order.
    """
    count = len(jax.tree.leaves(inputs)[0])
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (inputs, per_layer))
    outs = jax.eval_shape(step, carry, *first)[1:]
    empty = jax.lax.empty if per_device.target().platform == "tpu" else jnp.zeros
    stacks = jax.tree.map(lambda out: empty((count, *out.shape), out.dtype), outs)

    def body(turn: Any, state: Any) -> Any:
        carry, stacks = state
        places = [turn, count - 1 - turn]
        at, own_at = places[backward], places[backward != last_first]
        carry, out, own_out = step(carry, _entry(inputs, at), _entry(per_layer, own_at))
        return carry, (_filled(stacks[0], out, at), _filled(stacks[1], own_out, own_at))

    # A fori_loop, because XLA sees that every entry is written only if the loop's own counter is the index.
    carry, stacks = jax.lax.fori_loop(0, count, body, (carry, stacks))
    return carry, *stacks

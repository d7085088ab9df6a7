"""A scan over layers that tells what it keeps for the backward pass.

`jax.lax.scan` differentiates itself: it writes what each layer keeps into arrays that start as zeros. XLA leaves the
zeros away where a loop has them to itself; where two loops have arrays of one shape, it fills every one first (with
jax 0.10.2 and libtpu 0.0.51 a sixth of a train step of U-ViT h2048-d42 on v5p, a quarter of SDXL's). On TPUs these
arrays start as they lie in memory here, and what a layer reads from outside, its parameters above all, is read again
rather than kept. There parameters also lie layer by layer: XLA likes to gather them so that the layers lie between one
another, and then cutting one out can take longer than all its products (v6e:16x16, ten layers of width 1280: 40 % of a
train step).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from scaling_dit.nn import per_device

# (parameters of a layer, x, what it alone gets, what every layer gets) -> (x, out)
Layer = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_layers(
    layer: Layer, last_first: bool, params: Any, x: jax.Array, per_layer: Any, broadcast: Any
) -> tuple[jax.Array, Any]:
    """x through all layers, one after the other: x, out_i = layer(params_i, x, per_layer_i, broadcast).

    Args:
      layer: a pure function that closes over no array.
      last_first: whether `per_layer` lies the other way round, the entry of the last layer first. It is read so, for
        turning it round would be a copy, and another one of its gradient.
      params, per_layer: trees of arrays with a leading axis of layers, or None.
      x: any array.
      broadcast: tree of arrays, or None, that every layer gets.

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
    """How the gradient function of a layer is put together from the layer's inputs and from what was kept."""

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
    """The tree with None in place of what has no gradient: masks and integers."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _layer_by_layer(stacks: Any) -> Any:
    """The arrays, on TPUs with the layers outermost in memory, then axes too short to fill the 8 rows of a tile."""
    if per_device.target().platform != "tpu":
        return stacks

    def place(x: jax.Array) -> jax.Array:
        short = [axis for axis in range(1, x.ndim - 1) if x.shape[axis] < 8]
        long = [axis for axis in range(1, x.ndim) if axis not in short]
        return with_layout_constraint(x, Layout((0, *short, *long)))

    return jax.tree.map(place, stacks)


def _entry(tree: Any, index: Any) -> Any:
    """What a layer reads of stacked arrays."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _filled(stacks: Any, entries: Any, index: Any) -> Any:
    """Stacked arrays with what a layer gives in its place."""
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
    """carry, out_i, own_i = step(carry, inputs_i, per_layer_i), from the last layer on if `backward`.

    `jax.lax.scan`, but for what stacked results start as, as every entry is written before it is read; and `per_layer`
    and the own_i lie the other way round if `last_first`.
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

    # Not a scan: XLA sees that every entry is written only where the loop's own counter is the index.
    carry, stacks = jax.lax.fori_loop(0, count, body, (carry, stacks))
    return carry, *stacks

"""A scan over layers that tells what it keeps for the backward pass.

`jax.lax.scan` differentiates itself: it writes what each layer keeps into arrays that start as zeros. XLA leaves the
zeros away where a loop has them to itself; where two loops have arrays of one shape, it fills every one first (with
jax 0.10.2 and libtpu 0.0.51 a sixth of a train step of U-ViT h2048-d42 on v5p, a quarter of SDXL's). On TPUs these
arrays start as they lie in memory here, and what a layer reads from outside, its parameters above all, is read again
rather than kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_dit.backbones import per_device

# (parameters of a layer, x, what it alone gets, what every layer gets) -> (x, out)
Layer = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_layers(
    layer: Layer, params: Any, x: jax.Array, per_layer: Any, broadcast: Any
) -> tuple[jax.Array, Any]:
    """x through all layers, one after the other: x, out_i = layer(params_i, x, per_layer_i, broadcast).

    Args:
      layer: a pure function that closes over no array.
      params, per_layer: trees of arrays with a leading axis of layers, or None.
      x: any array.
      broadcast: tree of arrays, or None, that every layer gets.

    Returns:
      The last x, and the out_i stacked.
    """
    return jax.lax.scan(lambda x, inputs: layer(inputs[0], x, inputs[1], broadcast), x, (params, per_layer))


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
    layer: Layer, params: Any, x: jax.Array, per_layer: Any, broadcast: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    anatomy: list[_Anatomy] = []

    def step(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
        own, shared = given, broadcast
        (x, out), pullback = jax.vjp(layer, own[0], x, own[1], shared)
        anatomy.append(_Anatomy(pullback, (own, shared)))
        return x, (out, anatomy[-1].kept(pullback))

    x, (outs, kept) = _scan(step, x, (params, per_layer))
    return (x, outs), (anatomy[-1], kept, params, per_layer, broadcast)


def _backward(layer: Layer, residuals: Any, gradients: Any) -> tuple[Any, ...]:
    anatomy, kept, params, per_layer, broadcast = residuals
    dx, d_outs = gradients
    zeros = jax.tree.map(jnp.zeros_like, _inexact(broadcast))

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        dx, d_shared = carry
        kept, d_out, own = inputs
        d_params, dx, d_own, d_all = anatomy.pullback(kept, (own, broadcast))((dx, d_out))
        d_shared = jax.tree.map(jnp.add, d_shared, _inexact(d_all))
        return (dx, d_shared), (_inexact(d_params), _inexact(d_own))

    (dx, d_shared), (d_params, d_per_layer) = _scan(
        step, (dx, zeros), (kept, d_outs, (params, per_layer)), reverse=True
    )
    return d_params, dx, d_per_layer, d_shared


scan_layers.defvjp(_forward, _backward)


def _inexact(tree: Any) -> Any:
    """The tree with None in place of what has no gradient: masks and integers."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, *, reverse: bool = False
) -> tuple[Any, Any]:
    """`jax.lax.scan`, but for what its stacked results start as; every entry is written before it is read."""
    count = len(jax.tree.leaves(inputs)[0])
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    outs, tree = jax.tree.flatten(jax.eval_shape(step, carry, first)[1])
    empty = jax.lax.empty if per_device.target().platform == "tpu" else jnp.zeros
    stacks = [empty((count, *out.shape), out.dtype) for out in outs]

    def body(turn: Any, state: Any) -> Any:
        carry, stacks = state
        index = count - 1 - turn if reverse else turn
        given = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), inputs)
        carry, out = step(carry, given)
        new = [
            jax.lax.dynamic_update_index_in_dim(stack, one, index, 0)
            for stack, one in zip(stacks, jax.tree.leaves(out), strict=True)
        ]
        return carry, new

    # Not a scan: XLA sees that every entry is written only where the loop's own counter is the index.
    carry, stacks = jax.lax.fori_loop(0, count, body, (carry, stacks))
    return carry, jax.tree.unflatten(tree, stacks)

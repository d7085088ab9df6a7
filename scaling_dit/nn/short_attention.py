"""Attention for short sequences on TPUs: one kernel computes all scores of a head in the core's memory.

At 256 px a backbone has 64 to 334 tokens. XLA writes their scores to HBM, in float32 and again as weights, and
transposes heads and lengths back and forth. So attention takes a fifth of a step's time for 1 to 3 % of its FLOPs.
Splash attention (splash.py) pads lengths to blocks of 128 and gains nothing at these lengths.

Here a grid step loads whole lengths of a few heads into VMEM in their layout [B, T, N * H]. A head is never cut out:
products run over the 128-lane tiles that hold it, and the lanes of its neighbours are masked. For heads smaller than a
tile this costs the matrix unit nothing. The gradient recomputes the weights from q and k; only q, k and v are kept.

Shape suffixes as in attention.py; D = N * H.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from scaling_dit.nn import per_device
from scaling_dit.nn.per_device import LANES

SUBLANES = 8
# The most queries and keys: four float32 arrays of scores must fit the 16 MiB of a core's scoped VMEM.
LONGEST = 512
# The most bytes of the longest array in a grid step.
_BLOCK_BYTES = 2**20
# The most heads in a grid step with many scores, because the kernel's code grows with the heads.
_MOST_HEADS = 10
# Scores of one head.
_FEW_SCORES, _MANY_SCORES = LANES**2, (3 * LANES) ** 2
_HIDDEN = float(jnp.finfo(jnp.float32).min) / 2
# Cycles of a head in the compiler's schedule for v5p: a constant, and cycles for each 8 x 128 scores (`python
# benchmarks/kernel_cycles.py`). v5e is within a quarter of it; v4 takes up to twice as many, v6e down to half.
_FORWARD_CYCLES, _BACKWARD_CYCLES = (40, 5.8), (210, 11.5)
# Device kinds whose chips divide the grid between two cores.
_TWO_CORES = ("TPU v4", "TPU v5")


def obstacle(q_BTNH: jax.Array, k_BSKH: jax.Array) -> str | None:
    """The reason why the kernel cannot take these inputs on the mesh of the context; None if it can."""
    if refused := per_device.obstacle(q_BTNH, k_BSKH):
        return refused
    for x in (q_BTNH, k_BSKH):
        if x.dtype != jnp.bfloat16:
            return f"dtype is {x.dtype}, it needs bfloat16"
    if q_BTNH.shape[2] != k_BSKH.shape[2]:
        return f"{k_BSKH.shape[2]} key heads for {q_BTNH.shape[2]} heads, it needs as many"
    if (longest := max(q_BTNH.shape[1], k_BSKH.shape[1])) > LONGEST:
        return f"{longest} tokens, it takes {LONGEST} at most"
    heads, size = per_device.heads(q_BTNH.shape[2]), q_BTNH.shape[3]
    if heads * size % LANES:
        return f"{heads} heads of {size} on a device are {heads * size} wide, it needs a multiple of {LANES}"
    least = math.lcm(size, LANES)
    if 2 * longest * least > _BLOCK_BYTES:
        return f"heads of {size} lie in {least} lanes of whole tiles, too many at {longest} tokens"
    together = least // size
    scores = q_BTNH.shape[1] * k_BSKH.shape[1]
    most = _MOST_HEADS if scores > _MANY_SCORES else 16 if scores > _FEW_SCORES else together
    if together > most:
        return f"{together} heads of {size} lie in whole tiles of {LANES}, it takes {most} at once at these lengths"
    return None


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H]. Arguments as `attention.attention`; no mask row may hide all keys.

    On a mesh each device runs the kernel on its examples, its heads and its part of the queries; keys and values are
    gathered over the axis that splits lengths. `interpret` runs it on any device, slowly, for tests.
    """
    run = functools.partial(_on_one_device, interpret=interpret)
    return per_device.run(run, q_BTNH, k_BSNH, v_BSNH, key_mask)


def _on_one_device(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, key_mask: jax.Array | None, *, interpret: bool
) -> jax.Array:
    q_BTD, k_BSD, v_BSD = (x.reshape(*x.shape[:2], -1) for x in (q_BTNH, k_BSNH, v_BSNH))
    bias_B1S = None if key_mask is None else jnp.where(key_mask, 0.0, _HIDDEN)[:, None].astype(jnp.float32)
    return _attend(q_BTNH.shape[3], interpret, q_BTD, k_BSD, v_BSD, bias_B1S).reshape(q_BTNH.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    size: int, interpret: bool, q_BTD: jax.Array, k_BSD: jax.Array, v_BSD: jax.Array, bias_B1S: Any
) -> jax.Array:
    inputs = [q_BTD, k_BSD, v_BSD]
    (out_BTD,) = _call(_forward_kernel, size, inputs, bias_B1S, [q_BTD], 2, _FORWARD_CYCLES, interpret)
    return out_BTD


def _forward(
    size: int, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, bias: Any
) -> tuple[Any, Any]:
    return _attend(size, interpret, q, k, v, bias), (q, k, v, bias)


def _backward(size: int, interpret: bool, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    *inputs, bias = kept
    grads = _call(_backward_kernel, size, [*inputs, d_out], bias, inputs, 5, _BACKWARD_CYCLES, interpret)
    return *grads, None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Any,
    size: int,
    inputs: Sequence[jax.Array],
    bias: jax.Array | None,
    outs: Sequence[jax.Array],
    products: int,
    cycles: tuple[int, float],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel for every example and block of lanes; results have the shapes of `outs`.

    Args:
      kernel: a function of (head size, whether there is a bias, *references).
      size: head size.
      inputs: [B, T or S, D]; queries first, keys second.
      bias: [B, 1, S] float32, added to the scores.
      outs: arrays with the shapes and dtypes of the results.
      products: matrix products per head, of T x S x H multiply-adds each.
      cycles: estimated cycles of a head: a constant, and for each 8 x 128 scores.
      interpret: whether to run it with XLA's operations.
    """
    (batch, queries, width), keys = inputs[0].shape, inputs[1].shape[1]
    lanes = block_lanes(width, size, queries, keys)

    def block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, x.shape[1], lanes), lambda example, part: (example, 0, part))

    specs = [block(x) for x in inputs]
    if bias is not None:
        specs.append(pl.BlockSpec((1, 1, keys), lambda example, part: (example, 0, 0)))
    heads = batch * width // size / (2 if per_device.target().device_kind in _TWO_CORES else 1)
    vectors = math.ceil(queries / SUBLANES) * math.ceil(keys / LANES)
    tiles = sum(high - low for low, high, _, _ in _heads(lanes, size)) / LANES * size / lanes
    return pl.pallas_call(
        functools.partial(kernel, size, bias is not None),
        grid=(batch, width // lanes),
        in_specs=specs,
        out_specs=[block(x) for x in outs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * queries * keys * width,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outs)),
            transcendentals=batch * width // size * queries * keys,
        ),
        metadata={"estimated_cycles": str(int(heads * (cycles[0] + cycles[1] * vectors * (1 + tiles) / 2)))},
        name=kernel.__name__.strip("_"),
        interpret=interpret,
    )(*inputs, *([] if bias is None else [bias]))


def block_lanes(width: int, size: int, queries: int, keys: int) -> int:
    """Lanes of a grid step: whole heads on whole tiles, as many as memory and code size allow."""
    least = math.lcm(size, LANES)
    longest = max(queries, keys)

    def fits(lanes: int) -> bool:
        few = queries * keys <= _FEW_SCORES or lanes // size <= _MOST_HEADS
        return few and 2 * longest * lanes <= _BLOCK_BYTES

    return max((n for n in range(least, width + 1, least) if width % n == 0 and fits(n)), default=least)


def _heads(lanes: int, size: int) -> list[tuple[int, int, int, int]]:
    """For each head in a block: the tiles that hold it, [low, high), and its lanes within them, [first, end)."""
    found = []
    for first in range(0, lanes, size):
        low, high = first // LANES * LANES, math.ceil((first + size) / LANES) * LANES
        found.append((low, high, first - low, first - low + size))
    return found


def _forward_kernel(size: int, biased: bool, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
    bias, (out_ref,) = (refs[0][0], refs[1:]) if biased else (None, refs)
    for low, high, first, end in _heads(q_ref.shape[2], size):
        own = _own(high - low, first, end)
        q, k, v = (ref[0, :, low:high] for ref in (q_ref, k_ref, v_ref))
        weights = _weights(_select(own, q), k, bias, size)
        out = _dot(weights.astype(v.dtype), v, 1, 0) * (1.0 / weights.sum(-1, keepdims=True))
        _store(out_ref, out, low, high, own, first)


def _backward_kernel(
    size: int, biased: bool, q_ref: Any, k_ref: Any, v_ref: Any, d_out_ref: Any, *refs: Any
) -> None:
    bias, outs = (refs[0][0], refs[1:]) if biased else (None, refs)
    dq_ref, dk_ref, dv_ref = outs
    scale = size**-0.5
    for low, high, first, end in _heads(q_ref.shape[2], size):
        own = _own(high - low, first, end)
        q, k, v, d_out = (ref[0, :, low:high] for ref in (q_ref, k_ref, v_ref, d_out_ref))
        q, d_out = _select(own, q), _select(own, d_out)
        weights = _weights(q, k, bias, size)
        weights = weights * (1.0 / weights.sum(-1, keepdims=True))
        d_weights = _dot(d_out, v, 1, 1)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        _store(dq_ref, _dot(d_scores, k, 1, 0) * scale, low, high, own, first)
        _store(dk_ref, _dot(d_scores, q, 0, 0) * scale, low, high, own, first)
        _store(dv_ref, _dot(weights, d_out, 0, 0), low, high, own, first)


def _weights(q_TL: jax.Array, k_SL: jax.Array, bias_1S: jax.Array | None, size: int) -> jax.Array:
    """exp(q k^T / sqrt(H) - largest) [T, S] float32, not yet divided by its sums."""
    scores_TS = _dot(q_TL, k_SL, 1, 1)
    if bias_1S is not None:
        scores_TS = scores_TS + bias_1S
    return jnp.exp2((scores_TS - scores_TS.max(-1, keepdims=True)) * (size**-0.5 * math.log2(math.e)))


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _own(lanes: int, first: int, end: int) -> jax.Array | None:
    """[1, lanes] whether a lane belongs to the head; None if all lanes do."""
    if (first, end) == (0, lanes):
        return None
    lane = lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    return (lane >= first) & (lane < end)


def _select(own: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if own is None else jnp.where(own, x, jnp.zeros_like(x))


def _store(ref: Any, x: jax.Array, low: int, high: int, own: jax.Array | None, first: int) -> None:
    """Writes a head's lanes. Earlier heads have written the lanes before them; later heads write those after."""
    x = x.astype(ref.dtype)
    if own is not None and first:
        x = jnp.where(own, x, ref[0, :, low:high])
    ref[0, :, low:high] = x

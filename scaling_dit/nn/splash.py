"""Splash attention, jax's Pallas kernel for TPUs, at any length and head size: padding, blocks, masks and sharding.

The kernel never writes the [T, S] scores to memory. It needs lengths in multiples of its blocks, and blocks in
multiples of 128. A mask is a pair of segment ids: a query sees the keys of its own segment. Shape suffixes as in
attention.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from scaling_dit.nn import per_device
from scaling_dit.nn.layers import ATTENTION
from scaling_dit.nn.per_device import LANES

# Largest block of queries and keys by device kind: (forward, backward). The backward pass holds four blocks of scores
# in float32, the forward pass two, and a core's scoped VMEM has 16 MiB by default.
_LARGEST_BLOCK: dict[str, tuple[int, int]] = {
    "TPU v4": (512, 512),
    "TPU v5 lite": (1024, 512),
    "TPU v5": (1024, 512),
    "TPU v6 lite": (1024, 512),
}
_UNKNOWN_DEVICE = (512, 512)
# The most blocks of keys for which the fused backward pass is used.
_FUSED_UP_TO = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work.

    Attributes:
      queries: padded length of the queries.
      keys: padded length of the keys.
      forward: lengths of a block of queries and of a block of keys in the forward pass.
      backward: the same in the backward pass.
    """

    queries: int
    keys: int
    forward: tuple[int, int]
    backward: tuple[int, int]


def blocks(queries: int, keys: int, device_kind: str) -> Blocks:
    """The largest blocks that the device allows, with the least padding of lengths to a multiple of them.

    The backward pass has the lower limit: for it a length is cut into the fewest equal blocks that are multiples of
    128. The forward pass joins neighbouring blocks as long as they fit.
    """
    most_forward, most_backward = _LARGEST_BLOCK.get(device_kind, _UNKNOWN_DEVICE)
    padded, forward, backward = [], [], []
    for length in (queries, keys):
        parts = math.ceil(length / most_backward)
        block = LANES * math.ceil(length / (parts * LANES))
        joined = max(n for n in range(1, parts + 1) if parts % n == 0 and n * block <= most_forward)
        padded.append(parts * block)
        forward.append(joined * block)
        backward.append(block)
    return Blocks(padded[0], padded[1], (forward[0], forward[1]), (backward[0], backward[1]))


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H]. Arguments as `attention.attention`; no mask row may hide all keys.

    On a mesh each device runs the kernel on its examples, its heads and its part of the queries; keys and values are
    gathered over the axis that splits lengths. `interpret` runs it on any device, slowly, for tests.
    """
    _, device_kind = per_device.target()
    run = functools.partial(_on_one_device, device_kind=device_kind, interpret=interpret)
    return per_device.run(run, q_BTNH, k_BSKH, v_BSKH, key_mask)


def _on_one_device(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_mask: jax.Array | None,
    *,
    device_kind: str,
    interpret: bool,
) -> jax.Array:
    """Pads lengths to blocks, moves heads before lengths, and runs the kernel on each example."""
    queries, keys, heads = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2]
    cut = blocks(queries, keys, device_kind)
    segments = None
    # Hidden keys and padding are segment 0, all other keys and the queries segment 1.
    if key_mask is not None or cut.keys != keys:
        shown = jnp.ones((q_BTNH.shape[0], keys), bool) if key_mask is None else key_mask
        of_keys = jnp.pad(shown.astype(jnp.int32), ((0, 0), (0, cut.keys - keys)))
        segments = kernels.SegmentIds(q=jnp.ones((cut.queries,), jnp.int32), kv=of_keys)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.FullMask((cut.queries, cut.keys))] * heads),
        block_sizes=_block_sizes(cut),
        head_shards=1,
        q_seq_shards=1,
        # Names the softmax's log-sums for the remat policy too; else the backward pass runs the kernel again.
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    scale = q_BTNH.shape[-1] ** -0.5
    q_BNTH = rearrange(_pad(q_BTNH * scale, cut.queries), "b t n h -> b n t h")
    k_BKSH, v_BKSH = (rearrange(_pad(x, cut.keys), "b s k h -> b k s h") for x in (k_BSKH, v_BSKH))
    if segments is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        per_example = kernels.SegmentIds(q=None, kv=0)  # type: ignore[arg-type]
        out_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, per_example))(q_BNTH, k_BKSH, v_BKSH, segments)
    return rearrange(out_BNTH[:, :, :queries], "b n t h -> b t n h")


def _block_sizes(cut: Blocks) -> kernels.BlockSizes:
    # The fused backward pass sums one dq for each block of keys, outside the kernel: good for few blocks.
    (q_forward, k_forward), (q_backward, k_backward) = cut.forward, cut.backward
    fused = cut.keys // k_backward <= _FUSED_UP_TO
    return kernels.BlockSizes(
        block_q=q_forward,
        block_kv=k_forward,
        block_q_dkv=q_backward,
        block_kv_dkv=k_backward,
        block_q_dq=None if fused else q_backward,
        block_kv_dq=None if fused else k_backward,
        use_fused_bwd_kernel=fused,
    )


def _pad(x_BTNH: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x_BTNH, ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, 0)))

"""Layers that several backbones share. Norms, softmax and time embeddings are float32; products run in `dtype`.

Logical axes: parameters "embed", "heads", "mlp", "text", "layers", "norm"; activations "batch", "length", "act_embed",
"act_heads", "act_mlp". `parallel/rules.py` maps them to mesh axes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.scanning import scan_layers

_DTYPES = ("float32", "bfloat16", "float16")

Initializer = Callable[..., jax.Array]
Axes = tuple[str | None, ...]
NORMAL_002 = nn.initializers.normal(0.02)
# Names for the remat policy: the output of attention, and the softmax weights if XLA computes them.
ATTENTION = "attention"
WEIGHTS = "attention_weights"


def _from_input(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function in float32 that keeps only its input, in the input's dtype, for the backward pass.

    Without this GELU would keep several float32 arrays of an MLP's whole width.
    """

    def value(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    activation = jax.custom_vjp(value)
    activation.defvjp(lambda x: (value(x), x), lambda x, gradient: jax.vjp(value, x)[1](gradient))
    return activation


def _gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) by erf. `jax.nn.gelu` uses erfc, whose branches cost a TPU three times the product before it."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.float32(0.5**0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _from_input(_gelu),
    "gelu_tanh": _from_input(functools.partial(jax.nn.gelu, approximate=True)),
    # The activation of OpenAI's CLIP.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": _from_input(jax.nn.silu),
}
_REMAT_POLICIES: dict[str, Any] = {
    # Keeps only a block's inputs.
    "full": None,
    # Keeps products with parameters; recomputes attention.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Keeps the output of attention; recomputes the rest.
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    # Keeps every product, and attention's weights and output; recomputes norms and activations.
    "products": jax.checkpoint_policies.save_from_both_policies(
        lambda primitive, *args, **options: (
            primitive is jax.lax.conv_general_dilated_p
            or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **options)
        ),
        jax.checkpoint_policies.save_only_these_names(ATTENTION, WEIGHTS),
    ),
    # As "dots", but keeps the products in the host's memory between the passes.
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def timestep_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding [B, dim] float32 of timesteps [B], which may be fractional.

    half = dim // 2, frequency_i = 10000^(-i/half), features [cos, sin]; an odd dim gets one zero at the end. DiT,
    PixArt, U-ViT and Large-DiT use this embedding.
    """
    half = dim // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, dim % 2)))


def sincos_2d(height: int, width: int, dim: int, *, base: int | None = None, shift: int = 0) -> np.ndarray:
    """Fixed 2-D positions [height * width, dim] float32, row-major, amplitude 1.

    The first half of the features encodes the column, the second the row, each as [sin, cos] (DiT `models.py`). With
    `base` both run over [0, base) for any sides: row i has the position i * base / height (PixArt-alpha). `shift`
    gives the positions of the shift-th further grid beside this one: `shift * width` is added to every column.

    Raises:
      UserError: dim is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"2-D sin-cos positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    halves = []
    for coordinate, side in ((columns + shift * width, width), (rows, height)):
        scale = 1 if base is None else base / side
        angles = coordinate.reshape(-1, 1) * scale * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)(W/p), p*p*C], patches row-major, features in (p, p, C) order."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: [B, (H/p)(W/p), p*p*C] -> [B, H, W, C] for H = height, W = width."""
    grid = {"h": height // patch, "w": width // patch}
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", **grid, p=patch, q=patch)


def torch_uniform(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for weight and bias of a convolution."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nn.Module):
    """Linear map of the last axis: [..., in] -> [..., *features], with logical axes on its kernel [in, *features].

    With several feature axes, parts that are split afterwards (q, k, v) have an axis of their own, so the split needs
    no communication when the last axis is sharded. `apart` computes these parts one by one. That saves a TPU the copies
    that slice the parts and join their gradients, and pays if each part is wide, as in a gated MLP. Its kernel is
    [parts, in, features], so a part is contiguous in memory.

    Attributes:
      features: sizes of the new axes.
      axes: logical axes of the kernel.
      apart: whether to return a list with one product for each entry of the first feature axis.
    """

    features: int | tuple[int, ...]
    axes: Axes
    apart: bool = False
    use_bias: bool = True
    kernel_init: Initializer = NORMAL_002
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        shape, kernel_init = (x.shape[-1], *features), self.kernel_init
        if self.apart:
            shape, kernel_init = (features[0], x.shape[-1], *features[1:]), _parts_first(kernel_init)
        init = nn.with_logical_partitioning(kernel_init, self.axes)
        stored = self.param("kernel", init, shape, jnp.dtype(self.param_dtype))
        dtype = jnp.dtype(self.dtype)
        kernel = gathered(jnp.asarray(stored, dtype), self.axes)
        bias: jax.Array | None = None
        if self.use_bias:
            init = nn.with_logical_partitioning(self.bias_init, (None,) * len(features))
            bias = jnp.asarray(self.param("bias", init, features, jnp.dtype(self.param_dtype)), dtype)

        def product(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
            y = jax.lax.dot_general(jnp.asarray(x, dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())))
            return y if bias is None else y + bias

        if not self.apart:
            return product(kernel, bias)
        return [product(kernel[i], None if bias is None else bias[i]) for i in range(features[0])]


def _parts_first(init: Initializer) -> Initializer:
    """An initializer for [parts, in, ...] with the values that `init` gives a kernel [in, parts, ...]."""

    def values(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.moveaxis(init(key, (shape[1], shape[0], *shape[2:]), dtype), 1, 0)

    return values


def gathered(kernel: jax.Array, axes: Axes) -> jax.Array:
    """A kernel in the sharding that its product reads: whole along "embed" and "text", unchanged along other axes.

    Only storage splits "embed" and "text". Without the constraint XLA may split the product along its summed axis, and
    then sends examples to the wrong devices on meshes that split data, fsdp and tensor at once (jax 0.10.2 exchanged
    rows 1 and 2 of a batch of 4).
    """
    return constrain(kernel, *(None if axis in ("embed", "text") else axis for axis in axes))


def conv3x3(
    name: str,
    in_channels: int,
    features: int,
    *,
    axes: Axes = (None, None, None, None),
    stride: int = 1,
    padding: Any = 1,
    bias: bool = True,
    kernel_init: Initializer | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> nn.Conv:
    """3x3 convolution with zero padding: [B, H, W, in_channels] -> [B, H/stride, W/stride, features]; PyTorch's init.

    Args:
      name: name of its parameters.
      in_channels: channels of the input.
      features: channels of the output.
      axes: logical axes of the kernel [3, 3, in, out].
      stride: 2 halves height and width.
      padding: rows and columns of zeros on each side, or ((above, below), (left, right)).
      bias: whether it has one.
      kernel_init: initializer of the kernel; PyTorch's by default.
      dtype: type of the products and the output.
      param_dtype: type of kernel and bias.
    """
    init = torch_uniform(9 * in_channels)

    def convolve(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(x, gathered(kernel, axes), *args, **options)

    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        conv_general_dilated=convolve,
        padding=padding,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(kernel_init or init, axes),
        bias_init=nn.with_logical_partitioning(init, (None,)),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        name=name,
    )


def layer_norm(
    name: str, *, epsilon: float, affine: bool = True, param_dtype: Any = jnp.float32
) -> nn.LayerNorm:
    """LayerNorm over the last axis, computed and returned in float32 for any input; `affine` adds scale and bias."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(param_dtype),
        use_scale=affine,
        use_bias=affine,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        # E[x^2] - E[x]^2 loses precision if a residual stream has a large mean.
        use_fast_variance=False,
        name=name,
    )


class Mlp(nn.Module):
    """Linear to `width`, activation, Linear back to the input's width: [..., D] -> [..., D].

    `out_init` initialises the second kernel; by default `kernel_init` does.
    """

    width: int
    activation: str = "gelu"
    kernel_init: Initializer = NORMAL_002
    out_init: Initializer | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features = x.shape[-1]
        x = Dense(self.width, ("embed", "mlp"), kernel_init=self.kernel_init, name="fc1", **types)(x)
        if x.ndim == 3:
            x = constrain(x, "batch", "length", "act_mlp")
        x = ACTIVATIONS[self.activation](x)
        out_init = self.out_init or self.kernel_init
        return Dense(features, ("mlp", "embed"), kernel_init=out_init, name="fc2", **types)(x)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Names the logical axes of an activation. Does nothing outside a mesh with axis rules.

    Raises:
      UserError: the axes would split a feature map over its height. XLA silently computes wrong convolutions of such a
        map when another mesh axis splits channels.
    """
    if x.ndim == 4 and "length" in axes and "act_heads" not in axes:
        raise UserError(
            f"an activation {x.shape} is named {axes}: only tokens [B, T, D] and heads [B, T, N, H] have an axis "
            "'length'; name a feature map ('batch', None, None, None)"
        )
    return nn.with_logical_constraint(x, axes)


def check_remat(remat: bool | str) -> str:
    """The policy that a `remat` field names; False and True stand for "none" and "full".

    Raises:
      UserError: the field names no policy.
    """
    # A flag gives "true" as text.
    name = {"false": "none", "true": "full"}.get(str(remat).lower(), str(remat))
    if name != "none" and name not in _REMAT_POLICIES:
        raise UserError(f"unknown remat policy {remat!r}; {nearest(str(remat), ['none', *_REMAT_POLICIES])}")
    return name


def rematerialised(block: type[nn.Module], remat: bool | str, *, scanned: bool = False) -> type[nn.Module]:
    """The module class with its activations recomputed in the backward pass by the policy `remat`; same outputs."""
    policy = check_remat(remat)
    if policy == "none":
        return block
    # In a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(block, policy=_REMAT_POLICIES[policy], prevent_cse=not scanned)


def stack(
    block: type[nn.Module],
    count: int,
    name: str,
    x: jax.Array,
    per_layer: Any,
    *broadcast: Any,
    remat: bool | str,
    scan: bool,
    last_first: bool = False,
    **fields: Any,
) -> tuple[jax.Array, Any]:
    """Runs `count` blocks in order inside a compact method: layer i is `x, out_i = block(x, in_i, *broadcast)`.

    Args:
      block: module class with the call (x, in_i, *broadcast) -> (x, out_i).
      count: number of layers.
      name: name of the parameters: `{name}_{i}`, or `name` with a leading layer axis ("layers") if scanned.
      x: the input of the first layer.
      per_layer: the in_i: a sequence, a stacked array if scanned, or None.
      broadcast: inputs of every layer.
      remat: "none", "full", "dots", "products", "attention" or "offload", see `_REMAT_POLICIES`.
      scan: whether to trace one block and scan it, so that compile time does not grow with depth.
      last_first: whether `per_layer` is in reverse order, the last layer's entry first.
      fields: fields of `block`.

    Returns:
      The last x, and the out_i: a list, or stacked if scanned.
    """
    block = rematerialised(block, remat, scanned=scan)
    if scan and count:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * len(broadcast)),
            length=count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = scanned(name=name, **fields)
        # `offload` keeps residuals in the host's memory, where only jax's own scan can stack them.
        if layers.is_initializing() or check_remat(remat) == "offload":
            turned = jax.tree.map(lambda a: a[::-1], per_layer) if last_first else per_layer
            return layers(x, turned, *broadcast)
        one = block(parent=None, **fields)

        def layer(params: Any, x: jax.Array, own: Any, all_: Any) -> tuple[jax.Array, Any]:
            return one.apply({"params": params}, x, own, *all_)

        params = trees.unbox(layers.variables["params"])
        # The scope that linen would give the module.
        with jax.named_scope(name):
            return scan_layers(layer, last_first, params, x, per_layer, broadcast)
    outputs: list[Any] = []
    inputs: Sequence[Any] = [None] * count if per_layer is None else per_layer
    for i in range(count):
        own = inputs[count - 1 - i if last_first else i]
        x, out = block(name=f"{name}_{i}", **fields)(x, own, *broadcast)
        outputs.append(out)
    return x, outputs


def parse_dtype(name: Any, field: str) -> jnp.dtype:
    """The dtype that a `dtype` or `param_dtype` field names.

    Raises:
      UserError: the field names no dtype of float32, bfloat16, float16.
    """
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        raise UserError(f"{field}={name!r} is not a floating type; {nearest(str(name), _DTYPES)}")
    return dtype

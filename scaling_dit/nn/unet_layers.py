"""Layers of the UNets: residual blocks, down- and upsampling, transformers on feature maps, and the U itself.

Feature maps are [B, H, W, C] in `dtype`; GroupNorm, LayerNorm, softmax and the time embedding are float32. The mesh
splits only the batch of an activation. XLA computes wrong values for a convolution split over height and channels at
once, so nothing here may split height, width or the tokens made of them.

Every linear map and convolution is initialised uniform in +-1/sqrt(fan_in), weight and bias, and norms as the identity.
These are PyTorch's defaults, from which diffusers trains its UNets. Nothing starts at zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn

from scaling_dit.errors import UserError, nearest
from scaling_dit.nn import layers
from scaling_dit.nn.attention import CrossAttention, SelfAttention
from scaling_dit.nn.layers import ACTIVATIONS, Dense, conv3x3, layer_norm, torch_uniform

# Groups of every GroupNorm.
GROUPS = 32
# Epsilon of every norm except a transformer's GroupNorm, which has 1e-6.
EPSILON = 1e-5
CONV_AXES = (None, None, "embed", "mlp")

Map = Callable[..., jax.Array]


class ResBlock(nn.Module):
    """Residual block: norm, activation, 3x3 convolution, time, norm, activation, 3x3 convolution.

    (x [B, H, W, C], time [B, E]) -> [B, H', W', features]. diffusers' ResnetBlock2D, with a 1x1 shortcut if the
    channels change.

    Attributes:
      scale_shift: whether time scales and shifts after the second norm; else it is added before that norm.
      resample: "down" (mean of 2x2) or "up" (nearest neighbour) before the first convolution, or None.
    """

    features: int
    activation: str = "silu"
    scale_shift: bool = False
    resample: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        activate = ACTIVATIONS[self.activation]
        h = activate(group_norm("norm1", param_dtype=self.param_dtype)(x))
        if self.resample is not None:
            h, x = (_RESAMPLE[self.resample](part) for part in (h, x))
        h = conv3x3("conv1", x.shape[-1], self.features, axes=CONV_AXES, **types)(h)

        norm2 = group_norm("norm2", param_dtype=self.param_dtype)
        parts = (2, self.features) if self.scale_shift else self.features
        time_axes = ("embed", None, "mlp") if self.scale_shift else ("embed", "mlp")
        time = linear("time_proj", time.shape[-1], parts, time_axes, **types)(activate(time))[:, None, None]
        h = norm2(h) * (1 + time[..., 0, :]) + time[..., 1, :] if self.scale_shift else norm2(h + time)
        h = conv3x3("conv2", self.features, self.features, axes=CONV_AXES, **types)(activate(h))
        if x.shape[-1] != self.features:
            x = linear("shortcut", x.shape[-1], self.features, ("embed", "mlp"), **types)(x)
        return whole(x.astype(h.dtype) + h)


class Upsample(nn.Module):
    """Nearest neighbour to twice the height and width, then a 3x3 convolution: [B, H, W, C] -> [B, 2H, 2W, C]."""

    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return whole(conv3x3("conv", x.shape[-1], x.shape[-1], axes=CONV_AXES, **types)(_double(x)))


class Transformer2D(nn.Module):
    """`depth` transformer blocks on the pixels of a feature map, with one residual connection around all of them.

    (x [B, H, W, C], text [B, L, D], text_mask [B, L]) -> [B, H, W, C]. diffusers' Transformer2DModel with linear
    projections.
    """

    depth: int
    head_dim: int
    attention: str = "auto"
    remat: bool | str = "none"
    scan_layers: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, text_mask: jax.Array | None) -> jax.Array:
        _, height, width, channels = x.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = flatten(group_norm("norm", epsilon=1e-6, param_dtype=self.param_dtype)(x))
        tokens = linear("proj_in", channels, channels, ("embed", "mlp"), **types)(tokens)
        tokens, _ = layers.stack(
            TransformerBlock,
            self.depth,
            "blocks",
            tokens,
            None,
            text,
            text_mask,
            remat=self.remat,
            scan=self.scan_layers,
            heads=channels // self.head_dim,
            attention=self.attention,
            **types,
        )
        tokens = linear("proj_out", channels, channels, ("mlp", "embed"), **types)(tokens)
        return whole(x + rearrange(tokens, "b (h w) c -> b h w c", h=height, w=width))


class TransformerBlock(nn.Module):
    """Pre-norm block of attention among pixels, attention to the text, and GEGLU: (x, _, text, mask) -> (x, None)."""

    heads: int
    attention: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, _: None, text: jax.Array, text_mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend: dict[str, Any] = {
            "heads": self.heads,
            "implementation": self.attention,
            "kernel_init": torch_kernel,
            "bias_init": torch_uniform(width),
            "length_axis": None,
            **types,
        }
        norm1, norm2, norm3 = (
            layer_norm(f"norm{i}", epsilon=EPSILON, param_dtype=self.param_dtype) for i in (1, 2, 3)
        )
        x += SelfAttention(name="attn", **attend)(norm1(x))
        x += CrossAttention(name="cross_attn", **attend)(norm2(x), text, text_mask)
        fc1 = linear("fc1", width, (2, 4 * width), (None, "embed", "mlp"), apart=True, **types)
        value, gate = (layers.constrain(part, "batch", None, "act_mlp") for part in fc1(norm3(x)))
        x += linear("fc2", 4 * width, width, ("mlp", "embed"), **types)(value * ACTIVATIONS["gelu"](gate))
        return layers.constrain(x, "batch", None, "act_embed"), None


class Embedding(nn.Module):
    """Two linear maps with an activation between, float32: [B, E] -> [B, features]. diffusers' TimestepEmbedding."""

    features: int
    activation: str = "silu"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linear("fc1", x.shape[-1], self.features, ("embed", "mlp"), param_dtype=self.param_dtype)(x)
        x = ACTIVATIONS[self.activation](x)
        return linear("fc2", self.features, self.features, ("mlp", "embed"), param_dtype=self.param_dtype)(x)


def u_shape(
    x: jax.Array, widths: Sequence[int], res_blocks: int, *, res: Map, attend: Map, down: Map, up: Map
) -> jax.Array:
    """The U: the output of each block on the way down is concatenated to the input of a block on the way up.

    Args:
      x: [B, H, W, widths[0]].
      widths: channels of each level, the finest first; each level halves height and width.
      res_blocks: residual blocks of a level on the way down; on the way up a level has one more.
      res: (name, x, width) -> x with `width` channels, by the residual block of that name.
      attend: (name, x, level) -> x after attention; level is None in the middle.
      down: (name, x) -> x with half the height and width.
      up: (name, x) -> x with twice the height and width.

    Returns:
      [B, H, W, widths[0]].
    """
    skips = [x]
    last = len(widths) - 1
    for level, width in enumerate(widths):
        for i in range(res_blocks):
            x = res(f"down_{level}_res_{i}", x, width)
            x = attend(f"down_{level}_attn_{i}", x, level)
            skips.append(x)
        if level < last:
            x = down(f"down_{level}_sample", x)
            skips.append(x)
    x = res("mid_res_0", x, widths[-1])
    x = attend("mid_attn_0", x, None)
    x = res("mid_res_1", x, widths[-1])
    for level in reversed(range(len(widths))):
        for i in range(res_blocks + 1):
            x = res(f"up_{level}_res_{i}", jnp.concatenate([x, skips.pop()], axis=-1), widths[level])
            x = attend(f"up_{level}_attn_{i}", x, level)
        if level:
            x = up(f"up_{level}_sample", x)
    return x


def head(x: jax.Array, features: int, activation: str, param_dtype: Any) -> jax.Array:
    """Norm, activation and 3x3 convolution in float32: cheap, and its rounding error would go to the prediction."""
    x = ACTIVATIONS[activation](group_norm("norm_out", param_dtype=param_dtype)(x))
    axes = (None, None, "embed", None)
    return conv3x3("conv_out", x.shape[-1], features, axes=axes, param_dtype=param_dtype)(x)


def group_norm(
    name: str, *, epsilon: float = EPSILON, groups: int = GROUPS, param_dtype: Any = jnp.float32
) -> nn.GroupNorm:
    """GroupNorm, computed and returned in float32 for any input."""
    return nn.GroupNorm(
        num_groups=groups,
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(param_dtype),
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        # As in layers.layer_norm.
        use_fast_variance=False,
        name=name,
    )


def linear(
    name: str | None, width: int, features: int | tuple[int, ...], axes: layers.Axes, **types: Any
) -> Dense:
    """`Dense` on inputs of `width` channels, with PyTorch's initial values."""
    init = torch_uniform(width)
    return Dense(features, axes, kernel_init=init, bias_init=init, name=name, **types)


def torch_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """PyTorch's initial values for a linear map's kernel [in, ...]."""
    return torch_uniform(shape[0])(key, shape, dtype)


def flatten(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H * W, C], row-major."""
    return rearrange(x, "b h w c -> b (h w) c")


def whole(x: jax.Array) -> jax.Array:
    """Keeps height, width and channels of a feature map on one device."""
    return layers.constrain(x, "batch", None, None, None)


def _double(x: jax.Array) -> jax.Array:
    return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)


def _halve(x: jax.Array) -> jax.Array:
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


_RESAMPLE: dict[str, Map] = {"up": _double, "down": _halve}


def size_fields(size: str | None, sizes: Mapping[str, Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    """The fields of a UNet: the row of `sizes` that `size` names, overridden by explicit fields.

    Raises:
      UserError: the size is unknown, a field is missing from both, or a number is too small or no integer.
    """
    if size is not None and size not in sizes:
        raise UserError(f"unknown size {size!r}; {nearest(size, sizes)}")
    row = dict(sizes[size]) if size is not None else {}
    row |= {name: value for name, value in fields.items() if value is not None}
    missing = [name for name in fields if name not in row]
    if missing:
        raise UserError(f"{missing[0]} must be given where size is None")
    for name in ("channels", "res_blocks", "head_dim"):
        check_integers(name, (row[name],), least=1)
    check_integers("channel_mult", row["channel_mult"], least=1)
    return row


def level_widths(
    channels: int, channel_mult: Sequence[int], *, head_dim: int, attended: Sequence[int]
) -> tuple[int, ...]:
    """Channels of each level, checked for division by GroupNorm and, on the `attended` levels, by heads.

    Raises:
      UserError: GroupNorm's groups or the head size do not divide a width.
    """
    widths = tuple(channels * factor for factor in channel_mult)
    for level, width in enumerate(widths):
        if width % GROUPS:
            raise UserError(f"level {level} has {width} channels; GroupNorm needs a multiple of {GROUPS}")
        if level in attended and width % head_dim:
            raise UserError(f"level {level} has {width} channels, no multiple of head_dim={head_dim}")
    return widths


# Of channels and of layers; far beyond any that was trained.
_MOST = 2**17


def check_integers(name: str, values: Any, least: int) -> None:
    """Raises a UserError unless `values` is a tuple or list of one or more integers that are at least `least`."""
    if isinstance(values, tuple | list) and values:
        if all(isinstance(value, int) and value >= least for value in values):
            if max(values) > _MOST:
                raise UserError(f"{name} must be integers of at most {_MOST}, got {values!r}")
            return
        values = values[0] if len(values) == 1 else values
    elif isinstance(values, int):
        raise UserError(f"{name} must have an integer for each level, such as ({values},), got {values}")
    raise UserError(f"{name} must be integers of at least {least}, got {values!r}")


def check_halvings(backbone: str, latents: Sequence[int], levels: int) -> None:
    """Checks that latents [B, H, W, C] can be halved from level to level.

    Raises:
      UserError: height or width is no multiple of 2^(levels - 1).
    """
    step = 2 ** (levels - 1)
    if latents[1] % step or latents[2] % step:
        raise UserError(
            f"{backbone} of {levels} levels needs height and width that are multiples of {step}, "
            f"got {tuple(latents[1:3])}"
        )

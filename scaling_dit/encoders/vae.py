"""The autoencoder of Stable Diffusion and SDXL as a codec: images to latents with an eighth of their sides, and back.

The architecture is diffusers' `AutoencoderKL` (arXiv 2112.10752, appendix G): convolutions, one attention layer over
all pixels in the middle, and the moments of a normal distribution for each latent. A run keeps it frozen. It encodes
images during training, or once in `prepare`, and decodes generated latents.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.encoders import vae_weights
from scaling_dit.encoders.codec import Pixels
from scaling_dit.encoders.vae_config import ARCHITECTURES, CLASS_NAME, Architecture, read_architecture
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.attention import SelfAttention
from scaling_dit.nn.layers import conv3x3, parse_dtype
from scaling_dit.nn.unet_layers import CONV_AXES, Upsample, flatten, group_norm, linear, torch_kernel, whole
from scaling_dit.weights import places

# Epsilon of every GroupNorm.
EPSILON = 1e-6
LOGVAR_RANGE = -30.0, 20.0
# Tiles overlap by 1/OVERLAP of their side, as in diffusers.
OVERLAP = 4
COLOURS = 3


class ResBlock(nn.Module):
    """Residual block without time: norm, SiLU, 3x3 convolution, twice: [B, H, W, C] -> [B, H, W, features]."""

    features: int
    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in (1, 2):
            h = jax.nn.silu(group_norm(f"norm{i}", epsilon=EPSILON, groups=self.groups)(h))
            h = conv3x3(f"conv{i}", h.shape[-1], self.features, axes=CONV_AXES, dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            x = linear("shortcut", x.shape[-1], self.features, ("embed", "mlp"), dtype=self.dtype)(x)
        return whole(x.astype(h.dtype) + h)


class PixelAttention(nn.Module):
    """One head of attention over all pixels, with a residual: [B, H, W, C] -> [B, H, W, C]."""

    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, _ = x.shape
        tokens = flatten(group_norm("norm", epsilon=EPSILON, groups=self.groups)(x))
        attend = SelfAttention(
            heads=1,
            qkv_bias=True,
            # Fused kernels do not support a head this wide.
            implementation="xla",
            kernel_init=torch_kernel,
            length_axis=None,
            dtype=self.dtype,
            name="attn",
        )
        return whole(x + rearrange(attend(tokens), "b (h w) c -> b h w c", h=height, w=width))


class Middle(nn.Module):
    """Residual block, attention (unless the architecture has none), residual block: [B, H, W, C] -> the same shape."""

    architecture: Architecture
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups, width = self.architecture.groups, x.shape[-1]
        x = ResBlock(width, groups, self.dtype, name="res_0")(x)
        if self.architecture.mid_attention:
            x = PixelAttention(groups, self.dtype, name="attn")(x)
        return ResBlock(width, groups, self.dtype, name="res_1")(x)


class Encoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> [B, h, w, 2 * latent_channels], float32."""

    architecture: Architecture
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.architecture
        x = conv3x3("conv_in", COLOURS, shape.widths[0], axes=(None, None, None, "mlp"), dtype=self.dtype)(x)
        for level, width in enumerate(shape.widths):
            for i in range(shape.res_blocks):
                x = ResBlock(width, shape.groups, self.dtype, name=f"down_{level}_res_{i}")(x)
            if level < len(shape.widths) - 1:
                # The model was trained with zeros on two sides only.
                below_and_right: Any = ((0, 1), (0, 1))
                x = conv3x3(
                    f"down_{level}_sample", width, width,
                    axes=CONV_AXES, stride=2, padding=below_and_right, dtype=self.dtype,
                )(x)  # fmt: skip
        x = Middle(shape, self.dtype, name="mid")(x)
        return _last(x, 2 * shape.latent_channels, shape.groups)


class Decoder(nn.Module):
    """[B, h, w, latent_channels] -> images [B, H, W, 3], about [-1, 1], float32."""

    architecture: Architecture
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.architecture
        widths = shape.widths[::-1]
        x = conv3x3("conv_in", x.shape[-1], widths[0], axes=(None, None, None, "mlp"), dtype=self.dtype)(x)
        x = Middle(shape, self.dtype, name="mid")(x)
        for level, width in enumerate(widths):
            for i in range(shape.res_blocks + 1):
                x = ResBlock(width, shape.groups, self.dtype, name=f"up_{level}_res_{i}")(x)
            if level < len(widths) - 1:
                x = Upsample(self.dtype, name=f"up_{level}_sample")(x)
        return _last(x, COLOURS, shape.groups)


def _last(x: jax.Array, features: int, groups: int) -> jax.Array:
    """Norm, SiLU and 3x3 convolution in float32: cheap, and its rounding error would go to the result."""
    x = jax.nn.silu(group_norm("norm_out", epsilon=EPSILON, groups=groups)(x))
    return conv3x3("conv_out", x.shape[-1], features, axes=(None, None, "embed", None))(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions between them, as diffusers' class of the same name.

    Norms, softmax and the last convolutions run in float32, other products in `dtype`. Initial values are PyTorch's.
    """

    architecture: Architecture
    dtype: str = "float32"

    def setup(self) -> None:
        shape = self.architecture
        self.encoder = Encoder(shape, self.dtype)
        self.decoder = Decoder(shape, self.dtype)
        moments, latent = 2 * shape.latent_channels, shape.latent_channels
        if shape.quant_conv:
            self.quant_conv = linear(None, moments, moments, (None, None))
        if shape.post_quant_conv:
            self.post_quant_conv = linear(None, latent, latent, (None, None))

    def __call__(self, images: jax.Array) -> jax.Array:
        """The decoded means of images [B, H, W, 3]; touches every parameter."""
        return self.decode(self.encode(images)[..., : self.architecture.latent_channels])

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> moments float32 [B, h, w, 2C]: means, then log variances, clipped."""
        moments = self.encoder(images)
        if self.architecture.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=-1)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C], not scaled -> images float32 [B, H, W, 3], about [-1, 1]."""
        if self.architecture.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """`AutoencoderKL` as a run's codec.

    Attributes:
      size: "sdxl" or "sd", which differ in the scale of latents. A `config.json` beside `weights` takes precedence.
      weights: a folder, file or `hub:` place of pretrained weights (`weights/places.py`); "random" initialises them
        from the run's seed; "" for none, which is enough to count and to plan.
      dtype: type of the products, float32 or bfloat16.
      tile: side in latent pixels of the tiles that are decoded in sequence to bound memory; 0 decodes whole images.

    Raises:
      UserError: an unknown size or dtype, or a tile that is too small.
    """

    size: str = "sdxl"
    weights: str = ""
    dtype: str = "float32"
    tile: int = 0

    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.size not in ARCHITECTURES:
            raise UserError(f"codec.size is {self.size!r}; {nearest(self.size, ARCHITECTURES)}")
        if parse_dtype(self.dtype, "codec.dtype") not in (jnp.float32, jnp.bfloat16):
            raise UserError(f"codec.dtype is {self.dtype!r}; it must be float32 or bfloat16")
        if self.tile and self.tile < 2 * OVERLAP:
            raise UserError(
                f"codec.tile is {self.tile}; it must be at least {2 * OVERLAP}, or 0 for whole images"
            )

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The architecture in the weights' `config.json`, else the one that `size` names."""
        if not places.is_place(self.weights):
            return ARCHITECTURES[self.size]
        config = places.read_config(self.weights, **_PLACE)
        return ARCHITECTURES[self.size] if config is None else read_architecture(config, self.weights)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.architecture.latent_channels

    @property
    def module(self) -> AutoencoderKL:
        """The linen module of this architecture."""
        return AutoencoderKL(self.architecture, self.dtype)

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, channels) of a latent.

        Raises:
          UserError: the encoder's factor does not divide the image size.
        """
        factor = self.architecture.factor
        if image_size < 1 or image_size % factor:
            raise UserError(f"images of {image_size} px do not divide by {factor}, as the autoencoder needs")
        return image_size // factor, image_size // factor, self.channels

    def moments_shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, 2 * channels): means, then log variances."""
        height, width, channels = self.shape(image_size)
        return height, width, 2 * channels

    def init(self, rng: jax.Array) -> Any:
        """Newly initialised parameters, boxed with their logical axes."""
        side = 2 * self.architecture.factor
        return self.module.init(rng, jnp.zeros((1, side, side, COLOURS)))["params"]

    def load(self) -> dict[str, Any]:
        """The pretrained parameters as a host tree of float32 arrays, with the structure of `init`.

        Raises:
          UserError: the weights are missing, damaged, or of another architecture.
        """
        found = places.open_weights(self.weights, **_PLACE)
        abstract = trees.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        return vae_weights.load(
            self.architecture, abstract, found.tensors, f"the autoencoder of {self.weights}"
        )

    def moments(self, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> float32 [B, h, w, 2C]: means, then log variances in [-30, 20], not scaled."""
        for side in images.shape[1:3]:
            self.shape(side)
        pixels = Pixels().encode({}, images, jax.random.key(0))
        with self._precision():
            return self.module.apply({"params": params}, pixels, method="encode")  # type: ignore[return-value]

    def sample(self, params: Mapping[str, Any], moments: jax.Array, rng: jax.Array) -> jax.Array:
        """Moments [B, h, w, 2C] -> latents float32 [B, h, w, C]: (mean + std * normal - shift) * scale."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        sampled = mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
        return (sampled - self.architecture.shift) * self.architecture.scale

    def mean(self, params: Mapping[str, Any], moments: jax.Array) -> jax.Array:
        """Moments [B, h, w, 2C] -> latents float32 [B, h, w, C]: (mean - shift) * scale."""
        mean, _ = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return (mean - self.architecture.shift) * self.architecture.scale

    def encode(self, params: Mapping[str, Any], images: jax.Array, rng: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> latents float32 [B, h, w, C], sampled from their moments."""
        return self.sample(params, self.moments(params, images), rng)

    def decode(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] -> images uint8 [B, H, W, 3]."""
        return Pixels().decode({}, self.decode_float(params, latents))

    def decode_float(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] -> images float32 [B, H, W, 3], about [-1, 1]. `decode` rounds these to 8 bits."""
        unscaled = latents.astype(jnp.float32) / self.architecture.scale + self.architecture.shift

        def whole_image(z: jax.Array) -> jax.Array:
            return self.module.apply({"params": params}, z, method="decode")  # type: ignore[return-value]

        with self._precision():
            if not self.tile or max(latents.shape[1:3]) <= self.tile:
                return whole_image(unscaled)
            return decode_tiles(whole_image, unscaled, self.tile, self.architecture.factor)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Makes float32 products run in float32: by default a TPU runs them in bfloat16."""
        return jax.default_matmul_precision("float32" if self.dtype == "float32" else "default")


_PLACE: dict[str, Any] = {"part": "vae", "classes": (CLASS_NAME,), "field": "codec.weights"}


def decode_tiles(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, factor: int
) -> jax.Array:
    """Decodes square tiles in sequence and blends each over the previous ones with a linear ramp.

    Tiles overlap by a quarter of their side, or by more at the far edges. Norms and attention see one tile only, so
    colours may differ slightly from tile to tile; the ramps hide the seams.

    Args:
      decode: latents [B, t, u, C] -> images [B, t * factor, u * factor, 3].
      latents: [B, h, w, C].
      tile: side of a tile in latent pixels; a shorter side of the latents is decoded whole.
      factor: side of an image divided by the side of its latent.

    Returns:
      Images [B, h * factor, w * factor, 3].
    """
    batch, height, width, channels = latents.shape
    sides = min(tile, height), min(tile, width)
    extent = tile // OVERLAP * factor
    ramps = [jnp.minimum(jnp.arange(side * factor) / extent, 1.0) for side in sides]
    starts = np.stack(np.meshgrid(_starts(height, tile), _starts(width, tile), indexing="ij"), -1).reshape(
        -1, 2
    )

    def lay(image: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = jax.lax.dynamic_slice(latents, (0, *start, 0), (batch, *sides, channels))
        new = decode(part)
        place = (0, *(start * factor), 0)
        old = jax.lax.dynamic_slice(image, place, new.shape)
        down, right = (jnp.where(start[i] > 0, ramp, 1.0) for i, ramp in enumerate(ramps))
        share = (down[:, None] * right)[None, :, :, None]
        return jax.lax.dynamic_update_slice(image, old * (1 - share) + new * share, place), None

    empty = jnp.zeros((batch, height * factor, width * factor, COLOURS), jnp.float32)
    return jax.lax.scan(lay, empty, jnp.asarray(starts))[0]


def _starts(size: int, tile: int) -> list[int]:
    """The starts of tiles that cover `size`; the last tile ends at `size`."""
    stride = tile - tile // OVERLAP
    return [*range(0, size - tile, stride), max(size - tile, 0)]

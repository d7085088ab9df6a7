"""Image codecs: between pixels and the latents that are noised.

A codec has `channels`, `shape(image_size)`, and pure functions over its frozen parameters. Encoding has two halves, so
that the costly one can be done once and stored: `moments` of images, which is not random, and `sample`, which samples
latents from them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from scaling_dit.components import Registry
from scaling_dit.encoders import contract

_REGISTRY = Registry(
    "codec",
    {
        "pixels": "scaling_dit.encoders.codec:Pixels",
        "dct": "scaling_dit.encoders.dct:BlockDct",
        "vae": "scaling_dit.encoders.vae:Autoencoder",
    },
)


class Codec(Protocol):
    """The methods of a codec that a run uses."""

    @property
    def channels(self) -> int:
        """Channels C of a latent."""

    @property
    def bounded(self) -> bool:
        """Whether latents of images lie in [-1, 1], so that a sampler may clip to it."""

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, channels) of the latent of an image of `image_size` x `image_size` pixels."""

    def moments_shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, M) of the moments of such an image."""

    def init(self, rng: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axes; {} if there are none. Reads no files."""

    def moments(self, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> what their latents are sampled from, float32 [B, h, w, M]."""

    def sample(self, params: Mapping[str, Any], moments: jax.Array, rng: jax.Array) -> jax.Array:
        """Moments [B, h, w, M] -> latents float32 [B, h, w, C]; `rng` for codecs that sample."""

    def mean(self, params: Mapping[str, Any], moments: jax.Array) -> jax.Array:
        """Moments [B, h, w, M] -> the mean of what `sample` gives, float32 [B, h, w, C]; for image conditions alone."""

    def encode(self, params: Mapping[str, Any], images: jax.Array, rng: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> latents float32 [B, h, w, C]: `sample` of their `moments`."""

    def decode(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] -> images uint8 [B, H, W, 3]."""


class FixedCodec:
    """A base for codecs without weights or randomness: the moments of an image are its latents.

    A subclass has `channels`, `bounded`, `shape`, `encode` (which does not read its key) and `decode`.
    """

    def moments_shape(self: Any, image_size: int) -> tuple[int, int, int]:
        """The shape of the latent."""
        shape: tuple[int, int, int] = self.shape(image_size)
        return shape

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """No parameters."""
        return {}

    def moments(self: Any, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """The latents of images."""
        latents: jax.Array = self.encode(params, images, jax.random.key(0))
        return latents

    def sample(self, params: Mapping[str, Any], moments: jax.Array, rng: jax.Array) -> jax.Array:
        """The moments themselves, float32."""
        return moments.astype(jnp.float32)

    def mean(self, params: Mapping[str, Any], moments: jax.Array) -> jax.Array:
        """The moments themselves, float32."""
        return moments.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Pixels(FixedCodec):
    """Diffusion on the pixels themselves, scaled to [-1, 1]; no parameters (`params` is empty)."""

    channels: ClassVar[int] = 3
    bounded: ClassVar[bool] = True

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """The shape of the image itself."""
        return image_size, image_size, self.channels

    def encode(self, params: Mapping[str, Any], images: jax.Array, rng: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> float32 of the same shape, 0..255 onto [-1, 1]."""
        return images.astype(jnp.float32) / 127.5 - 1.0

    def decode(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, H, W, 3] -> uint8 of the same shape: the inverse of `encode`, clipped outside [-1, 1]."""
        # Rounded, since truncation would darken every image by half a level, and NaN shown as black.
        levels = jnp.nan_to_num((latents.astype(jnp.float32) + 1.0) * 127.5)
        return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


def create_codec(name: str, **fields: Any) -> Codec:
    """A codec without weights.

    Args:
      name: "pixels", "dct", "vae" or "package.module:Name".
      **fields: fields of that codec, see `codec_fields`.

    Raises:
      UserError: unknown name or field.
    """
    return _REGISTRY.create(name, fields)


def check_own_codec(codec: Codec, name: str, image_size: int) -> None:
    """Checks a codec of a user's own for images of `image_size` x `image_size` pixels; a built-in one passes.

    Raises:
      UserError: it does not hold to `Codec`.
    """
    if name not in _REGISTRY.known:
        contract.check_codec(codec, image_size, f"config.codec {name!r}")


def init_codec(codec: Codec, rng: jax.Array) -> Any:
    """Fresh parameters of a run's codec, from the key of the run, boxed."""
    # The key itself is split for the rest of the run.
    return codec.init(jax.random.fold_in(rng, 1))


def codec_fields(name: str) -> dict[str, Any]:
    """The config-settable fields of a codec with their defaults.

    Raises:
      UserError: unknown name.
    """
    return _REGISTRY.fields(name)

"""Image codecs: between pixels and the latents that are noised.

A codec has `channels`, `shape(image_size)`, and pure functions `encode` and `decode` over its frozen parameters.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from scaling_dit.components import Registry

_REGISTRY = Registry(
    "codec",
    {"pixels": "scaling_dit.encoders.codec:Pixels", "dct": "scaling_dit.encoders.dct:BlockDct"},
)


class Codec(Protocol):
    """What a run needs of a codec."""

    @property
    def channels(self) -> int:
        """Channels C of a latent."""

    @property
    def bounded(self) -> bool:
        """Whether latents of images lie in [-1, 1], so that a sampler may clip to it."""

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, channels) of the latent of an image of `image_size` x `image_size` pixels."""

    def encode(self, params: Mapping[str, Any], images: jax.Array, rng: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> latents float32 [B, h, w, C]; `rng` for codecs that sample."""

    def decode(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] -> images uint8 [B, H, W, 3]."""


@dataclasses.dataclass(frozen=True)
class Pixels:
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
      name: "pixels", "dct" or "package.module:Class".
      **fields: fields of that codec, see `codec_fields`.

    Raises:
      UserError: unknown name or field.
    """
    return _REGISTRY.create(name, fields)


def codec_fields(name: str) -> dict[str, Any]:
    """The config-settable fields of a codec with their defaults.

    Raises:
      UserError: unknown name.
    """
    return _REGISTRY.fields(name)

"""A fixed transform for an autoencoder's place: colours and blocks of pixels turned, the coarsest part kept.

Each block of patch x patch pixels becomes one latent pixel: an orthonormal DCT over its rows, columns and three
colours, of which the first `channels` coefficients are kept, coarse before fine. With patch 2 and 4 channels an image
of 64 px has the latent of a 256 px image in Stable Diffusion's autoencoder, 32 x 32 x 4, so that models of the papers'
sizes run at the papers' shapes without any weights.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from scaling_dit.encoders.codec import FixedCodec, Pixels
from scaling_dit.errors import UserError

COLOURS = 3


@dataclasses.dataclass(frozen=True)
class BlockDct(FixedCodec):
    """Latents of a block DCT; no parameters (`params` is empty).

    Attributes:
      patch: side of a block in pixels, and the factor by which latents are smaller.
      channels: coefficients kept of the 3 * patch**2 of a block; with all of them `decode` is the exact inverse.
      scale: factor on the coefficients, as an autoencoder has; the default brings the latents of the built-in shapes
        at 64 px to a variance near 1.

    Raises:
      UserError: a patch or a number of channels that does not exist.
    """

    patch: int = 2
    channels: int = 4
    scale: float = 2.5

    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise UserError(f"codec.patch is {self.patch}; it must be at least 1")
        if not 1 <= self.channels <= COLOURS * self.patch**2:
            right = f"1 to {COLOURS * self.patch**2}, three colours of {self.patch} x {self.patch} pixels"
            raise UserError(f"codec.channels is {self.channels}; it must be {right}")
        if not 0 < self.scale < math.inf:
            raise UserError(f"codec.scale is {self.scale}; it must be more than 0")

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, channels) of a latent.

        Raises:
          UserError: an image that does not divide into blocks.
        """
        if image_size < 1 or image_size % self.patch:
            raise UserError(
                f"images of {image_size} px do not divide into blocks of codec.patch={self.patch}; "
                "choose a patch that divides them"
            )
        return image_size // self.patch, image_size // self.patch, self.channels

    def encode(self, params: Mapping[str, Any], images: jax.Array, rng: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, 3] -> latents float32 [B, H / patch, W / patch, channels]."""
        for side in images.shape[1:3]:
            self.shape(side)
        pixels = Pixels().encode(params, images, rng)
        blocks = rearrange(pixels, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch)
        return self.scale * jnp.dot(blocks, self.basis.T, precision="highest")

    def decode(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, channels] -> images uint8 [B, h * patch, w * patch, 3], dropped coefficients being 0."""
        blocks = jnp.dot(latents.astype(jnp.float32) / self.scale, self.basis, precision="highest")
        pixels = rearrange(blocks, "b h w (p q c) -> b (h p) (w q) c", p=self.patch, q=self.patch, c=COLOURS)
        return Pixels().decode(params, pixels)

    @property
    def basis(self) -> np.ndarray:
        """Orthonormal rows float32 [channels, patch * patch * 3], of blocks in (row, column, colour) order."""
        return _basis(self.patch)[: self.channels]


@functools.cache
def _basis(patch: int) -> np.ndarray:
    """All basis images of a block, in the order in which they are kept: by their frequency in space, then in colour.

    A DCT of red, green and blue gives brightness, red against blue, and green against the two: close to the principal
    colours of natural images (Ohta 1980).
    """
    space, colour = _dct(patch), _dct(COLOURS)
    rows = np.einsum("ip,jq,kc->ijkpqc", space, space, colour).reshape(-1, COLOURS * patch**2)
    frequencies = list(np.ndindex(patch, patch, COLOURS))
    order = sorted(range(len(rows)), key=lambda n: (sum(frequencies[n][:2]), frequencies[n][2], n))
    return rows[order].astype(np.float32)


def _dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II [frequency, position]."""
    positions, frequencies = np.arange(size) + 0.5, np.arange(size)[:, None]
    rows = np.cos(np.pi * frequencies * positions / size)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

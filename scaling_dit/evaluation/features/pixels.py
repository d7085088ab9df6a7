"""Resizes and crops images for published networks, in numpy and Pillow, with the values that their own code gives.

Images are uint8 [B, H, W, 3]. Every function says which published code it equals; results name it, because scores of
different rules do not compare.
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

_BICUBIC = Image.Resampling.BICUBIC


def shorter_side(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes the shorter side to `side`, then cuts out the centre: uint8 [B, side, side, 3].

    Pillow's bicubic filter on uint8, as torchvision's Resize and CenterCrop on a Pillow image: the preparation of
    OpenAI's CLIP, open_clip, transformers' slow processor and ImageReward.
    """
    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images
    short = min(height, width)
    # torchvision rounds down, and Python's round decides where the crop begins.
    sides = tuple(int(side * length / short) for length in (height, width))
    top, left = (round((length - side) / 2) for length in sides)
    resized = _resize(images, sides[1], sides[0])
    return resized[:, top : top + side, left : left + side]


def centre_square(images: np.ndarray, side: int) -> np.ndarray:
    """Cuts out the largest centred square, then resizes it to `side`: uint8 [B, side, side, 3]; CMMD's reader."""
    height, width = images.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    images = images[:, top : top + short, left : left + short]
    return images if short == side else _resize(images, side, side)


def squash(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes both sides to `side`, whatever the aspect: uint8 [B, side, side, 3]; dgm-eval's DINOv2 encoder."""
    return images if images.shape[1:3] == (side, side) else _resize(images, side, side)


def clean(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes both sides colour by colour in float32, without rounding: float32 [B, side, side, 3] in about [0, 255].

    clean-fid's rule (arXiv 2104.11222): antialiased, so that resizing adds no error of its own. Overshoot stays.
    """
    resized = np.empty((len(images), side, side, 3), np.float32)
    for image, target in zip(images, resized, strict=True):
        for colour in range(3):
            plane = Image.fromarray(np.ascontiguousarray(image[..., colour], dtype=np.float32))
            target[..., colour] = np.asarray(plane.resize((side, side), _BICUBIC))
    return resized


def tensorflow1(images: jax.Array, side: int) -> jax.Array:
    """float32 [B, H, W, 3] -> float32 [B, side, side, 3], bilinear as TensorFlow 1's `resize_bilinear`.

    Without antialiasing, and pixel i reads from i * H / side: what FID was published with, and torch-fidelity's rule.
    """
    height, width = images.shape[1:3]
    rows, columns = _taps(height, side), _taps(width, side)
    across = [images[:, index] for index in rows[:2]]
    # Along the width first, in this order of operations, as the original kernel does.
    low, high = (
        part[:, :, columns[0]] + (part[:, :, columns[1]] - part[:, :, columns[0]]) * columns[2][:, None]
        for part in across
    )
    return low + (high - low) * rows[2][:, None, None]


def _taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lower and the upper neighbour of each output pixel, and the weight of the upper one, float32."""
    places = np.arange(side, dtype=np.float32) * np.float32(size / side)
    low = places.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), places - low.astype(np.float32)


def standardise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 [..., 3] -> float32: values in [0, 1], less the mean of each colour, over its deviation."""
    scaled = images.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _resize(images: np.ndarray, width: int, height: int) -> np.ndarray:
    resized = [np.asarray(Image.fromarray(image).resize((width, height), _BICUBIC)) for image in images]
    return np.stack(resized)


def minus_one_to_one(images: jax.Array) -> jax.Array:
    """Values in [0, 255] as Inception's graph takes them: (x - 128) / 128."""
    return (images - 128) / jnp.float32(128)

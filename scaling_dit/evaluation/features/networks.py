"""The networks whose features are compared as sets: Inception, CLIP's image tower, DINOv2.

Each brings its weights' place, its rule of resizing, and a function from images to features.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.encoders import clip_vision
from scaling_dit.evaluation.features import clip_pairs, dinov2, inception, pixels, published
from scaling_dit.evaluation.features.published import Published
from scaling_dit.evaluation.features.sharded import Latest, Sharded, placed
from scaling_dit.weights import places

# Images uint8 [B, H, W, 3] of any size -> features float32 [B, D].
Features = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of features.

    Attributes:
      name: names its statistics' file.
      width: D, the number of features.
      weights: where its weights are published.
      resize: its rule of resizing, for results.
      build: (place of weights, images at once) -> the function.
    """

    name: str
    width: int
    weights: Published
    resize: str
    build: Callable[[str, int], Features]

    def open(self, place: str, batch: int) -> Features:
        """The function with the weights of a place; metrics that name the same ones share it, and its last results.

        Raises:
          UserError: the weights are damaged or of another network.
        """
        return _opened(self, place, batch)


# Of the metrics of one command; each holds its parameters on the devices.
@functools.lru_cache(maxsize=3)
def _opened(network: Network, place: str, batch: int) -> Features:
    return Latest(network.build(place, batch))


def _inception(resize: str) -> Callable[[str, int], Features]:
    def build(place: str, batch: int) -> Features:
        def features(params: Any, images: jax.Array) -> jax.Array:
            # Sizes below are known when this is traced.
            if images.shape[1:3] != (inception.SIDE, inception.SIDE) or images.dtype == jnp.uint8:
                images = pixels.tensorflow1(images.astype(jnp.float32), inception.SIDE)
            found: Any = inception.Inception().apply({"params": params}, pixels.minus_one_to_one(images))
            return found

        run = Sharded(features, placed(_inception_weights, place), batch)
        if resize == "clean":
            return lambda images: run(pixels.clean(images, inception.SIDE))
        return run

    return build


def _inception_weights(place: str) -> dict[str, Any]:
    """The parameters of either rule of resizing."""
    return inception.load(places.open_weights(place, part="inception", classes=(), field="weights"))


def _clip(size: str) -> Callable[[str, int], Features]:
    def build(place: str, batch: int) -> Features:
        shape = clip_vision.SIZES[size]
        params = placed(clip_vision.load_vision, place, shape)
        run = Sharded(functools.partial(clip_pairs.embed, shape), params, batch)
        mean, std = clip_vision.MEAN, clip_vision.STD
        return lambda images: run(pixels.standardise(pixels.centre_square(images, shape.image), mean, std))

    return build


def _dinov2(size: str) -> Callable[[str, int], Features]:
    def build(place: str, batch: int) -> Features:
        shape = dinov2.SIZES[size]
        tower = dinov2.Dinov2(shape)

        def features(params: Any, images: jax.Array) -> jax.Array:
            found: Any = tower.apply({"params": params}, images)
            return found

        run = Sharded(features, placed(dinov2.load, place, shape), batch)
        return lambda images: run(
            pixels.standardise(pixels.squash(images, shape.image), dinov2.MEAN, dinov2.STD)
        )

    return build


INCEPTION = {
    "tensorflow1": Network(
        "inception",
        inception.FEATURES,
        published.INCEPTION,
        "both sides to 299, bilinear of TensorFlow 1, not antialiased",
        _inception("tensorflow1"),
    ),
    "clean": Network(
        "inception-clean",
        inception.FEATURES,
        published.INCEPTION,
        "both sides to 299, Pillow bicubic in float32 (clean-fid)",
        _inception("clean"),
    ),
}
CLIP_L_336 = Network(
    "clip-l-336",
    clip_vision.SIZES["clip-l-336"].projection,
    published.CLIP_L_336,
    "centre square to 336, Pillow bicubic",
    _clip("clip-l-336"),
)
DINOV2_L = Network(
    "dinov2-l",
    dinov2.SIZES["dinov2-l"].width,
    published.DINOV2_L,
    "both sides to 224, Pillow bicubic",
    _dinov2("dinov2-l"),
)
NETWORKS = {one.name: one for one in (*INCEPTION.values(), CLIP_L_336, DINOV2_L)}

"""Inception-v3 as FID uses it: the network of 2015-12-05, which differs from torchvision's in its pooling.

Mean pooling leaves the zeros of the border out of its averages, and the last block pools by the maximum (arXiv
1706.08500's graph; torch-fidelity's `FeatureExtractorInceptionV3`). The weights are those of
pt_inception-2015-12-05-6726825d.pth. Features are the 2048 means before the classifier.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_dit import trees
from scaling_dit.weights import table
from scaling_dit.weights.places import Pretrained

SIDE = 299
FEATURES = 2048
_EPSILON = 1e-3
_CLASSES = 1008


class Unit(nn.Module):
    """Convolution without bias, batch norm by its stored moments, ReLU: [B, H, W, C] -> [B, H', W', features]."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = [(side, side) for side in self.padding]
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, self.kernel, strides, padding, use_bias=False, name="conv")(x)
        shape, ones, zeros = (self.features,), nn.initializers.ones, nn.initializers.zeros
        scale: Any = self.param("scale", ones, shape)
        bias: Any = self.param("bias", zeros, shape)
        mean: Any = self.param("mean", zeros, shape)
        variance: Any = self.param("variance", ones, shape)
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(variance + _EPSILON)) + bias)


# A branch: (name, features, kernel, stride) of each unit in turn. Stride 1 keeps height and width, stride 2 pads none.
_Branch = tuple[tuple[str, int, tuple[int, int], int], ...]


def _same(name: str, features: int, height: int, width: int) -> tuple[str, int, tuple[int, int], int]:
    return name, features, (height, width), 1


def _halving(name: str, features: int) -> tuple[str, int, tuple[int, int], int]:
    return name, features, (3, 3), 2


def _block_a(pooled: int) -> list[_Branch]:
    return [
        (_same("branch1x1", 64, 1, 1),),
        (_same("branch5x5_1", 48, 1, 1), _same("branch5x5_2", 64, 5, 5)),
        (
            _same("branch3x3dbl_1", 64, 1, 1),
            _same("branch3x3dbl_2", 96, 3, 3),
            _same("branch3x3dbl_3", 96, 3, 3),
        ),
        (_same("branch_pool", pooled, 1, 1),),
    ]


def _block_b() -> list[_Branch]:
    return [
        (_halving("branch3x3", 384),),
        (
            _same("branch3x3dbl_1", 64, 1, 1),
            _same("branch3x3dbl_2", 96, 3, 3),
            _halving("branch3x3dbl_3", 96),
        ),
    ]


def _block_c(inner: int) -> list[_Branch]:
    return [
        (_same("branch1x1", 192, 1, 1),),
        (
            _same("branch7x7_1", inner, 1, 1),
            _same("branch7x7_2", inner, 1, 7),
            _same("branch7x7_3", 192, 7, 1),
        ),
        (
            _same("branch7x7dbl_1", inner, 1, 1),
            _same("branch7x7dbl_2", inner, 7, 1),
            _same("branch7x7dbl_3", inner, 1, 7),
            _same("branch7x7dbl_4", inner, 7, 1),
            _same("branch7x7dbl_5", 192, 1, 7),
        ),
        (_same("branch_pool", 192, 1, 1),),
    ]


def _block_d() -> list[_Branch]:
    return [
        (_same("branch3x3_1", 192, 1, 1), _halving("branch3x3_2", 320)),
        (
            _same("branch7x7x3_1", 192, 1, 1),
            _same("branch7x7x3_2", 192, 1, 7),
            _same("branch7x7x3_3", 192, 7, 1),
            _halving("branch7x7x3_4", 192),
        ),
    ]


def _block_e() -> list[_Branch]:
    # The two last units of a branch that ends in "a" and "b" stand side by side.
    return [
        (_same("branch1x1", 320, 1, 1),),
        (
            _same("branch3x3_1", 384, 1, 1),
            _same("branch3x3_2a", 384, 1, 3),
            _same("branch3x3_2b", 384, 3, 1),
        ),
        (
            _same("branch3x3dbl_1", 448, 1, 1),
            _same("branch3x3dbl_2", 384, 3, 3),
            _same("branch3x3dbl_3a", 384, 1, 3),
            _same("branch3x3dbl_3b", 384, 3, 1),
        ),
        (_same("branch_pool", 192, 1, 1),),
    ]


# Name, branches and pooling of each block: the mean, the maximum, or the maximum that halves height and width.
_BLOCKS: list[tuple[str, list[_Branch], str]] = [
    ("Mixed_5b", _block_a(32), "mean"),
    ("Mixed_5c", _block_a(64), "mean"),
    ("Mixed_5d", _block_a(64), "mean"),
    ("Mixed_6a", _block_b(), "halving"),
    ("Mixed_6b", _block_c(128), "mean"),
    ("Mixed_6c", _block_c(160), "mean"),
    ("Mixed_6d", _block_c(160), "mean"),
    ("Mixed_6e", _block_c(192), "mean"),
    ("Mixed_7a", _block_d(), "halving"),
    ("Mixed_7b", _block_e(), "mean"),
    ("Mixed_7c", _block_e(), "maximum"),
]
# Name, features, side of the kernel, stride and padding of the units before them; after two of them the maximum halves.
_STEM = [
    ("Conv2d_1a_3x3", 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
]
_HALVED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


class Inception(nn.Module):
    """Images float32 [B, 299, 299, 3] in [-1, 1] -> features float32 [B, 2048]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name, features, kernel, stride, padding in _STEM:
            x = Unit(features, (kernel, kernel), stride, (padding, padding), name=name)(x)
            if name in _HALVED_AFTER:
                x = _maximum(x, 2)
        for name, branches, pooling in _BLOCKS:
            x = _block(x, name, branches, pooling)
        return x.mean((1, 2))


def _block(x: jax.Array, name: str, branches: list[_Branch], pooling: str) -> jax.Array:
    """The outputs of all branches, joined along the channels; `branch_pool` reads the pooled input."""
    outputs = []
    for branch in branches:
        y = _pool(x, pooling) if branch[0][0] == "branch_pool" else x
        for unit, features, kernel, stride in branch:
            padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
            apply = Unit(features, kernel, stride, padding, name=f"{name}_{unit}")
            if unit.endswith("a"):
                outputs.append(apply(y))
            else:
                y = apply(y)
        outputs.append(y)
    return jnp.concatenate([*outputs, _maximum(x, 2)] if pooling == "halving" else outputs, axis=-1)


def _pool(x: jax.Array, pooling: str) -> jax.Array:
    if pooling == "maximum":
        return _maximum(x, 1)
    around = ((1, 1), (1, 1))
    return nn.avg_pool(x, (3, 3), padding=around, count_include_pad=False)


def _maximum(x: jax.Array, stride: int) -> jax.Array:
    """The maximum of 3x3 pixels; stride 1 keeps height and width, stride 2 pads none."""
    around = ((1, 1), (1, 1)) if stride == 1 else ((0, 0), (0, 0))
    return nn.max_pool(x, (3, 3), (stride, stride), around)


def rows() -> table.Table:
    """The table of torch-fidelity's and pytorch-fid's names, which are the same."""
    units = [(name, name) for name, *_ in _STEM]
    units += [
        (f"{block}.{unit}", f"{block}_{unit}")
        for block, branches, _ in _BLOCKS
        for branch in branches
        for unit, *_ in branch
    ]
    found: list[table.Row | table.Copy | table.Unread] = [
        # The classifier.
        table.Unread("fc.weight", (_CLASSES, FEATURES)),
        table.Unread("fc.bias", (_CLASSES,)),
    ]
    ends = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    for theirs, ours in units:
        found.append(table.Row(f"{theirs}.conv.weight", f"{ours}/conv/kernel", table.conv()))
        found += [table.Row(f"{theirs}.bn.{end}", f"{ours}/{to}") for end, to in ends.items()]
    return found


def load(opened: Pretrained) -> dict[str, Any]:
    """The parameters in opened weights, as numpy arrays.

    Raises:
      UserError: the files are damaged or of another network.
    """
    return opened.load(rows(), abstract(), "Inception of 2015-12-05")


def abstract() -> Mapping[str, Any]:
    """Shapes and dtypes of the parameters."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree: Mapping[str, Any] = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
    return trees.unbox(tree)

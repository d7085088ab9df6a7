"""DINOv2's vision transformer (arXiv 2304.07193): the class token's state, for Frechet distances of its features.

The position table was trained for 518 px and is resampled to the 16 x 16 patches of 224 px once, at loading, as the
published code does it: bicubic, with a scale of (16 + 0.1) / 37. transformers resamples with 16 / 37, so that its
features differ a little.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit import trees
from scaling_dit.encoders import transformer
from scaling_dit.errors import UserError
from scaling_dit.nn.layers import NORMAL_002, Dense, layer_norm, patchify
from scaling_dit.weights import places, table

# Of ImageNet's colours in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
EPSILON = 1e-6
# Added to the number of patches before the scale of the position table is computed (interpolate_offset).
_OFFSET = 0.1
# Of the cubic through four points; torch's.
_CUBIC = -0.75
_CLASSES = ("Dinov2Model", "Dinov2ForImageClassification")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a network.

    Attributes:
      width: width of the tokens.
      layers: number of blocks.
      heads: heads of attention.
      mlp: hidden width of the MLPs.
      patch: side of a patch in pixels.
      image: side of an image in pixels.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int = 14
    image: int = 224

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


SIZES = {
    "dinov2-l": Size(1024, 24, 16, 4096),
    # For tests.
    "tiny": Size(32, 2, 4, 128, image=56),
}


class Dinov2(nn.Module):
    """Images float32 [B, S, S, 3], standardised by MEAN and STD -> the class token's state, float32 [B, width]."""

    size: Size

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.size
        embed = Dense(size.width, (None, "embed"), name="patches")
        x_BTD = embed(patchify(images, size.patch))
        first: Any = self.param("class", NORMAL_002, (size.width,))
        positions: Any = self.param("positions", NORMAL_002, (size.grid**2 + 1, size.width))
        x_BTD = jnp.concatenate([jnp.broadcast_to(first, (len(x_BTD), 1, size.width)), x_BTD], axis=1)
        fields: dict[str, Any] = {"heads": size.heads, "mlp": size.mlp, "activation": "gelu"}
        fields |= {"dtype": jnp.float32, "param_dtype": jnp.float32, "epsilon": EPSILON, "scaled": True}
        x_BTD = transformer.blocks(x_BTD + positions, size.layers, None, **fields)
        return layer_norm("norm", epsilon=EPSILON)(x_BTD[:, 0])


def load(place: str, size: Size) -> dict[str, Any]:
    """The parameters in a place of weights, with the names of the published code or of transformers.

    Raises:
      UserError: the files are missing, damaged or of another network.
    """
    opened = places.open_weights(place, part="image_encoder", classes=_CLASSES, field="weights")
    wanted = {"hidden_size": size.width, "num_hidden_layers": size.layers, "patch_size": size.patch}
    opened.check(wanted | {"num_attention_heads": size.heads, "use_swiglu_ffn": False})
    names, rows = entries(opened.tensors, size)
    images = jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32)
    abstract: Mapping[str, Any] = jax.eval_shape(Dinov2(size).init, jax.random.key(0), images)["params"]
    loaded = opened.renamed(names).load(rows, trees.unbox(abstract), "DINOv2")
    return loaded | {"positions": resample(loaded["positions"], size.grid)}


def entries(tensors: Iterable[str], size: Size) -> tuple[dict[str, str], table.Table]:
    """The entries of the network in a file, and the table that maps them: name in the table -> name in the file."""
    layers, patches = size.layers, table.patch_conv(size.patch)
    at, to = "encoder.layer.{i}", "blocks_{i}"
    if any(name.startswith("blocks.") for name in tensors):
        at = "blocks.{i}"
        rows: list[table.Row | table.Copy | table.Unread] = [
            table.Row("patch_embed.proj.weight", "patches/kernel", patches),
            table.Row("patch_embed.proj.bias", "patches/bias"),
            table.Row("cls_token", "class", table.leading_axes(2)),
            table.Row("pos_embed", "positions", table.leading_axis(), free=(0,)),
            table.Unread("mask_token", (1, size.width)),
            *table.norm("norm", "norm"),
            *table.linear(f"{at}.attn.qkv", f"{to}/qkv", layers, parts=3),
            *table.linear(f"{at}.attn.proj", f"{to}/proj", layers),
            table.Row(f"{at}.ls1.gamma", f"{to}/scale1", layers=layers),
            table.Row(f"{at}.ls2.gamma", f"{to}/scale2", layers=layers),
        ]
    else:
        qkv = tuple(f"{at}.attention.attention.{part}" for part in ("query", "key", "value"))
        rows = [
            table.Row("embeddings.patch_embeddings.projection.weight", "patches/kernel", patches),
            table.Row("embeddings.patch_embeddings.projection.bias", "patches/bias"),
            table.Row("embeddings.cls_token", "class", table.leading_axes(2)),
            table.Row("embeddings.position_embeddings", "positions", table.leading_axis(), free=(0,)),
            table.Unread("embeddings.mask_token", (1, size.width)),
            *table.norm("layernorm", "norm"),
            *table.linear(qkv, f"{to}/qkv", layers, bias=True),
            *table.linear(f"{at}.attention.output.dense", f"{to}/proj", layers),
            table.Row(f"{at}.layer_scale1.lambda1", f"{to}/scale1", layers=layers),
            table.Row(f"{at}.layer_scale2.lambda1", f"{to}/scale2", layers=layers),
        ]
    for part in ("norm1", "norm2"):
        rows += table.norm(f"{at}.{part}", f"{to}/{part}", layers)
    for part in ("fc1", "fc2"):
        rows += table.linear(f"{at}.mlp.{part}", f"{to}/{part}", layers)
    # transformers' classifier, and its prefix where the network is part of one.
    names = {name.removeprefix("dinov2."): name for name in tensors if not name.startswith("classifier.")}
    return names, rows


def resample(positions: np.ndarray, grid: int) -> np.ndarray:
    """A position table [1 + n * n, D] -> [1 + grid * grid, D]; the first row belongs to the class token.

    Raises:
      UserError: the table has no square of patches.
    """
    count = len(positions) - 1
    side = round(count**0.5)
    if side**2 != count:
        raise UserError(f"a position table of {count} patches is no square")
    if side == grid:
        return positions
    weights = _cubic_weights(side, grid, (grid + _OFFSET) / side)
    square = positions[1:].reshape(side, side, -1).astype(np.float64)
    made = np.einsum("ai,bj,ijd->abd", weights, weights, square)
    return np.concatenate([positions[:1], made.reshape(grid * grid, -1).astype(np.float32)])


def _cubic_weights(size: int, made: int, scale: float) -> np.ndarray:
    """The weights [made, size] of torch's bicubic interpolation, not antialiased, edges repeated."""
    weights = np.zeros((made, size))
    for i in range(made):
        place = (i + 0.5) / scale - 0.5
        first = int(np.floor(place))
        for tap in range(-1, 3):
            distance = abs(place - first - tap)
            weights[i, min(max(first + tap, 0), size - 1)] += _cubic(distance)
    return weights


def _cubic(distance: float) -> float:
    """Keys's cubic at a distance of at most 2."""
    a, x = _CUBIC, distance
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

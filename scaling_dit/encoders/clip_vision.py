"""CLIP's image tower, and both towers with their projections, to score images against captions.

A vision transformer (arXiv 2103.00020, section 2.4; transformers' `CLIPVisionModelWithProjection`). The state of its
class token is projected to the space shared with text. Metrics use it (CLIPScore, and HPSv2 with weights of its own);
training does not.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from scaling_dit import trees
from scaling_dit.encoders import clip, clip_weights, transformer
from scaling_dit.encoders.clip import ClipText
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.layers import NORMAL_002, Dense, constrain, layer_norm
from scaling_dit.weights import places

# Mean and deviation of red, green and blue in [0, 1], over CLIP's training set.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLASSES = (*clip.CLASSES[2:], "CLIPVisionModelWithProjection")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of an image tower.

    Attributes:
      width: width of the tokens.
      layers: number of blocks.
      heads: heads of attention.
      mlp: hidden width of the MLPs.
      patch: side of a patch in pixels.
      image: side of an image in pixels.
      activation: "gelu" or "quick_gelu".
      projection: width of the space shared with text.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    activation: str
    projection: int


# The same names as the text towers have.
SIZES = {
    "openclip-h": Size(1280, 32, 16, 5120, 14, 224, "gelu", 1024),
    "openclip-bigg": Size(1664, 48, 16, 8192, 14, 224, "gelu", 1280),
    "clip-l": Size(1024, 24, 16, 4096, 14, 224, "quick_gelu", 768),
    "clip-l-336": Size(1024, 24, 16, 4096, 14, 336, "quick_gelu", 768),
    "clip-b": Size(768, 12, 12, 3072, 32, 224, "quick_gelu", 512),
    "tiny": Size(32, 2, 4, 64, 14, 28, "gelu", 16),
}


class VisionTower(nn.Module):
    """Images float32 [B, H, W, 3], scaled by `normalise` -> projected class state [B, projection], float32."""

    size: Size
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.size
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=size.patch, q=size.patch)
        embed = Dense(size.width, (None, "embed"), use_bias=False, dtype=self.dtype, name="patches")
        x_BTD = embed(patches).astype(jnp.float32)
        init = nn.with_logical_partitioning(NORMAL_002, ("embed",))
        first: Any = self.param("class", init, (size.width,))
        x_BTD = jnp.concatenate([jnp.broadcast_to(first, (x_BTD.shape[0], 1, size.width)), x_BTD], axis=1)
        init = nn.with_logical_partitioning(NORMAL_002, (None, "embed"))
        positions: Any = self.param("positions", init, ((size.image // size.patch) ** 2 + 1, size.width))
        x_BTD = layer_norm("norm_in", epsilon=transformer.NORM_EPSILON)(x_BTD + positions)
        fields: dict[str, Any] = {"heads": size.heads, "mlp": size.mlp, "activation": size.activation}
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.float32}
        x_BTD = constrain(x_BTD, *transformer.TOKEN_AXES)
        x_BTD = transformer.blocks(x_BTD, size.layers, None, **fields, **types)
        pooled_BD = layer_norm("norm_out", epsilon=transformer.NORM_EPSILON)(x_BTD[:, 0])
        to_shared = Dense(size.projection, ("embed", "heads"), use_bias=False, name="projection", **types)
        return to_shared(pooled_BD).astype(jnp.float32)


def open_text(weights: str, size: str, tokenizer_files: str = "", dtype: str = "float32") -> ClipText:
    """The text tower with its projection to the shared space.

    Args:
      weights: the place of weights (`weights/places.py`), with transformers' or open_clip's names.
      size: a name in SIZES.
      tokenizer_files: as the field of `ClipText`.
      dtype: type of the products.

    Raises:
      UserError: the size is unknown, or the files are missing, damaged or of another architecture.
    """
    if size not in SIZES:
        raise UserError(f"there is no CLIP of the size {size!r}; {nearest(size, SIZES)}")
    fields: dict[str, Any] = {"weights": weights, "tokenizer_files": tokenizer_files}
    tokenizer = ClipText.Tokenizer.read(fields)
    return ClipText(tokenizer, size=size, layer="last", project=True, dtype=dtype, **fields)


def unit(x: jax.Array) -> jax.Array:
    """[B, P] with each row scaled to length 1, so that products of rows are cosines."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def load_vision(weights: str, size: Size) -> dict[str, Any]:
    """The parameters of `VisionTower` in a place of weights, as numpy arrays.

    Raises:
      UserError: the files are missing, damaged or of another architecture.
    """
    opened = places.open_weights(weights, part="image_encoder", classes=CLASSES, field="weights")
    wanted = {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "patch_size": size.patch,
        "image_size": size.image,
        "hidden_act": size.activation,
    }
    opened.check(wanted, "vision_config")
    names, rows = clip_weights.vision_entries(opened.tensors, size.layers, size.patch)
    images = jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32)
    abstract = trees.unbox(jax.eval_shape(VisionTower(size).init, jax.random.key(0), images)["params"])
    return opened.renamed(names).load(rows, abstract, "CLIP's image tower")

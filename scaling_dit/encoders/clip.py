"""CLIP's text tower as a text encoder: OpenCLIP ViT-H/14 as in Stable Diffusion 2, OpenAI's CLIP-L and others.

A causal transformer (arXiv 2103.00020, section 2.4; transformers' `CLIPTextModel`). Stable Diffusion 2 takes the states
after the penultimate layer, applies the final norm, and shows its UNet all 77 positions, padding included; train with
`config.text_mask=False` for that. The states of padded positions depend on the padding id. Tokenizer files disagree
about this id, so it is a field here and never read from them.

A caption beyond 77 tokens is read in windows: its words in runs of 75, each between a begin and an end token of its
own, as if it were a caption, and the states side by side. The tower is then as it was trained, and a caption that fits
one window has the same first 77 states.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from scaling_dit import trees
from scaling_dit.encoders import clip_weights, transformer
from scaling_dit.encoders.subwords import NO_TOKENIZER, SubwordTokenizer
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.layers import NORMAL_002, Dense, constrain, layer_norm, parse_dtype
from scaling_dit.weights import places

# Ids of every CLIP; the last two begin and end a text.
VOCABULARY = 49_408
POSITIONS = 77
# Of all windows.
_LONGEST = 32 * POSITIONS
LAYERS = ("penultimate", "last")
# Classes of transformers that hold a text tower.
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a text tower.

    Attributes:
      width: width of the tokens.
      layers: layers of the whole tower, including the last one.
      heads: heads of attention.
      mlp: hidden width of the MLPs.
      activation: "gelu" or "quick_gelu".
      projection: width of the space shared with images.
      pad_id: padding id with which the tower was trained.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str
    projection: int
    pad_id: int


SIZES = {
    "openclip-h": Size(1024, 24, 16, 4096, "gelu", 1024, pad_id=0),
    "openclip-bigg": Size(1280, 32, 20, 5120, "gelu", 1280, pad_id=0),
    "clip-l": Size(768, 12, 12, 3072, "quick_gelu", 768, pad_id=VOCABULARY - 1),
    # Its text tower is as large, with weights of its own.
    "clip-l-336": Size(768, 12, 12, 3072, "quick_gelu", 768, pad_id=VOCABULARY - 1),
    "clip-b": Size(512, 12, 8, 2048, "quick_gelu", 512, pad_id=VOCABULARY - 1),
    # For tests and first runs.
    "tiny": Size(32, 3, 4, 64, "gelu", 16, pad_id=0),
}


class TextTower(nn.Module):
    """The transformer over token ids; norms and softmax in float32, products in `dtype`.

    Attributes:
      size: its shape.
      depth: the number of layers to run.
      project: whether to project the pooled state to the space shared with images.
      dtype: type of the products.
      param_dtype: type of the parameters.
    """

    size: Size
    depth: int
    project: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids int32 [B, L] -> (tokens [B, L, width], pooled [B, width or projection]), float32.

        The pooled state belongs to the first token with the largest id. That is the end token, even if the same id
        pads the text.
        """
        size, length = self.size, ids.shape[1]
        table_of = nn.with_logical_partitioning(NORMAL_002, ("vocab", "embed"))
        words: Any = self.param("words", table_of, (VOCABULARY, size.width), self.param_dtype)
        table_of = nn.with_logical_partitioning(nn.initializers.normal(0.01), (None, "embed"))
        positions: Any = self.param("positions", table_of, (POSITIONS, size.width), self.param_dtype)
        x_BLD = words[ids].astype(jnp.float32) + positions[:length].astype(jnp.float32)
        x_BLD = constrain(x_BLD, *transformer.TOKEN_AXES)
        causal = np.triu(np.full((length, length), transformer.HIDDEN, np.float32), 1)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fields: dict[str, Any] = {"heads": size.heads, "mlp": size.mlp, "activation": size.activation}
        x_BLD = transformer.blocks(x_BLD, self.depth, jnp.asarray(causal), **fields, **types)
        norm = layer_norm("norm", epsilon=transformer.NORM_EPSILON, param_dtype=self.param_dtype)
        tokens_BLD = constrain(norm(x_BLD), *transformer.TOKEN_AXES)
        # argmax gives the first position of the largest id.
        ends = jnp.argmax(ids, axis=1)
        pooled_BD = jnp.take_along_axis(tokens_BLD, ends[:, None, None], axis=1)[:, 0]
        if self.project:
            to_shared = Dense(size.projection, ("embed", "heads"), use_bias=False, name="projection", **types)
            pooled_BD = to_shared(pooled_BD).astype(jnp.float32)
        return tokens_BLD, pooled_BD


@dataclasses.dataclass(frozen=True)
class ClipText:
    """`TextTower` with its tokenizer, as a run's text encoder.

    Attributes:
      tokenizer: maps captions to ids; without one `tokenize` raises an error.
      weights: a local folder in the layout of Hugging Face (`text_encoder` of Stable Diffusion, a whole CLIP), a
        safetensors file of transformers or open_clip, or a hub id with its revision; "random" initialises them from
        the run's seed.
      size: which tower, see SIZES.
      layer: "penultimate" or "last"; both go through the final norm.
      project: whether to project the pooled state to the space shared with images; needs layer "last".
      length: tokens of every caption, with begin and end tokens; at most 77, or a multiple of 77 for so many windows.
        Windows after a caption's end are those of the empty caption, and masked.
      pad_id: padding id; -1 for the one that the tower was trained with, 0 for OpenCLIP's and 49407 for OpenAI's.
      tokenizer_files: a folder or file in a format of `vocabularies.py`; "" looks beside `weights`.
      dtype: type of the products.
      param_dtype: type of the parameters.

    Raises:
      UserError: an unknown size or layer, sizes that do not fit each other, or a tokenizer of another model.
    """

    tokenizer: SubwordTokenizer | None = None
    weights: str = ""
    size: str = "openclip-h"
    layer: str = "penultimate"
    project: bool = False
    length: int = POSITIONS
    pad_id: int = -1
    tokenizer_files: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"

    Tokenizer: ClassVar[type[SubwordTokenizer]] = SubwordTokenizer

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"text_encoder.size is {self.size!r}; {nearest(self.size, SIZES)}")
        if self.layer not in LAYERS:
            raise UserError(f"text_encoder.layer is {self.layer!r}; {nearest(self.layer, LAYERS)}")
        if self.project and self.layer != "last":
            raise UserError(
                "text_encoder.project needs text_encoder.layer='last', which the projection was trained on"
            )
        if not 2 <= self.length <= POSITIONS and (self.length % POSITIONS or not 0 < self.length <= _LONGEST):
            raise UserError(
                f"text_encoder.length is {self.length}; it must be from 2 to {POSITIONS}, or a multiple of {POSITIONS} "
                f"up to {_LONGEST}, for windows of {POSITIONS}"
            )
        if not -1 <= self.pad_id < VOCABULARY:
            raise UserError(
                f"text_encoder.pad_id is {self.pad_id}; it must be an id below {VOCABULARY}, or -1 for the size's own"
            )
        parse_dtype(self.dtype, "text_encoder.dtype")
        parse_dtype(self.param_dtype, "text_encoder.param_dtype")
        last = VOCABULARY - 1
        if self.tokenizer is not None and self.tokenizer.frame != (last - 1, last):
            raise UserError(
                f"the tokenizer of text_encoder {self.size!r} frames a text by the ids {self.tokenizer.frame}; "
                f"CLIP's has {(last - 1, last)}, with no tokens added"
            )
        if self.tokenizer is not None:
            self.tokenizer.check_ids(VOCABULARY, f"text_encoder 'clip', size {self.size!r}")

    @property
    def dim(self) -> int:
        """Width of the token embeddings."""
        return SIZES[self.size].width

    @property
    def windows(self) -> int:
        """How many windows a caption is read in."""
        return max(1, self.length // POSITIONS)

    @property
    def module(self) -> TextTower:
        """The linen module of these fields."""
        size = SIZES[self.size]
        depth = size.layers - (self.layer == "penultimate")
        return TextTower(size, depth, self.project, jnp.dtype(self.dtype), jnp.dtype(self.param_dtype))

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, length], mask bool [B, length]). A truncated caption keeps its end token."""
        if self.tokenizer is None:
            raise UserError(NO_TOKENIZER)
        pad_id = SIZES[self.size].pad_id if self.pad_id < 0 else self.pad_id
        if self.windows == 1:
            return self.tokenizer.encode(captions, self.length, pad_id)
        inside = POSITIONS - 2
        ids, mask = self.tokenizer.encode(captions, inside * self.windows + 2, pad_id)
        return in_windows(ids[:, 1:-1], mask.sum(1) - 2, self.windows, pad_id)

    def init(self, rng: jax.Array) -> Any:
        """Newly initialised parameters, boxed with their logical axes."""
        return self.module.init(rng, jnp.zeros((1, min(self.length, POSITIONS)), jnp.int32))["params"]

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids, mask [B, length] -> (tokens [B, length, dim], mask, pooled [B, P]), float32, with `mask` unchanged.

        The pooled state is that of the first window.
        """
        windows = rearrange(ids, "b (w l) -> (b w) l", w=self.windows)
        towers: Any = self.module.apply({"params": params}, windows)
        tokens, pooled = towers
        tokens = rearrange(tokens, "(b w) l d -> b (w l) d", w=self.windows)
        return tokens, mask, pooled[:: self.windows]

    def load(self) -> dict[str, Any]:
        """The parameters in `weights`, as numpy arrays.

        Raises:
          UserError: the files are missing, damaged or of another architecture.
        """
        opened = places.open_weights(
            self.weights, part="text_encoder", classes=CLASSES, field="text_encoder.weights"
        )
        module, size = self.module, SIZES[self.size]
        wanted = {
            "hidden_size": size.width,
            # Stable Diffusion 2 omits the last layer.
            "num_hidden_layers": tuple({module.depth, size.layers}),
            "num_attention_heads": size.heads,
            "intermediate_size": size.mlp,
            "hidden_act": size.activation,
            "layer_norm_eps": transformer.NORM_EPSILON,
        }
        opened.check(wanted, "text_config")
        names, rows = clip_weights.text_entries(opened.tensors, size.layers, module.depth, self.project)
        abstract = trees.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        return opened.renamed(names).load(rows, abstract, f"CLIP text {self.size!r}, {self.layer} layer")


def in_windows(
    words: np.ndarray, counts: np.ndarray, windows: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Captions' ids without begin and end -> (ids int32, mask bool), each [B, 77 windows], every window framed.

    Args:
      words: [B, 75 windows], of which the first are a caption's.
      counts: how many, [B].
      windows: how many windows.
      pad_id: follows the end token of a window.
    """
    inside = POSITIONS - 2
    # Words in each window, [B, windows].
    held = np.clip(counts[:, None] - inside * np.arange(windows), 0, inside)
    place = np.arange(POSITIONS)
    ids = np.full((len(words), windows, POSITIONS), pad_id, np.int32)
    ids[..., 1:-1] = np.where(
        place[:inside] < held[..., None], words.reshape(len(words), windows, inside), pad_id
    )
    ids[..., 0] = VOCABULARY - 2
    np.put_along_axis(ids, held[..., None] + 1, VOCABULARY - 1, axis=-1)
    mask = place < held[..., None] + 2
    # The first window is the empty caption's too.
    mask[:, 1:] &= (held[:, 1:] > 0)[..., None]
    return ids.reshape(len(words), -1), mask.reshape(len(words), -1)

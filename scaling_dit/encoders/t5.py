"""T5's encoder as a text encoder: v1.1, as in Imagen, DeepFloyd IF and PixArt, and Flan, which has the same shapes.

A bidirectional transformer without biases (arXiv 1910.10683, section 2.1; transformers' `T5EncoderModel`). Attention is
not scaled. Positions enter as a bias on the attention logits by distance; the first layer owns the bias, and all layers
add it. The MLP is a gated GELU (arXiv 2002.05202). The residual stream, norms, logits and softmax are float32, so
bfloat16 products are safe. float16 overflows and is not offered.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from scaling_dit import trees
from scaling_dit.encoders import transformer
from scaling_dit.encoders.subwords import NO_TOKENIZER, SubwordTokenizer
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.layers import Dense, constrain, parse_dtype, stack
from scaling_dit.weights import places, table

# Rows of the embedding table; the tokenizer has 32,100 ids.
VOCABULARY = 32_128
BUCKETS, MAX_DISTANCE = 32, 128
EPSILON = 1e-6
PAD, END = 0, 1
# Classes of transformers that hold an encoder.
CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of an encoder: width, width of a head, hidden width of the MLPs, layers and heads."""

    width: int
    head: int
    mlp: int
    layers: int
    heads: int


SIZES = {
    "small": Size(512, 64, 1024, 8, 6),
    "base": Size(768, 64, 2048, 12, 12),
    "large": Size(1024, 64, 2816, 24, 16),
    "xl": Size(2048, 64, 5120, 24, 32),
    "xxl": Size(4096, 64, 10240, 24, 64),
    # For tests and first runs.
    "tiny": Size(32, 8, 48, 2, 4),
}


class RmsNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale: Any = self.param("scale", init, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale.astype(jnp.float32)


class Block(nn.Module):
    """Attention and a gated MLP, each a residual branch after a norm: x, bias -> (x, None); see `stack`."""

    size: Size
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, _: None, bias: jax.Array) -> tuple[jax.Array, None]:
        size = self.size
        inner, width = size.heads * size.head, size.width
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def dense(name: str, features: int | tuple[int, ...], *axes: str | None, fan_in: float) -> Dense:
            init = nn.initializers.normal(fan_in**-0.5)
            return Dense(features, axes, use_bias=False, kernel_init=init, name=name, **types)

        normed = RmsNorm(self.param_dtype, name="norm1")(x_BTD)
        # Attention is not scaled, so small queries and keys keep the first logits near a variance of 1.
        fused = dense("qkv", (3, inner), "embed", None, "heads", fan_in=width * math.sqrt(size.head))(normed)
        q, k, v = (
            constrain(rearrange(fused[:, :, i], "b t (n h) -> b t n h", n=size.heads), *transformer.HEAD_AXES)
            for i in range(3)
        )
        out = rearrange(transformer.attend(q, k, v, bias, 1.0), "b t n h -> b t (n h)")
        x_BTD += dense("proj", width, "heads", "embed", fan_in=inner)(out)
        normed = RmsNorm(self.param_dtype, name="norm2")(x_BTD)
        halves = dense("fc1", (2, size.mlp), "embed", None, "mlp", fan_in=width)(normed)
        gated = jax.nn.gelu(halves[:, :, 0], approximate=True) * halves[:, :, 1]
        x_BTD += dense("fc2", width, "mlp", "embed", fan_in=size.mlp)(constrain(gated, *transformer.MLP_AXES))
        return constrain(x_BTD, *transformer.TOKEN_AXES), None


class T5Encoder(nn.Module):
    """The encoder over token ids, with scanned layers.

    Attributes:
      size: its shape.
      dtype: type of the products.
      param_dtype: type of the parameters.
    """

    size: Size
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Ids int32 [B, L], mask bool [B, L] (False hides a token) -> token states [B, L, width], float32."""
        size = self.size
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        words: Any = self.param("words", init, (VOCABULARY, size.width), self.param_dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(size.width**-0.5), (None, "heads"))
        distances: Any = self.param("distances", init, (BUCKETS, size.heads), self.param_dtype)
        bias_TSN = distances[buckets(ids.shape[1])].astype(jnp.float32)
        hidden_B11S = jnp.where(mask, 0.0, transformer.HIDDEN)[:, None, None, :]
        bias_BNTS = rearrange(bias_TSN, "t s n -> 1 n t s") + hidden_B11S
        x_BLD = constrain(words[ids].astype(jnp.float32), *transformer.TOKEN_AXES)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BLD, _ = stack(
            Block, size.layers, "blocks", x_BLD, None, bias_BNTS, remat="none", scan=True, size=size, **types
        )
        return constrain(RmsNorm(self.param_dtype, name="norm")(x_BLD), *transformer.TOKEN_AXES)


def buckets(length: int) -> np.ndarray:
    """The distance bucket of each query and key, int32 [length, length]. T5 learns a bias for each bucket.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets are single distances;
    the others are ranges that grow exponentially up to MAX_DISTANCE. All larger distances share the last bucket.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = BUCKETS // 2
    exact = half // 2
    far = np.abs(distance)
    # float32, as in the original code, so that a distance at the edge of a range falls into the same bucket.
    growth = np.log(np.maximum(far, 1).astype(np.float32) / exact) / np.float32(
        math.log(MAX_DISTANCE / exact)
    )
    large = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(far < exact, far, large)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class T5Text:
    """`T5Encoder` with its tokenizer, as a run's text encoder.

    Attributes:
      tokenizer: maps captions to ids; without one `tokenize` raises an error.
      weights: a local folder in the layout of Hugging Face (`text_encoder` of PixArt, a whole T5), a safetensors file,
        or a hub id with its revision; "random" initialises them from the run's seed.
      size: small, base, large, xl or xxl, the same for v1.1 and Flan.
      length: tokens of every caption, with the end token; 120 in PixArt-alpha.
      tokenizer_files: folder, tokenizer.json or spiece.model; "" looks beside `weights`.
      dtype: type of the products.
      param_dtype: type of the parameters.

    Raises:
      UserError: an unknown size, a length below 1, or a tokenizer of another model.
    """

    tokenizer: SubwordTokenizer | None = None
    weights: str = ""
    size: str = "xxl"
    length: int = 120
    tokenizer_files: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"

    Tokenizer: ClassVar[type[SubwordTokenizer]] = SubwordTokenizer

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"text_encoder.size is {self.size!r}; {nearest(self.size, SIZES)}")
        if self.length < 1:
            raise UserError(f"text_encoder.length is {self.length}; it must be at least 1, for the end")
        parse_dtype(self.dtype, "text_encoder.dtype")
        parse_dtype(self.param_dtype, "text_encoder.param_dtype")
        if self.tokenizer is not None and self.tokenizer.frame != (END,):
            raise UserError(
                f"the tokenizer of text_encoder 't5' frames a text by the ids {self.tokenizer.frame}; T5's has {(END,)}"
            )
        if self.tokenizer is not None:
            self.tokenizer.check_ids(VOCABULARY, f"text_encoder 't5', size {self.size!r}")

    @property
    def dim(self) -> int:
        """Width of the token embeddings."""
        return SIZES[self.size].width

    @property
    def module(self) -> T5Encoder:
        """The linen module of these fields."""
        return T5Encoder(SIZES[self.size], jnp.dtype(self.dtype), jnp.dtype(self.param_dtype))

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, length], mask bool [B, length]). A truncated caption keeps its end token."""
        if self.tokenizer is None:
            raise UserError(NO_TOKENIZER)
        return self.tokenizer.encode(captions, self.length, PAD)

    def init(self, rng: jax.Array) -> Any:
        """Newly initialised parameters, boxed with their logical axes."""
        ids = jnp.zeros((1, self.length), jnp.int32)
        return self.module.init(rng, ids, jnp.ones(ids.shape, bool))["params"]

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids, mask [B, length] -> (tokens [B, length, dim], mask, pooled [B, dim]), float32.

        T5 has no token for a whole text: the pooled state is the mean over the real tokens.
        """
        tokens: Any = self.module.apply({"params": params}, ids, mask)
        weights = mask[..., None].astype(jnp.float32)
        return tokens, mask, (tokens * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)

    def load(self) -> dict[str, Any]:
        """The parameters in `weights`, as numpy arrays.

        Raises:
          UserError: the files are missing, damaged or of another architecture.
        """
        opened = places.open_weights(
            self.weights, part="text_encoder", classes=CLASSES, field="text_encoder.weights"
        )
        size = SIZES[self.size]
        wanted = {
            "d_model": size.width,
            "d_kv": size.head,
            "d_ff": size.mlp,
            "num_layers": size.layers,
            "num_heads": size.heads,
            "feed_forward_proj": "gated-gelu",
            "vocab_size": VOCABULARY,
            "relative_attention_num_buckets": BUCKETS,
            "relative_attention_max_distance": MAX_DISTANCE,
        }
        opened.check(wanted)
        abstract = trees.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        names = encoder_entries(opened.tensors)
        return opened.renamed(names).load(encoder_rows(size.layers), abstract, f"T5 {self.size!r}")


def encoder_entries(tensors: Iterable[str]) -> dict[str, str]:
    """The entries of the encoder, new name -> name in the file, which may also hold a decoder and its head.

    Files hold the word table once or twice with the same values: as `shared` and as the encoder's own.
    """
    names = {name: name for name in tensors if name.startswith(("encoder.", "shared."))}
    own = names.pop("encoder.embed_tokens.weight", None)
    if own is not None:
        names.setdefault("shared.weight", own)
    return names


def encoder_rows(layers: int) -> list[table.Row]:
    """The table of `T5Encoder`: names in transformers -> our parameters."""
    at, to = "encoder.block.{i}.layer", "blocks_{i}"
    qkv = tuple(f"{at}.0.SelfAttention.{part}" for part in "qkv")
    gate = f"{at}.1.DenseReluDense.wi_0", f"{at}.1.DenseReluDense.wi_1"
    return [
        table.Row("shared.weight", "words"),
        table.Row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "distances"),
        *table.norm(f"{at}.0.layer_norm", f"{to}/norm1", layers, bias=False),
        *table.linear(qkv, f"{to}/qkv", layers, bias=False),
        *table.linear(f"{at}.0.SelfAttention.o", f"{to}/proj", layers, bias=False),
        *table.norm(f"{at}.1.layer_norm", f"{to}/norm2", layers, bias=False),
        *table.linear(gate, f"{to}/fc1", layers, bias=False),
        *table.linear(f"{at}.1.DenseReluDense.wo", f"{to}/fc2", layers, bias=False),
        *table.norm("encoder.final_layer_norm", "norm", bias=False),
    ]

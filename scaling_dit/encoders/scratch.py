"""A text encoder for small runs, trained from scratch: words of the captions and a small transformer.

The same for every backbone; trained jointly with it, or kept frozen as random features.
"""

import collections
import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from scaling_dit.data.sources import Source, contract
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json
from scaling_dit.nn.attention import SelfAttention
from scaling_dit.nn.layers import Initializer, Mlp, constrain, layer_norm, parse_dtype

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# With more words than this, the rarest become <unk>.
MAX_WORDS = 16_384
# Of every LayerNorm.
EPSILON = 1e-6
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Lower-case words and single punctuation marks -> ids; ids 0-3 are pad, bos, eos, unk."""

    # Word i has id i + 4.
    words: tuple[str, ...]

    @classmethod
    def build(cls, captions: Iterable[str], max_words: int = MAX_WORDS) -> "WordTokenizer":
        """The words of the captions, most frequent first, equally frequent ones by alphabet."""
        counts = collections.Counter(word for caption in captions for word in split_words(caption))
        return cls(tuple(sorted(counts, key=lambda word: (-counts[word], word))[:max_words]))

    @classmethod
    def load(cls, path: str | epath.Path) -> "WordTokenizer":
        """Reads what `save` wrote.

        Raises:
          UserError: missing or damaged file.
        """
        try:
            words = parse_json(epath.Path(path).read_bytes())["words"]
        except FileNotFoundError:
            raise UserError(f"no tokenizer at {path}; `train` writes it when a run starts") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path} is no tokenizer: a JSON object with a list "words" is needed') from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{path} is no tokenizer: its "words" must be a list of texts')
        if len(set(words)) < len(words):
            raise UserError(f'{path} is damaged: its "words" hold one twice; put the run\'s own file back')
        return cls(tuple(words))

    def save(self, path: str | epath.Path) -> None:
        """Writes the words as one JSON file, local or gs://."""
        epath.Path(path).write_text(json.dumps({"words": self.words}, ensure_ascii=False, indent=0) + "\n")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """bos, words, eos of each caption, padded or cut to `length`; a cut caption still ends with eos.

        Returns:
          ids int32 [B, length] and mask bool [B, length], True = real token. The empty caption is bos, eos.
        """
        ids = np.full((len(captions), length), PAD, np.int32)
        for row, caption in zip(ids, captions, strict=True):
            found = [self._ids.get(word, UNK) for word in split_words(caption)][: length - 2]
            row[: len(found) + 2] = [BOS, *found, EOS]
        return ids, ids != PAD

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, start=len(SPECIAL))}


def split_words(caption: str) -> list[str]:
    """Words and punctuation marks of a caption, in lower case and composed Unicode (NFC).

    >>> split_words("A red circle, left of it.")
    ['a', 'red', 'circle', ',', 'left', 'of', 'it', '.']
    """
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


def build_tokenizer(source: Source, samples: int = 4096, *, buckets: bool = False) -> WordTokenizer:
    """The words of a source: of all its captions if it lists them (`texts()`), else of `samples` records.

    The same source gives the same tokenizer; every paraphrase of a record counts. `buckets` counts the captions of all
    aspect buckets, of a source that holds them apart.
    """
    return WordTokenizer.build(_captions(source, samples, buckets))


def _captions(source: Source, samples: int, buckets: bool) -> Iterator[str]:
    texts = contract.texts(source, buckets=buckets)
    if texts is not None:
        yield from texts
        return
    count = len(source)
    # Drawn with replacement: without, numpy would hold a permutation of the whole source.
    chosen = (
        range(count)
        if count <= samples
        else np.unique(np.random.default_rng(0).integers(count, size=samples))
    )
    for index in chosen:
        yield from contract.read(source, int(index))["captions"]


class ScratchTextEncoder(nn.Module):
    """Bidirectional pre-LN transformer over word ids.

    Layer norms and softmax run in float32, matrix products in `dtype`.
    """

    vocab: int
    dim: int = 128
    depth: int = 2
    heads: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids int32 [B, L], mask bool [B, L] -> (tokens [B, L, dim], mask, pooled [B, dim]), float32.

        Padded positions carry no meaning; no real token and no pooled value depends on them.
        """
        # Amplitude-1 sinusoids have a mean square of 1/2; words get the same, so neither drowns the other.
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5**0.5), ("vocab", "embed"))
        embedding: Any = self.param("embedding", init, (self.vocab, self.dim))
        x_BLD = embedding[ids] + sincos_positions(ids.shape[1], self.dim)
        x_BLD = constrain(x_BLD, "batch", "length", "act_embed")
        for i in range(self.depth):
            # Each branch adds a variance of 1 / (2 depth), so that all of them together add about 1.
            x_BLD = Block(self.heads, 1 / (2 * self.depth), self.dtype, name=f"blocks_{i}")(x_BLD, mask)
        # Named, or XLA splits them as the kernels that read them are split, and gathers the batch to do so.
        tokens_BLD = constrain(layer_norm("norm", epsilon=EPSILON)(x_BLD), "batch", "length", "act_embed")
        weights_BL1 = mask[..., None].astype(jnp.float32)
        pooled_BD = (tokens_BLD * weights_BL1).sum(1) / jnp.maximum(weights_BL1.sum(1), 1.0)
        return tokens_BLD, mask, pooled_BD


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and on a residual branch: x [B, L, D], mask [B, L] -> [B, L, D]."""

    heads: int
    # Approximate variance of the sum that a branch adds at initialization.
    branch_variance: float
    dtype: str

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        def fan_in(features: int, variance: float = 1.0) -> Initializer:
            return nn.initializers.normal((variance / features) ** 0.5)

        dim = x_BLD.shape[-1]
        attend = SelfAttention(
            self.heads,
            qkv_bias=True,
            kernel_init=fan_in(dim),
            out_init=fan_in(dim, self.branch_variance),
            dtype=self.dtype,
            name="attn",
        )
        mlp = Mlp(
            4 * dim,
            activation="gelu_tanh",
            kernel_init=fan_in(dim),
            out_init=fan_in(4 * dim, self.branch_variance),
            dtype=self.dtype,
            name="mlp",
        )
        x_BLD += attend(layer_norm("norm1", epsilon=EPSILON)(x_BLD), mask_BL)
        x_BLD += mlp(layer_norm("norm2", epsilon=EPSILON)(x_BLD))
        return constrain(x_BLD, "batch", "length", "act_embed")


def sincos_positions(length: int, dim: int) -> np.ndarray:
    """Float32 [length, dim]: sines, then cosines, of wavelengths 2 pi to 20000 pi (arXiv 1706.03762, 3.5)."""
    frequencies = 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Scratch:
    """`ScratchTextEncoder` with its tokenizer, as a run's text encoder.

    Attributes:
      tokenizer: ids of words, see `build_tokenizer`.
      dim: width of the token embeddings; a multiple of `heads`, even.
      depth: transformer blocks.
      heads: attention heads.
      length: tokens of every caption, with bos and eos; longer captions are cut.
      dtype: of the matrix products.

    Raises:
      UserError: sizes that do not fit each other.
    """

    tokenizer: WordTokenizer
    dim: int = 128
    depth: int = 2
    heads: int = 4
    length: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        limits = {"dim": (self.dim, 2**17), "depth": (self.depth, 1000), "length": (self.length, 2**16)}
        for name, (value, most) in limits.items():
            if not 0 <= value <= most:
                raise UserError(f"text_encoder.{name} is {value}; it must be from 0 to {most}")
        if self.heads < 1 or self.dim < 2 or self.dim % self.heads or self.dim % 2:
            raise UserError(
                f"text_encoder.dim is {self.dim}, heads {self.heads}; dim must be even, a multiple of heads"
            )
        parse_dtype(self.dtype, "text_encoder.dtype")
        if self.length < 2:
            raise UserError(f"text_encoder.length is {self.length}; at least 2 are needed, for bos and eos")

    @property
    def module(self) -> ScratchTextEncoder:
        """The linen module of these sizes."""
        return ScratchTextEncoder(len(self.tokenizer), self.dim, self.depth, self.heads, self.dtype)

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, length], mask bool [B, length])."""
        return self.tokenizer.encode(captions, self.length)

    def init(self, rng: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""
        ids = jnp.zeros((1, self.length), jnp.int32)
        return self.module.init(rng, ids, jnp.ones(ids.shape, bool))["params"]

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids, mask [B, length] -> (tokens [B, length, dim], mask, pooled [B, dim]), float32."""
        return self.module.apply({"params": params}, ids, mask)  # type: ignore[return-value]

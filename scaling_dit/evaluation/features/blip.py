"""BLIP as ImageReward has it: a vision transformer, BERT that attends to its tokens, and a linear head on [CLS].

arXiv 2304.05977 (section 2.2) on arXiv 2201.12086. Parameters have the names of ImageReward.pt. Shape suffixes: B
batch, L text tokens, T image tokens, D width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath

from scaling_dit import trees
from scaling_dit.encoders import transformer
from scaling_dit.errors import UserError
from scaling_dit.evaluation.features import linear_head
from scaling_dit.nn.layers import ACTIVATIONS, NORMAL_002, Dense, layer_norm, patchify, stack
from scaling_dit.weights import places, state_dicts, table

# Of a caption, with its first and last token; longer ones are cut.
LENGTH = 35
_IMAGE_EPSILON, _TEXT_EPSILON = 1e-6, 1e-12
# Of rewards over ImageReward's training set.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_LAYERS = tuple(f"mlp.layers.{i}" for i in (0, 2, 4, 6, 7))


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of both towers.

    Attributes:
      image: side of an image in pixels.
      patch: side of a patch in pixels.
      image_width: width of the image tokens.
      image_layers: blocks of the image tower.
      image_heads: heads of its attention.
      width: width of the text tokens.
      layers: blocks of the text tower.
      heads: heads of its attention.
      words: size of the vocabulary.
      positions: rows of the position table.
    """

    image: int
    patch: int
    image_width: int
    image_layers: int
    image_heads: int
    width: int
    layers: int
    heads: int
    words: int
    positions: int = 512


SIZES = {
    # bert-base-uncased's words, and two that BLIP added.
    "large": Size(224, 16, 1024, 24, 16, 768, 12, 12, 30_524),
    # For tests.
    "tiny": Size(32, 16, 32, 2, 4, 24, 2, 3, 30_524),
}


class ImageTower(nn.Module):
    """Images float32 [B, S, S, 3], standardised as CLIP's -> tokens float32 [B, T, D]."""

    size: Size

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.size
        x_BTD = Dense(size.image_width, (None, "embed"), name="patches")(patchify(images, size.patch))
        first: Any = self.param("class", NORMAL_002, (size.image_width,))
        count = (size.image // size.patch) ** 2 + 1
        positions: Any = self.param("positions", NORMAL_002, (count, size.image_width))
        x_BTD = jnp.concatenate([jnp.broadcast_to(first, (len(x_BTD), 1, size.image_width)), x_BTD], axis=1)
        fields: dict[str, Any] = {"heads": size.image_heads, "mlp": 4 * size.image_width}
        fields |= {"dtype": jnp.float32, "param_dtype": jnp.float32, "epsilon": _IMAGE_EPSILON}
        x_BTD = transformer.blocks(x_BTD + positions, size.image_layers, None, activation="gelu", **fields)
        return layer_norm("norm", epsilon=_IMAGE_EPSILON)(x_BTD)


class TextBlock(nn.Module):
    """BERT's layer with cross-attention; each part adds to its input, and a LayerNorm follows: x -> (x, None)."""

    heads: int

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, _: None, bias: jax.Array, image_BTD: jax.Array
    ) -> tuple[jax.Array, None]:
        width = x_BLD.shape[-1]

        def attended(
            name: str, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
        ) -> jax.Array:
            q, k, v = (rearrange(part, "b t (n h) -> b t n h", n=self.heads) for part in (q, k, v))
            out = transformer.attend(q, k, v, bias, (width // self.heads) ** -0.5)
            return Dense(width, ("heads", "embed"), name=f"{name}_proj")(
                rearrange(out, "b t n h -> b t (n h)")
            )

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(name, epsilon=_TEXT_EPSILON)

        fused = Dense((3, width), ("embed", None, "heads"), name="self_qkv")(x_BLD)
        own = attended("self", fused[:, :, 0], fused[:, :, 1], fused[:, :, 2], bias)
        x_BLD = norm("norm1")(x_BLD + own)
        q_BLD = Dense(width, ("embed", "heads"), name="cross_q")(x_BLD)
        fused = Dense((2, width), ("embed", None, "heads"), name="cross_kv")(image_BTD)
        x_BLD = norm("norm2")(x_BLD + attended("cross", q_BLD, fused[:, :, 0], fused[:, :, 1], None))
        inner = ACTIVATIONS["gelu"](Dense(4 * width, ("embed", "mlp"), name="fc1")(x_BLD))
        return norm("norm3")(x_BLD + Dense(width, ("mlp", "embed"), name="fc2")(inner)), None


class TextTower(nn.Module):
    """Ids int32 [B, L], mask bool [B, L], image tokens [B, T, D] -> the state of [CLS], float32 [B, width]."""

    size: Size

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array, image_BTD: jax.Array) -> jax.Array:
        size = self.size
        words: Any = self.param("words", NORMAL_002, (size.words, size.width))
        positions: Any = self.param("positions", NORMAL_002, (size.positions, size.width))
        x_BLD = layer_norm("norm", epsilon=_TEXT_EPSILON)(words[ids] + positions[: ids.shape[1]])
        bias = jnp.where(mask[:, None, None], 0.0, transformer.HIDDEN)
        shared: dict[str, Any] = {"remat": "none", "scan": True, "heads": size.heads}
        return stack(TextBlock, size.layers, "blocks", x_BLD, None, bias, image_BTD, **shared)[0][:, 0]


def reward(
    size: Size, params: Mapping[str, Any], images: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """Prepared images [B, S, S, 3] with their captions' ids and mask [B, 35] -> standardised rewards float32 [B]."""
    tokens: Any = ImageTower(size).apply({"params": params["image"]}, images)
    state: Any = TextTower(size).apply({"params": params["text"]}, ids, mask, tokens)
    kernel, bias = params["head"]
    return (state @ kernel + bias - _MEAN) / _STD


def load(place: str, size: Size) -> dict[str, Any]:
    """The parameters of `reward` in a place of weights, as numpy arrays.

    Raises:
      UserError: the files are missing, damaged or of another network.
    """
    opened = places.open_weights(place, part="image_reward", classes=(), field="weights")
    head = {name for name in opened.tensors if name.startswith("mlp.")}
    rest = {name: name for name in opened.tensors if name not in head}
    made = state_dicts.load(
        rows(size), abstract(size), opened.renamed(rest).tensors, f"ImageReward ({place})"
    )
    return made | {"head": linear_head.fold(opened.tensors, _LAYERS, size.width, place)}


def abstract(size: Size) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of both towers."""
    images = jax.ShapeDtypeStruct((1, size.image, size.image, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, (size.image // size.patch) ** 2 + 1, size.image_width), jnp.float32)
    key = jax.random.key(0)
    image: Any = jax.eval_shape(ImageTower(size).init, key, images)["params"]
    mask = jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_)
    text: Any = jax.eval_shape(TextTower(size).init, key, ids, mask, tokens)["params"]
    return {"image": trees.unbox(image), "text": trees.unbox(text)}


def rows(size: Size) -> table.Table:
    """The table of ImageReward.pt without its head."""
    of, at, to = "blip.visual_encoder", "blip.visual_encoder.blocks.{i}", "image/blocks_{i}"
    layers = size.image_layers
    found: list[table.Row | table.Copy | table.Unread] = [
        table.Row(f"{of}.patch_embed.proj.weight", "image/patches/kernel", table.patch_conv(size.patch)),
        table.Row(f"{of}.patch_embed.proj.bias", "image/patches/bias"),
        table.Row(f"{of}.cls_token", "image/class", table.leading_axes(2)),
        table.Row(f"{of}.pos_embed", "image/positions", table.leading_axis()),
        *table.norm(f"{of}.norm", "image/norm"),
        *table.norm(f"{at}.norm1", f"{to}/norm1", layers),
        *table.norm(f"{at}.norm2", f"{to}/norm2", layers),
        *table.linear(f"{at}.attn.qkv", f"{to}/qkv", layers, parts=3),
        *table.linear(f"{at}.attn.proj", f"{to}/proj", layers),
        *table.linear(f"{at}.mlp.fc1", f"{to}/fc1", layers),
        *table.linear(f"{at}.mlp.fc2", f"{to}/fc2", layers),
    ]
    of, at, to, layers = (
        "blip.text_encoder",
        "blip.text_encoder.encoder.layer.{i}",
        "text/blocks_{i}",
        size.layers,
    )
    own, cross = f"{at}.attention", f"{at}.crossattention"
    found += [
        table.Row(f"{of}.embeddings.word_embeddings.weight", "text/words"),
        table.Row(f"{of}.embeddings.position_embeddings.weight", "text/positions"),
        *table.norm(f"{of}.embeddings.LayerNorm", "text/norm"),
        *table.linear(_joined(f"{own}.self", "query", "key", "value"), f"{to}/self_qkv", layers, bias=True),
        *table.linear(f"{own}.output.dense", f"{to}/self_proj", layers),
        *table.norm(f"{own}.output.LayerNorm", f"{to}/norm1", layers),
        *table.linear(f"{cross}.self.query", f"{to}/cross_q", layers),
        *table.linear(_joined(f"{cross}.self", "key", "value"), f"{to}/cross_kv", layers, bias=True),
        *table.linear(f"{cross}.output.dense", f"{to}/cross_proj", layers),
        *table.norm(f"{cross}.output.LayerNorm", f"{to}/norm2", layers),
        *table.linear(f"{at}.intermediate.dense", f"{to}/fc1", layers),
        *table.linear(f"{at}.output.dense", f"{to}/fc2", layers),
        *table.norm(f"{at}.output.LayerNorm", f"{to}/norm3", layers),
    ]
    # Of BLIP's contrastive training.
    for name in ("vision_proj", "text_proj"):
        found += [
            table.Unread(f"blip.{name}.weight", (None, None)),
            table.Unread(f"blip.{name}.bias", (None,)),
        ]
    return found


def _joined(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}" for name in names)


class Words:
    """bert-base-uncased's tokenizer by its vocab.txt.

    Raises:
      UserError: the file is damaged or of another vocabulary.
    """

    def __init__(self, place: str) -> None:
        # Compiled code that only this needs.
        import tokenizers

        # Not at the other line ends that Unicode has: they may be words.
        lines = epath.Path(place).read_text().rstrip("\n").split("\n")
        vocabulary = {word: number for number, word in enumerate(lines)}
        ids = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102}
        wrong = [word for word, number in ids.items() if vocabulary.get(word) != number]
        if wrong:
            raise UserError(
                f"{place} is not bert-base-uncased's vocab.txt: {wrong[0]} is not line {ids[wrong[0]] + 1}"
            )
        made = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=True)
        made.enable_truncation(LENGTH)
        made.enable_padding(length=LENGTH)
        self._tokenizer = made

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool [B, 35]; a caption that is cut keeps its end token."""
        found = self._tokenizer.encode_batch(list(captions))
        ids = np.array([one.ids for one in found], np.int32)
        return ids, np.array([one.attention_mask for one in found], bool)

"""Text encoders by name; image codecs are in `codec.py`."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import numpy as np
from etils import epath

from scaling_dit.components import Registry
from scaling_dit.encoders import contract
from scaling_dit.encoders.scratch import WordTokenizer

_REGISTRY = Registry(
    "text encoder",
    {
        "scratch": "scaling_dit.encoders.scratch:Scratch",
        "clip": "scaling_dit.encoders.clip:ClipText",
        "t5": "scaling_dit.encoders.t5:T5Text",
    },
    filled=("tokenizer",),
)


class Tokenizer(Protocol):
    """What a run keeps of a tokenizer: one file in its workdir.

    One that does not come from the captions of the run has a class method `read(fields)` too, which finds it by the
    fields of its text encoder; None where they name none.
    """

    @classmethod
    def load(cls, path: str | epath.Path) -> Self:
        """Reads what `save` wrote."""

    def save(self, path: str | epath.Path) -> None:
        """Writes one file, local or gs://."""


class TextEncoder(Protocol):
    """What a run needs of a text encoder: captions -> ids on the host, ids -> embeddings on the device."""

    @property
    def dim(self) -> int:
        """Width D of the token embeddings."""

    @property
    def length(self) -> int:
        """Number L of tokens of every caption, padded or cut."""

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, L], mask bool [B, L], True = real token)."""

    def init(self, rng: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids, mask [B, L] -> (tokens [B, L, D], mask [B, L], pooled [B, D]), float32."""


def create_text_encoder(name: str, *, tokenizer: Any, **fields: Any) -> TextEncoder:
    """A text encoder without weights.

    Args:
      name: "scratch", "clip", "t5" or "package.module:Name".
      tokenizer: what turns captions into ids for it; a user's own without such an argument does without.
      **fields: fields of that encoder, see `text_encoder_fields`.

    Raises:
      UserError: unknown name or field, or a user's own that does not hold to `TextEncoder`.
    """
    encoder: TextEncoder = _REGISTRY.create(name, fields, tokenizer=tokenizer)
    if name not in _REGISTRY.known:
        where = f"config.text_encoder {name!r}"
        contract.check_text_encoder(encoder, where, has_tokenizer=tokenizer is not None)
    return encoder


def tokenizer_type(name: str) -> type[Tokenizer]:
    """The class of the tokenizer that a text encoder takes: what it has as `Tokenizer`, else words of the captions.

    Raises:
      UserError: unknown name.
    """
    found: type[Tokenizer] = getattr(_REGISTRY.resolve(name), "Tokenizer", WordTokenizer)
    return found


def text_encoder_fields(name: str) -> dict[str, Any]:
    """The config-settable fields of a text encoder with their defaults.

    Raises:
      UserError: unknown name.
    """
    return _REGISTRY.fields(name)

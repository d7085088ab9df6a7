"""Tokenizes captions into subword ids, with the tokenizers of pretrained text encoders.

`vocabularies.py` converts every kind of vocabulary file to the format of the `tokenizers` library. A workdir keeps the
result as its `tokenizer.json`, so a run can generate images without the folder of the text encoder's weights, and
transformers is never needed.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from scaling_dit.encoders import vocabularies
from scaling_dit.errors import UserError
from scaling_dit.files import expand
from scaling_dit.weights import places

NO_TOKENIZER = (
    "the text encoder has no tokenizer: set config.text_encoder.weights to a folder that holds one, "
    "or config.text_encoder.tokenizer_files"
)


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library that adds begin and end tokens to a text.

    Attributes:
      definition: the text of its `tokenizer.json`.
    """

    definition: str

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self | None:
        """The tokenizer that a text encoder's fields name: in `tokenizer_files`, else beside the `weights`.

        None if both fields are empty: `count` and `plan` need no tokenizer.

        Raises:
          UserError: the files are missing or damaged.
        """
        files, weights = fields.get("tokenizer_files", ""), fields.get("weights", "")
        if files:
            return cls(vocabularies.read(epath.Path(expand(files))))
        if weights in ("", "random"):
            return None
        place = places.locate(weights, part="text_encoder", field="text_encoder.weights", weights=False)
        return cls(vocabularies.find(place))

    @classmethod
    def load(cls, path: str | epath.Path) -> Self:
        """Reads a tokenizer that `save` wrote.

        Raises:
          UserError: the file is missing or damaged.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"no tokenizer at {path}; `train` writes it when a run starts")
        return cls(vocabularies.read(path))

    def save(self, path: str | epath.Path) -> None:
        """Writes one file, local or gs://, which transformers can read as well."""
        epath.Path(path).write_text(self.definition)

    def __len__(self) -> int:
        return int(vocabularies.parse(self.definition).get_vocab_size())

    @functools.cached_property
    def largest(self) -> tuple[str, int]:
        """The token with the largest id, added tokens included, and that id."""
        vocabulary = vocabularies.parse(self.definition).get_vocab(with_added_tokens=True)
        return max(vocabulary.items(), key=lambda item: item[1], default=("", -1))

    def check_ids(self, rows: int, where: str) -> None:
        """Makes sure that every id has a row in an embedding table of so many rows.

        Raises:
          UserError: names the token whose id is the largest.
        """
        token, number = self.largest
        if number >= rows:
            raise UserError(
                f"the tokenizer of {where} gives {token!r} the id {number}, but its embedding table has the rows 0 to "
                f"{rows - 1}; the tokenizer that these weights came with, without added tokens, would be right"
            )

    @functools.cached_property
    def frame(self) -> tuple[int, ...]:
        """The ids of the empty caption: the begin and end tokens that the tokenizer adds."""
        return tuple(vocabularies.parse(self.definition).encode("").ids)

    def encode(self, captions: Sequence[str], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of each caption with begin and end tokens, truncated or padded to `length`.

        A truncated caption keeps its end token.

        Returns:
          ids int32 [B, length] and mask bool [B, length], True up to and including the end token.
        """
        found = self._cutting_at(length).encode_batch_fast(list(captions))
        counts = np.fromiter((len(caption) for caption in found), np.int64, len(found))
        mask = np.arange(length) < counts[:, None]
        ids = np.full(mask.shape, pad_id, np.int32)
        ids[mask] = np.fromiter((i for caption in found for i in caption.ids), np.int32, int(counts.sum()))
        return ids, mask

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a run has one tokenizer, and a cut is part of its state
    def _cutting_at(self, length: int) -> Any:
        tokenizer = vocabularies.parse(self.definition)
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        return tokenizer

"""Captions as the ids of subwords: the tokenizers that come with pretrained text encoders.

Whatever files a vocabulary is read from (`vocabularies.py`), it ends as one text in the format of the `tokenizers`
library, which a workdir keeps as its `tokenizer.json`. So a run can be drawn from where the weights' folder is not, and
transformers is needed nowhere.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from scaling_dit.encoders import vocabularies
from scaling_dit.errors import UserError
from scaling_dit.weights import places as pretrained

NO_TOKENIZER = (
    "the text encoder has no tokenizer: set config.text_encoder.weights to a folder that holds one, "
    "or config.text_encoder.tokenizer_files"
)


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, with the marks that frame a text.

    Attributes:
      definition: its `tokenizer.json`.
    """

    definition: str

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self | None:
        """The tokenizer that the fields of a text encoder name: its `tokenizer_files`, else what lies by its `weights`.

        None where they name neither: sizes can be counted and planned without one.

        Raises:
          UserError: nothing there, or damaged files.
        """
        files, weights = fields.get("tokenizer_files", ""), fields.get("weights", "")
        if files:
            return cls(vocabularies.read(epath.Path(files)))
        if weights in ("", "random"):
            return None
        place = pretrained.locate(weights, part="text_encoder", field="text_encoder.weights", weights=False)
        return cls(vocabularies.find(place))

    @classmethod
    def load(cls, path: str | epath.Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          UserError: missing or damaged file.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"no tokenizer at {path}; `train` writes it when a run starts")
        return cls(vocabularies.read(path))

    def save(self, path: str | epath.Path) -> None:
        """Writes one file, local or gs://, which transformers reads too."""
        epath.Path(path).write_text(self.definition)

    def __len__(self) -> int:
        return int(vocabularies.parse(self.definition).get_vocab_size())

    @functools.cached_property
    def frame(self) -> tuple[int, ...]:
        """The ids of the empty caption: the marks of beginning and end, as far as the tokenizer sets them."""
        return tuple(vocabularies.parse(self.definition).encode("").ids)

    def encode(self, captions: Sequence[str], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of each caption with its frame, cut or filled up to `length`; a cut caption still has its end.

        Returns:
          ids int32 [B, length] and mask bool [B, length], True up to and with the end.
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

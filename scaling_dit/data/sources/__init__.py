"""Where images and captions come from: one file per source, one name each.

`shapes` draws scenes, `folder:PATH` reads images with a `metadata.jsonl`, `webdataset:GLOB`, `tfds:NAME` and
`parquet:GLOB` read data sets in these formats, and "package.module:Class" is a user's own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

import numpy as np

from scaling_dit.components import Registry
from scaling_dit.errors import UserError

if TYPE_CHECKING:
    from scaling_dit.data.sources.encoded import EncodedSource

_REGISTRY = Registry(
    "source",
    {
        "shapes": "scaling_dit.data.shapes.source:ShapesSource",
        "folder": "scaling_dit.data.sources.folder:FolderSource",
        "webdataset": "scaling_dit.data.sources.webdataset:WebdatasetSource",
        "tfds": "scaling_dit.data.sources.tfds:TfdsSource",
        "parquet": "scaling_dit.data.sources.parquet:ParquetSource",
        "latents": "scaling_dit.data.prepared.source:LatentsSource",
    },
)
# Source -> what stands after the colon in its name, which fills its field `path`, and an example.
_PATHS = {
    "folder": ("folder", "PATH", "folder:/data/birds"),
    "webdataset": ("files", "GLOB", "webdataset:/data/laion/*.tar"),
    "tfds": ("data set", "NAME", "tfds:coco_captions"),
    "parquet": ("files", "GLOB", "parquet:/data/birds/*.parquet"),
    "latents": ("folder", "PATH", "latents:/data/birds_latents"),
}


class Record(TypedDict):
    """One example."""

    image: NotRequired[np.ndarray]  # uint8 [image_size, image_size, 3], RGB
    latents: NotRequired[np.ndarray]  # in place of an image: the moments of its latents, bfloat16 [h, w, M]
    captions: Sequence[str]  # at least one; may be lazy
    kinds: NotRequired[
        Sequence[str]
    ]  # of the captions, in their order: alt | synthetic | long; left out = all alt
    key: str  # names the example within its source


class Source(Protocol):
    """Random access to records; read from several threads at once.

    A source may also offer `texts() -> Iterable[str]`, every caption without reading an image: the word list of a
    tokenizer is then built from all of them.
    """

    @property
    def image_size(self) -> int:
        """Height and width of every image, in pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def describe(self) -> str:
        """One line for logs: what it is, how many examples, which split."""

    def held_out(self) -> "Source":
        """The evaluation split, disjoint from this one."""


def create_source(name: str, **fields: Any) -> Source:
    """The training split of a source.

    Args:
      name: "shapes", "folder:PATH", "webdataset:GLOB", "tfds:NAME", "parquet:GLOB" or "package.module:Class".
      **fields: fields of that source, see `source_fields`.

    Raises:
      UserError: unknown name or field, or a source that cannot be opened.
    """
    name, filled = _split(name)
    return _REGISTRY.create(name, fields, **filled)


def create_raw_source(name: str, **fields: Any) -> "EncodedSource":
    """A source of image files as they are stored, both splits: for `samples(shard)`, which opens that shard alone.

    Raises:
      UserError: as `create_source`, or a source of another kind.
    """
    from scaling_dit.data.sources.encoded import EncodedSource  # builds on this module

    name, filled = _split(name)
    if not issubclass(_REGISTRY.resolve(name), EncodedSource):
        raise UserError(f"source {name!r} holds no image files; give folder:, webdataset:, parquet: or tfds:")
    return _REGISTRY.create(name, fields, split="both", **filled)


def source_fields(name: str) -> dict[str, Any]:
    """The config-settable fields of a source with their defaults.

    Raises:
      UserError: unknown name.
    """
    return _REGISTRY.fields(_split(name)[0])


def _split(name: str) -> tuple[str, dict[str, str]]:
    """A source's name without what is part of it: "folder:PATH" -> "folder" and its `path`."""
    kind, _, path = name.partition(":")
    if kind not in _PATHS:
        return name, {}
    if not path:
        what, form, example = _PATHS[kind]
        raise UserError(f"source {name!r} names no {what}; write {kind}:{form}, for example {example}")
    return kind, {"path": path}

"""Where images and captions come from: a row and a file for each source.

`folder:PATH` reads images with a `metadata.jsonl`, `webdataset:GLOB`, `tfds:NAME` and `parquet:GLOB` read data sets in
these formats, all of them `ImageFileSource`s; `latents:PATH` reads what `prepare` wrote, `shapes` makes scenes, and
`shapes_edits` edits of scenes. A "package.module:Class" is a user's own. `contract.py` says what a source is.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from scaling_dit.components import Registry
from scaling_dit.data.sources import contract
from scaling_dit.data.sources.contract import Record, Source
from scaling_dit.errors import UserError
from scaling_dit.files import expand

if TYPE_CHECKING:
    from scaling_dit.data.sources.image_files import ImageFileSource

__all__ = ["SOURCES", "Record", "Source", "create_raw_source", "create_source", "source_fields"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A built-in source.

    Attributes:
      place: of the class, "module:Class", which is imported when it is asked for.
      form: what stands after the colon of its name and fills its field `path`; "" = no colon.
      what: what that names, for error lines.
      example: a whole name.
    """

    place: str
    form: str = ""
    what: str = ""
    example: str = ""


SOURCES: dict[str, Row] = {
    "shapes": Row("scaling_dit.data.shapes.source:ShapesSource"),
    "shapes_edits": Row("scaling_dit.data.shapes.edit_source:ShapesEditsSource"),
    "folder": Row("scaling_dit.data.sources.folder:FolderSource", "PATH", "folder", "folder:/data/birds"),
    "webdataset": Row(
        "scaling_dit.data.sources.webdataset:WebdatasetSource",
        "GLOB",
        "files",
        "webdataset:/data/laion/*.tar",
    ),
    "tfds": Row("scaling_dit.data.sources.tfds:TfdsSource", "NAME", "data set", "tfds:coco_captions"),
    "parquet": Row(
        "scaling_dit.data.sources.parquet:ParquetSource", "GLOB", "files", "parquet:/data/birds/*.parquet"
    ),
    "latents": Row(
        "scaling_dit.data.prepared.source:PreparedSource", "PATH", "folder", "latents:/data/birds_latents"
    ),
}
_REGISTRY = Registry("source", {name: row.place for name, row in SOURCES.items()}, check=contract.check_class)


def create_source(name: str, **fields: Any) -> Source:
    """The training split of a source.

    Args:
      name: a name in SOURCES, with what its row wants after the colon ("folder:PATH"), or "package.module:Class".
      **fields: fields of that source, see `source_fields`.

    Raises:
      UserError: unknown name or field, a class that is no source, or a source that cannot be opened.
    """
    kind, filled = _opened(name)
    source: Source = _REGISTRY.create(kind, fields, **filled)
    contract.check_source(source, name)
    return source


def create_raw_source(name: str, **fields: Any) -> "ImageFileSource":
    """A source of image files as they are stored, both splits: for `samples(shard)`, which opens that shard alone.

    Raises:
      UserError: as `create_source`, or a source of another kind.
    """
    # Builds on this module.
    from scaling_dit.data.sources.image_files import ImageFileSource

    kind, filled = _opened(name)
    if not issubclass(_REGISTRY.resolve(kind), ImageFileSource):
        known = [key for key in SOURCES if issubclass(_REGISTRY.resolve(key), ImageFileSource)]
        raise UserError(f"source {name!r} holds no image files; give {', '.join(f'{key}:' for key in known)}")
    source: ImageFileSource = _REGISTRY.create(kind, fields, split="both", **filled)
    return source


def source_fields(name: str) -> dict[str, Any]:
    """The config-settable fields of a source with their defaults.

    Raises:
      UserError: unknown name.
    """
    return _REGISTRY.fields(_split(name)[0])


def _opened(name: str) -> tuple[str, dict[str, str]]:
    """As `_split`, with ~ and $VARIABLES of the path expanded."""
    kind, filled = _split(name)
    return kind, {field: expand(path) for field, path in filled.items()}


def _split(name: str) -> tuple[str, dict[str, str]]:
    """A source's name without what is part of it: "folder:PATH" -> "folder" and its `path`."""
    kind, _, path = name.partition(":")
    row = SOURCES.get(kind)
    if row is None or not row.form:
        return name, {}
    if not path:
        raise UserError(
            f"source {name!r} names no {row.what}; write {kind}:{row.form}, for example {row.example}"
        )
    return kind, {"path": path}

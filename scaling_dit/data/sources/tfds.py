"""Data sets of TensorFlow Datasets in ArrayRecord files, read without TensorFlow: `tfds:NAME` (extra `[tfds]`).

NAME is `set`, `set/config`, either with `:version`, below `data_dir`; or the path of a folder with a
`dataset_info.json`, local or gs://. The set must have been prepared with `file_format="array_record"`, which alone
gives random access here. A set in another format is refused, and the line names the command that converts it. Parquet
is refused too: the parquet writer of TFDS 4.9 drops records without a word, so such a set must be prepared again.

`coco_captions` and `laion400m` are known; of another set `image_field` and `alt_fields` say where image and captions
stand. A field inside another is written with a slash: "captions/text".

What is damaged (`data/damage.py`) is of one kind:

    unreadable_record  the file's own checksum is wrong, or what it holds is no record of this set
    missing_image      the image is empty
    bad_text           a caption that is not UTF-8
    missing_caption    a record without the caption fields
    empty_caption      every caption is blank
    unreadable_image   see `data/images.py`
    too_large          see `data/images.py`

A file that is cut or holds another number of records than the set's metadata says stops the run when it is opened.
"""

import dataclasses
import functools
import os
import re
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.fields import CaptionFields, plain
from scaling_dit.data.sources.image_files import Files, ImageFileSource, RawSample, Shard, row_hashes
from scaling_dit.errors import UserError, nearest
from scaling_dit.files import expand

INFO = "dataset_info.json"
# Set -> its image field and its fields of alt-text.
FIELDS = {
    "coco_captions": ("image", ("captions/text",)),
    "laion400m": ("image", ("caption",)),
}


@dataclasses.dataclass(frozen=True)
class TfdsSource(ImageFileSource):
    """The records of one split of a prepared set, as RGB squares.

    Attributes:
      data_dir: folder of prepared sets; "" = the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets.
      tfds_split: the set's own split, such as "train" or "train[:10%]"; `held_out_fraction` divides it once more.
      image_field: name of the image feature; "" = that of a known set.
      alt_fields: names of text features with alt-text or human captions; () = those of a known set.
      synthetic_fields: the same of synthetic captions.
      long_fields: the same of long captions.

    Raises:
      UserError: no such set, split or field, a set in another format, a file that is cut, or no image left.
    """

    data_dir: str = ""
    tfds_split: str = "train"
    image_field: str = ""
    alt_fields: tuple[str, ...] = ()
    synthetic_fields: tuple[str, ...] = ()
    long_fields: tuple[str, ...] = ()

    _noun = "tfds"

    def _list(self) -> Files:
        files = self._opened.files
        starts = np.cumsum([0, *(file.take for file in files)]).tolist()

        def opened(number: int) -> Shard:
            file = files[number]
            _check_count(file)
            hashes = row_hashes(os.path.basename(file.filename), file.skip + file.take)[file.skip :]
            return Shard(hashes, (), (file.filename, file.skip, starts[number]))

        return Files(tuple(os.path.basename(file.filename) for file in files), opened)

    def _read(self, shard: int, row: int) -> RawSample:
        path, skip, start = self._shard(shard).rows
        where = f"{path} record {skip + row}"
        try:
            example = self._opened.examples[start + row]
        except MemoryError:
            raise
        except Exception as error:
            # The reader and protobuf have errors of their own.
            what = f"cannot read the record: {_line(error)}"
            raise DamagedRecord("unreadable_record", where, what) from error
        image = example.get(self._opened.image_field)
        if not image:
            raise DamagedRecord("missing_image", where, f"{self._opened.image_field!r} is empty")
        captions, kinds = self._opened.captions.read(example, where)
        metadata = plain({k: v for k, v in example.items() if k != self._opened.image_field})
        return RawSample(f"{self._files.names[shard]}/{skip + row}", image, captions, kinds, metadata, where)

    @functools.cached_property
    def _opened(self) -> "_Opened":
        return _open_set(self)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A set ready to read."""

    # Random access to mappings, the image as its encoded file.
    examples: Any
    # filename, skip, take, examples_in_shard of each file.
    files: Any
    image_field: str
    captions: CaptionFields


def _open_set(source: TfdsSource) -> _Opened:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("a tfds: source needs the extra tfds: pip install 'scaling-dit[tfds]'") from None
    folder = find(source.path, source.data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        # JSON, protobuf and features have errors of their own.
        raise UserError(f"{folder}: no prepared TFDS set: {_line(error)}") from error
    _check_format(folder, {file_format.value for file_format in builder.info.available_file_formats()})
    image_field, captions = _fields(source, builder, tfds.features)
    try:
        builder.info.splits[source.tfds_split]
    except (KeyError, ValueError):
        name = re.split(r"\W", source.tfds_split)[0]
        raise UserError(
            f"source.tfds_split is {source.tfds_split!r}; {nearest(name, builder.info.splits)}"
        ) from None
    examples = builder.as_data_source(
        source.tfds_split, decoders={image_field: tfds.decode.SkipDecoding()}, file_format="array_record"
    )
    # Those of the format that was chosen just now.
    files = builder.info.splits[source.tfds_split].file_instructions
    return _Opened(examples, files, image_field, captions)


def find(name: str, data_dir: str = "") -> epath.Path:
    """The folder of a prepared set: NAME as the module says, of several versions the newest.

    TFDS finds a set by importing its builder, which for most needs TensorFlow; the folders say the same.

    Raises:
      UserError: there is none, or several configs.
    """
    if (epath.Path(name) / INFO).exists():
        return epath.Path(name)
    root = epath.Path(expand(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    base, _, version = name.partition(":")
    folder = root / base
    if not folder.is_dir():
        known = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        hint = nearest(base, known) if known else "set config.source.data_dir"
        raise UserError(f"no TFDS set {base!r} in {root}; {hint}")
    versions = [path.parent for path in folder.glob(f"*/{INFO}")]
    if not versions:
        configs = sorted(path.parent.parent.name for path in folder.glob(f"*/*/{INFO}"))
        if len(set(configs)) != 1:
            found = ", ".join(f"{base}/{config}" for config in sorted(set(configs))) or "none"
            raise UserError(f"{folder}: TFDS set {base!r} needs one prepared config; there is {found}")
        versions = [path.parent for path in folder.glob(f"*/*/{INFO}")]
    if version:
        versions = [path for path in versions if path.name == version]
        if not versions:
            raise UserError(f"{folder}: no version {version!r} of TFDS set {base!r}")
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _check_format(folder: epath.Path, formats: set[str]) -> None:
    if "array_record" in formats:
        return
    if "parquet" in formats:
        why = (
            "the parquet writer of TFDS drops records; prepare the set again with --file_format=array_record"
        )
        raise UserError(f"{folder}: the set is in parquet: {why}")
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    raise UserError(
        f"{folder}: the set is in {' and '.join(sorted(formats))}, without random access; "
        f"run first (tensorflow and mlcroissant must be installed): {command}"
    )


def _fields(source: TfdsSource, builder: Any, features: Any) -> tuple[str, CaptionFields]:
    """The fields that are read, each checked against the set's features."""
    known_image, known_alt = FIELDS.get(builder.name, ("", ()))
    image_field = source.image_field or known_image
    given = source.alt_fields or source.synthetic_fields or source.long_fields
    captions = CaptionFields(
        source.alt_fields if given else known_alt, source.synthetic_fields, source.long_fields
    )
    known = dict(_flat(builder.info.features))
    images = sorted(name for name, feature in known.items() if isinstance(feature, features.Image))
    if image_field not in images:
        right = f"it must be one of its images: {', '.join(images) or 'it has none'}"
        raise UserError(f"source.image_field is {image_field!r} for TFDS set {builder.name!r}; {right}")
    if not captions.names():
        texts = sorted(name for name, feature in known.items() if feature.np_dtype == np.object_)
        right = f"its text fields are {', '.join(texts) or 'none'}"
        raise UserError(
            f"source.alt_fields is () and TFDS set {builder.name!r} is not known; set it: {right}"
        )
    for name in captions.names():
        if name not in known:
            raise UserError(
                f"a caption field of the source is {name!r}; TFDS set {builder.name!r}: {nearest(name, known)}"
            )
    return image_field, captions


def _flat(features: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every feature that holds no others, by its name with slashes."""
    # Of a sequence.
    inner = getattr(features, "feature", features)
    if not hasattr(inner, "items"):
        return [(prefix, inner)]
    return [
        found
        for name, feature in inner.items()
        for found in _flat(feature, f"{prefix}/{name}" if prefix else name)
    ]


def _line(error: Exception) -> str:
    """The first line of a library's message; some have none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_count(file: Any) -> None:
    """Makes sure that an ArrayRecord file is whole and holds what the metadata says."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(file.filename))
        count = reader.num_records()
        reader.close()
    except Exception as error:
        raise UserError(
            f"{file.filename}: no whole ArrayRecord file, cut or damaged: {_line(error)}"
        ) from error
    if count != file.examples_in_shard:
        raise UserError(
            f"{file.filename}: it holds {count} records and {INFO} says {file.examples_in_shard}; copy it again"
        )

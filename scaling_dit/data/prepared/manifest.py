"""What a prepared set says of itself: `manifest.json`, written once all of its shards are there.

    prepare.json             what was asked for; written first, so that nothing else is mixed in
    shards/00000.train.array_record, shards/00000.held_out.array_record, ...
                             the records (`records.py`) that raw shard 0 gave; none for a split without records
    parts/00000.json         what was done for raw shard 0: written after its files, so it vouches for them
    manifest.json            all parts put together, with what training checks

None of these files depends on the time, the number of processes or how often they were killed.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError

FORMAT = 1
# Of sets with conditions, which earlier versions do not read.
FORMAT_2 = 2
MANIFEST, REQUEST, PARTS, SHARDS = "manifest.json", "prepare.json", "parts", "shards"
SPLITS = ("train", "held_out")
# Of each reason that the manifest shows.
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file."""

    # Relative to the set's folder.
    file: str
    # train | held_out
    split: str
    # Height, width of its images, in px.
    size: tuple[int, int]
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Part:
    """What one raw shard gave.

    Attributes:
      input: name of the raw shard.
      read: samples in it, and what else was found damaged.
      shards: the files written.
      filtered: reason -> samples left out on purpose.
      damaged: what was damaged, in the order of the raw shard: {"kind", "where", "what"}.
    """

    input: str
    read: int
    shards: tuple[Shard, ...]
    filtered: Mapping[str, int]
    damaged: Sequence[Mapping[str, str]]

    def to_json(self) -> str:
        """Sorted JSON; `from_json` gives back an equal one."""
        return files.to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        fields = files.parse_json(text)
        return cls(**{**fields, "shards": tuple(_shard(row) for row in fields["shards"])})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A finished set.

    Attributes:
      codec: what made the moments: {"name", "sha256", and its fields} (see `codec_identity`).
      image_size: px; of buckets the side of the square one.
      moments: "HxW" px -> shape [h, w, M] of the moments of such images.
      request: what was asked for, see `encode.Request`.
      inputs: number of raw shards.
      read: raw samples, and what else was found damaged.
      records: split -> number of records.
      left_out: reason -> {"count", "examples"}; examples only of what was damaged.
      shards: the files, in the order of the raw shards.
      conditions: name -> what the records hold of it: masks, variants, seed, class and fields.
    """

    codec: Mapping[str, Any]
    image_size: int
    moments: Mapping[str, Sequence[int]]
    request: Mapping[str, Any]
    inputs: int
    read: int
    records: Mapping[str, int]
    left_out: Mapping[str, Any]
    shards: tuple[Shard, ...]
    format: int = FORMAT
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", FORMAT_2 if self.conditions else FORMAT)

    def to_json(self) -> str:
        """Sorted JSON with a line for each shard; `read` gives back an equal one."""
        fields = dataclasses.asdict(self)
        if not self.conditions:
            # A set without any is as it was before there were some.
            del fields["conditions"]
        rows = ",\n  ".join(json.dumps(row, sort_keys=True) for row in fields.pop("shards"))
        return files.to_json(fields)[: -len("\n}\n")] + f',\n "shards": [\n  {rows}\n ]\n}}\n'


def merge(parts: Sequence[Part], **about: Any) -> Manifest:
    """The manifest of all parts, in the order of the raw shards; `about` are the fields that are not theirs."""
    counts = Counter[str]()
    examples: dict[str, list[Mapping[str, str]]] = {}
    records = dict.fromkeys(SPLITS, 0)
    for part in parts:
        counts.update(part.filtered)
        for fault in part.damaged:
            counts[fault["kind"]] += 1
            shown = examples.setdefault(fault["kind"], [])
            if len(shown) < EXAMPLES:
                shown.append({"where": fault["where"], "what": fault["what"]})
        for shard in part.shards:
            records[shard.split] += shard.records
    return Manifest(
        inputs=len(parts),
        read=sum(part.read for part in parts),
        records=records,
        left_out={
            reason: {"count": count, "examples": examples.get(reason, [])}
            for reason, count in sorted(counts.items())
        },
        shards=tuple(shard for part in parts for shard in part.shards),
        **about,
    )


def read(folder: epath.Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
      UserError: no such folder, a set that is not finished, or a manifest that is damaged or of another format.
    """
    path = folder / MANIFEST
    if kind := files.special(path):
        raise UserError(f"{path} is {kind}, it cannot be read as a file")
    if not path.exists():
        if (folder / REQUEST).exists():
            done = len(list((folder / PARTS).glob("*.json"))) if (folder / PARTS).exists() else 0
            raise UserError(
                f"{folder} is a prepared set that is not finished ({done} parts done); run its `prepare` again"
            )
        raise UserError(f"no prepared set in {folder}: {MANIFEST} is missing; `prepare` writes one")
    try:
        fields = files.parse_json(path.read_bytes())
        if fields["format"] not in (FORMAT, FORMAT_2):
            raise UserError(
                f"{path} is of format {fields['format']}; this version reads {FORMAT} and {FORMAT_2}, so prepare "
                "the set again"
            )
        for name in ("codec", "moments", "request", "records", "left_out", "conditions"):
            if name == "conditions" and fields["format"] == FORMAT:
                continue
            if not isinstance(fields[name], dict):
                raise TypeError(f"{name} is no object")
        return Manifest(**{**fields, "shards": tuple(_shard(row) for row in fields["shards"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); "
            "delete it and run `prepare` again, which keeps what is done"
        ) from None


def _shard(row: Mapping[str, Any]) -> Shard:
    shard = Shard(**{**row, "size": tuple(row["size"])})
    if (
        not isinstance(shard.file, str)
        or not isinstance(shard.records, int)
        or not isinstance(shard.bytes, int)
    ):
        raise TypeError(f"a shard has a file, records and bytes, not {row}")
    return shard


def size_name(size: Sequence[int]) -> str:
    """(height, width) -> "HxW"."""
    return f"{size[0]}x{size[1]}"

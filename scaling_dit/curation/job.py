"""The `prepare` verb: a raw source to a prepared set, part by part, by any number of processes.

Every raw shard gives one part. Process i of n makes the parts i, i + n, i + 2n, ... that are not there; what is there
is kept, so the same command after a kill goes on, also with another number of processes. A part is there once its
`parts/NNNNN.json` is, which is written after its shards. Whoever finds all parts there writes the manifest; if two do,
they write the same bytes.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import files
from scaling_dit.curation import encode, filters, shape, sidecar
from scaling_dit.curation.progress import Progress
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.prepared import manifest
from scaling_dit.data.sources import create_raw_source
from scaling_dit.data.sources.image_files import ImageFileSource
from scaling_dit.encoders.codec import check_own_codec, create_codec
from scaling_dit.errors import UserError, nearest
from scaling_dit.model import codec_identity as identity

THREADS = max(2, os.cpu_count() or 2)  # that decode
_LOOKED_AT = 1000  # samples, for the names of their metadata


@dataclasses.dataclass(frozen=True)
class Options:
    """What `prepare` is asked for beside the config; each but `process` changes what is written.

    Attributes:
      batch: pictures encoded at once.
      min_size: px; pictures with a shorter side are left out.
      buckets: bring pictures to the nearest of a fixed table of aspect ratios, not to squares.
      filter: expression over metadata; "" keeps all.
      columns: names of metadata that records keep.
      kept: folder of the lists of `filter`; "" = none.
      captions: folder of the captions of `caption`; "" = none.
      process: (i, n): this one of n processes.
    """

    batch: int = 64
    min_size: int = 0
    buckets: bool = False
    filter: str = ""
    columns: tuple[str, ...] = ()
    kept: str = ""
    captions: str = ""
    process: tuple[int, int] = (0, 1)


def main(config: ConfigDict, out: str, options: Options) -> int:
    """Makes this process's parts of the set in `out`, and the manifest if they were the last; returns the exit code.

    Raises:
      UserError: a source without encoded images, options that do not fit it, a folder of another set, or a file that
        cannot be read or written.
    """
    folder = epath.Path(out)
    source = open_source(config)
    codec = create_codec(**config.codec.to_dict())
    check_own_codec(codec, config.codec.name, source.image_size)
    params = identity.codec_weights(config, codec)
    selection = encode.Selection(
        sizes=shape.bucket_sizes(source.image_size, options.buckets),
        min_size=options.min_size,
        keep=filters.parse(options.filter) if options.filter else None,
        columns=options.columns,
        held_out_fraction=source.held_out_fraction,
        max_pixels=source.max_pixels,
    )
    encoder = encode.Encoder(codec, params, options.batch)
    moments = {manifest.size_name(size): encoder.moments_shape(size) for size in selection.sizes}
    made_by = identity.codec_identity(config, codec, params)
    asked = request(config, source, options, encoder.batch)
    check_columns(source, options.columns)
    claim(folder, {"codec": made_by, **asked})
    make_parts(source, selection, encoder, folder, options)
    about = {"codec": made_by, "image_size": source.image_size, "moments": moments, "request": asked}
    return finish(folder, len(source.shards()), about)


def open_source(config: ConfigDict) -> ImageFileSource:
    """The raw source of a config; its shards are opened one by one, and no damage in it is too much.

    Raises:
      UserError: the source holds no encoded images.
    """
    return create_raw_source(**config.source.to_dict())


def check_columns(source: ImageFileSource, columns: Sequence[str]) -> None:
    """Makes sure that the metadata to keep is there: each name in one of the first `_LOOKED_AT` sound samples.

    The samples of a source may differ in what is known of them. Reading stops as soon as every name was seen.

    Raises:
      UserError: a name was not.
    """
    missing, seen, looked = list(columns), set[str](), 0
    shards = range(len(source.shards())) if missing else ()
    samples = itertools.chain.from_iterable(map(source.samples, shards))
    sound = (sample for sample in samples if not isinstance(sample, DamagedRecord))
    for sample in itertools.islice(sound, _LOOKED_AT):
        looked += 1
        seen |= sample.metadata.keys()
        missing = [name for name in missing if name not in seen]
        if not missing:
            return
    if missing and looked:
        hint = nearest(missing[0], seen) if seen else "they have no metadata"
        raise UserError(f"--columns={missing[0]}: none of the first {looked} samples has it; {hint}")


def request(config: ConfigDict, source: ImageFileSource, options: Options, batch: int) -> dict[str, Any]:
    """What decides the bytes of a set, apart from the codec: source, shards, options.

    Raises:
      UserError: `kept` or `captions` is no folder of such files.
    """
    names = source.shards()
    asked = dataclasses.asdict(options) | {"batch": batch}
    del asked["process"]
    fields = {key: value for key, value in config.source.to_dict().items() if key != "max_damaged"}
    for name, what in (("kept", sidecar.FILTER), ("captions", sidecar.CAPTIONS)):
        if folder := asked[name]:  # lists of the same folder may have been made anew
            asked[f"{name}_sha256"] = sidecar.settings_sha256(folder, what)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"source": fields, "inputs": {"count": len(names), "sha256": digest}, **asked}


def claim(folder: epath.Path, asked: Mapping[str, Any]) -> None:
    """Makes a folder this set's, or checks that it is.

    Raises:
      UserError: it holds a set that was prepared in another way.
    """
    for name in (manifest.PARTS, manifest.SHARDS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    files.claim(
        folder / manifest.REQUEST, {"format": manifest.FORMAT, **asked}, "was prepared in another way"
    )


def make_parts(
    source: ImageFileSource,
    selection: encode.Selection,
    encoder: encode.Encoder,
    folder: epath.Path,
    options: Options,
) -> None:
    """Makes the parts of this process that are not there."""
    names = source.shards()
    process, processes = options.process
    mine = range(process, len(names), processes)
    with Progress(len(mine)) as progress:
        for number in mine:
            if read_part(folder, number, names[number]) is not None:
                progress.skip()
                continue
            kept: Callable[[str], bool] = lambda key: True  # noqa: E731
            if options.kept:
                kept = sidecar.read_kept(options.kept, names[number]).__contains__
            captions = sidecar.read_captions(options.captions, names[number]) if options.captions else None
            part = encode.encode_shard(
                source, number, selection, encoder, folder,
                threads=THREADS, kept=kept, captions=captions, tell=progress.tell,
            )  # fmt: skip
            files.write_whole(part_path(folder, number), part.to_json().encode())
            progress.done(len(part.damaged), sum(part.filtered.values()))


def finish(folder: epath.Path, count: int, about: Mapping[str, Any]) -> int:
    """Writes the manifest if all parts are there, and tells how far the set is; returns the exit code, 0."""
    parts = [read_part(folder, number) for number in range(count)]
    there = [part for part in parts if part is not None]
    if len(there) < count:
        print(f"{folder}: {len(there)} of {count} parts are there; the manifest comes with the last")
        return 0
    made = manifest.merge(there, **about)
    files.write_whole(folder / manifest.MANIFEST, made.to_json().encode())
    for left in (folder / manifest.SHARDS).glob(f"*{files.PARTIAL}"):  # by processes that were killed
        left.unlink(missing_ok=True)
    print(summary(folder, made))
    return 0


def summary(folder: epath.Path, made: manifest.Manifest) -> str:
    """What a finished set holds, in a few lines."""
    total = sum(made.records.values())
    use = f"use --config.source.name=latents:{folder}" if made.records["train"] else "nothing to train on"
    lines = [
        f"{folder}: {total:,} records ({made.records['held_out']:,} held out) of {made.read:,} samples "
        f"in {made.inputs:,} raw shards; {use}"
    ]
    for reason, found in made.left_out.items():
        example = f", such as {found['examples'][0]['where']}" if found["examples"] else ""
        lines.append(f"  left out, {reason}: {found['count']:,}{example}")
    return "\n".join(lines)


def part_path(folder: epath.Path, number: int) -> epath.Path:
    """The file that vouches for part `number`."""
    return folder / manifest.PARTS / f"{number:05d}.json"


def read_part(folder: epath.Path, number: int, name: str | None = None) -> manifest.Part | None:
    """A part that is there whole: its file is sound, its shards have their sizes; None otherwise.

    `name`, if given, is that of its raw shard.
    """
    path = part_path(folder, number)
    if not path.exists():
        return None
    try:
        part = manifest.Part.from_json(path.read_text())
    except (ValueError, KeyError, TypeError):
        return None  # made again
    if name is not None and part.input != name:
        return None
    for shard in part.shards:
        file = folder / shard.file
        if not file.exists() or file.stat().length != shard.bytes:
            return None
    return part


def process_of(process: int | None, processes: int | None) -> tuple[int, int]:
    """(i, n): process i of n as the flags say it, or else as the distributed job does; one by itself is (0, 1).

    Raises:
      UserError: only one of the two is given, or there is no such process.
    """
    if process is None and processes is None:
        return jax.process_index(), jax.process_count()
    if process is None or processes is None:
        raise UserError(
            "--process and --processes belong together: --process=0 --processes=8 for the first of 8"
        )
    sidecar.share((), process, processes)  # checks them
    return process, processes

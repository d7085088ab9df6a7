"""The verb `prepare`: converts a raw source to a prepared set, part by part, with any number of processes.

Every raw shard gives one part. Process i of n makes the missing ones of the parts i, i + n, i + 2n, ... Finished parts
are kept, so the same command resumes after a kill, also with another number of processes. A part is finished once its
`parts/NNNNN.json` exists, which is written after its shards. A process that finds all parts finished writes the
manifest; if two processes do, they write the same bytes.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import files
from scaling_dit.config import conditions as conditions_config
from scaling_dit.config.own_code import source_hashes
from scaling_dit.curation import conditions, encode, filters, shape, sidecar
from scaling_dit.curation.progress import Progress
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.prepared import manifest
from scaling_dit.data.sources import create_raw_source
from scaling_dit.data.sources.image_files import ImageFileSource
from scaling_dit.encoders.codec import check_own_codec, create_codec
from scaling_dit.errors import UserError, nearest, printable
from scaling_dit.model import codec_identity
from scaling_dit.monitor.host import cores

# Threads that decode images.
THREADS = max(2, len(cores()))
# The most samples whose metadata are searched for the names to keep.
_MOST_EXAMINED = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `prepare` besides the config. All but `process` change the bytes of the set.

    Attributes:
      batch: images encoded at once.
      min_size: in pixels; images with a shorter side are left out.
      buckets: resize images to the nearest of a fixed table of aspect ratios, not to squares.
      filter: expression over metadata; "" keeps all.
      columns: names of metadata that records keep.
      kept: folder of the lists that `filter` wrote; "" for none.
      captions: folder of the captions that `caption` wrote; "" for none.
      variants: of each condition of `config.conditioning.names` that is random, such as masks.
      process: (i, n) for process i of n.
    """

    batch: int = 64
    min_size: int = 0
    buckets: bool = False
    filter: str = ""
    columns: tuple[str, ...] = ()
    kept: str = ""
    captions: str = ""
    variants: int = 1
    process: tuple[int, int] = (0, 1)


def main(config: ConfigDict, out: str, options: Options) -> int:
    """Makes this process's parts of the set in `out`, and the manifest if all parts exist; returns the exit code.

    Raises:
      UserError: the source has no encoded images, the options do not fit it, the folder holds another set, or a file
        cannot be read or written.
    """
    folder = epath.Path(out)
    source = open_source(config)
    codec = create_codec(**config.codec.to_dict())
    check_own_codec(codec, config.codec.name, source.image_size)
    params = codec_identity.codec_weights(config, codec)
    selection = encode.Selection(
        sizes=shape.bucket_sizes(source.image_size, options.buckets),
        min_size=options.min_size,
        keep=filters.parse(options.filter) if options.filter else None,
        columns=options.columns,
        held_out_fraction=source.held_out_fraction,
        max_pixels=source.max_pixels,
    )
    encoder = encode.Encoder(codec, params, options.batch)
    chosen = {one.name: one.condition for one in conditions_config.chosen(config)}
    making = conditions.Making(chosen, options.variants, config.seed)
    conditions.check_square(chosen, selection.sizes)
    moments = {manifest.size_name(size): encoder.moments_shape(size) for size in selection.sizes}
    made_by = codec_identity.codec_identity(config, codec, params)
    held = conditions.about(
        making, conditions_config.own_fields(config), conditions_config.classes(config), source_hashes(config)
    )
    asked = request(config, source, options, encoder.batch) | ({"conditions": held} if held else {})
    check_columns(source, options.columns)
    claim(folder, {"codec": made_by, **asked})
    make_parts(source, selection, encoder, folder, options, making)
    about: dict[str, Any] = {
        "codec": made_by,
        "image_size": source.image_size,
        "moments": moments,
        "request": asked,
    }
    return finish(folder, len(source.shards()), about | {"conditions": held})


def open_source(config: ConfigDict) -> ImageFileSource:
    """The raw source of a config. Its shards are opened one by one, and any number of damaged records is accepted.

    Raises:
      UserError: the source holds no encoded images.
    """
    return create_raw_source(**config.source.to_dict())


def check_columns(source: ImageFileSource, columns: Sequence[str]) -> None:
    """Checks that each metadata name to keep occurs in one of the first `_MOST_EXAMINED` sound samples.

    The samples of a source may have different metadata. Reading stops once every name has been found.

    Raises:
      UserError: a name was not found.
    """
    missing, seen, examined = list(columns), set[str](), 0
    shards = range(len(source.shards())) if missing else ()
    samples = itertools.chain.from_iterable(map(source.samples, shards))
    sound = (sample for sample in samples if not isinstance(sample, DamagedRecord))
    for sample in itertools.islice(sound, _MOST_EXAMINED):
        examined += 1
        seen |= sample.metadata.keys()
        missing = [name for name in missing if name not in seen]
        if not missing:
            return
    if missing and examined:
        hint = nearest(missing[0], seen) if seen else "they have no metadata"
        raise UserError(f"--columns={missing[0]}: none of the first {examined} samples has it; {hint}")


def request(config: ConfigDict, source: ImageFileSource, options: Options, batch: int) -> dict[str, Any]:
    """The settings that determine the bytes of a set, apart from the codec: source, shards, options.

    Raises:
      UserError: `kept` or `captions` is no folder of such files.
    """
    names = source.shards()
    asked = dataclasses.asdict(options) | {"batch": batch}
    # Stands with the conditions, if there are some.
    del asked["process"], asked["variants"]
    fields = {key: value for key, value in config.source.to_dict().items() if key != "max_damaged"}
    for name, what in (("kept", sidecar.FILTER), ("captions", sidecar.CAPTIONS)):
        # The files of the same folder may have been made again with other settings.
        if folder := asked[name]:
            asked[f"{name}_sha256"] = sidecar.settings_sha256(folder, what)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"source": fields, "inputs": {"count": len(names), "sha256": digest}, **asked}


def claim(folder: epath.Path, asked: Mapping[str, Any]) -> None:
    """Records the settings of this set in its folder, or checks them against the recorded ones.

    Raises:
      UserError: the folder holds a set that was prepared in another way.
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
    making: conditions.Making,
) -> None:
    """Makes the missing parts of this process."""
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
                threads=THREADS, kept=kept, captions=captions, making=making, on_progress=progress.add,
            )  # fmt: skip
            files.write_whole(part_path(folder, number), part.to_json().encode())
            progress.done(len(part.damaged), sum(part.filtered.values()))


def finish(folder: epath.Path, count: int, about: Mapping[str, Any]) -> int:
    """Writes the manifest if all parts exist, and prints the state of the set; returns the exit code 0."""
    parts = [read_part(folder, number) for number in range(count)]
    there = [part for part in parts if part is not None]
    if len(there) < count:
        print(
            f"{folder}: {len(there)} of {count} parts are finished; the manifest is written after the last one"
        )
        return 0
    made = manifest.merge(there, **about)
    files.write_whole(folder / manifest.MANIFEST, made.to_json().encode())
    # Killed processes leave partial files.
    for left in (folder / manifest.SHARDS).glob(f"*{files.PARTIAL}"):
        left.unlink(missing_ok=True)
    print(summary(folder, made))
    return 0


def summary(folder: epath.Path, made: manifest.Manifest) -> str:
    """The contents of a finished set, in a few lines."""
    total = sum(made.records.values())
    use = f"use --config.source.name=latents:{folder}" if made.records["train"] else "nothing to train on"
    lines = [
        f"{folder}: {total:,} records ({made.records['held_out']:,} held out) of {made.read:,} samples "
        f"in {made.inputs:,} raw shards; {use}"
    ]
    for reason, found in made.left_out.items():
        example = f", such as {found['examples'][0]['where']}" if found["examples"] else ""
        lines.append(f"  left out, {reason}: {found['count']:,}{example}")
    return printable("\n".join(lines), keep="\n")


def part_path(folder: epath.Path, number: int) -> epath.Path:
    """The file that marks part `number` as finished."""
    return folder / manifest.PARTS / f"{number:05d}.json"


def read_part(folder: epath.Path, number: int, name: str | None = None) -> manifest.Part | None:
    """A finished part, or None if its file is damaged or missing, or if a shard does not have its recorded size.

    `name`, if given, must be the name of its raw shard.
    """
    path = part_path(folder, number)
    if not path.exists():
        return None
    try:
        part = manifest.Part.from_json(path.read_text())
    except (ValueError, KeyError, TypeError):
        # Then the part is made again.
        return None
    if name is not None and part.input != name:
        return None
    for shard in part.shards:
        file = folder / shard.file
        if not file.exists() or file.stat().length != shard.bytes:
            return None
    return part


def process_of(process: int | None, processes: int | None) -> tuple[int, int]:
    """(i, n) for process i of n, from the flags or else from the distributed job; (0, 1) for a single process.

    Raises:
      UserError: only one of the flags is given, or `process` is out of range.
    """
    if process is None and processes is None:
        return jax.process_index(), jax.process_count()
    if process is None or processes is None:
        raise UserError(
            "--process and --processes belong together: --process=0 --processes=8 for the first of 8"
        )
    # Raises a UserError for a process out of range.
    sidecar.share((), process, processes)
    return process, processes

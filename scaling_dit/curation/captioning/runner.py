"""The verb `caption`: writes captions for every image of a raw source, one side-car file per shard.

A shard's file is written once all its images are captioned, so a killed run resumes with the shards that have no file.
Each of n processes takes every n-th shard. Captions depend on the image, its key and `seed`, not on the process, the
order or earlier work.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from etils import epath
from PIL import Image

from scaling_dit.curation import sidecar
from scaling_dit.curation.captioning import Captioner, Scored, create_captioner
from scaling_dit.curation.raw import RawName, open_raw
from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import ImageFileSource, RawSample
from scaling_dit.errors import UserError, printable
from scaling_dit.files import claim

_OTHERWISE = "was captioned in another way"
# The kinds of data.captions.KINDS that a model writes.
MADE_KINDS = ("synthetic", "long")


def main(
    source: RawName,
    captioner: str,
    out: str,
    *,
    options: Mapping[str, str] | None = None,
    kind: str = "synthetic",
    batch: int = 16,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
) -> int:
    """Does the work of `caption`.

    Args:
      source: a source of encoded images.
      captioner: name of the captioner, see `create_captioner`.
      out: folder of the side-cars, local or remote; finished shards in it are kept.
      options: fields of the captioner.
      kind: kind of the captions for caption policies, synthetic or long.
      batch: images captioned at once.
      seed: of the captions.
      process: index of this process, from 0.
      processes: number of processes.

    Raises:
      UserError: the settings are wrong or differ from those of existing captions, or the captioner fails.
    """
    if kind not in MADE_KINDS:
        raise UserError(f"--kind={kind}: give {' or '.join(MADE_KINDS)}")
    opened, folder = open_raw(source), epath.Path(out)
    mine = sidecar.share(opened.shards(), process, processes)
    left = [name for name in mine if not sidecar.path_of(folder, name, sidecar.CAPTIONS).exists()]
    settings = {"source": source.name} | dict(source.fields)
    settings |= {
        "captioner": captioner,
        "options": dict(sorted((options or {}).items())),
        "kind": kind,
        "seed": seed,
    }
    noted = folder / sidecar.SETTINGS[sidecar.CAPTIONS]
    if noted.exists():
        claim(noted, settings, _OTHERWISE)
    made = create_captioner(captioner, options or {}) if left else None
    print(f"{len(mine)} shards, {len(mine) - len(left)} of them captioned before", flush=True)
    if made is not None:
        note = functools.partial(claim, noted, settings, _OTHERWISE)
        _caption_shards(opened, made, folder, left, note, kind=kind, batch=batch, seed=seed)
    return 0


def _caption_shards(
    source: ImageFileSource,
    captioner: Captioner,
    folder: epath.Path,
    names: Sequence[str],
    note: Callable[[], None],
    *,
    kind: str,
    batch: int,
    seed: int,
) -> None:
    """Captions the shards in order and prints a line for each: images, images without captions, speed, remaining time.

    `note` records the settings. It is called before the first file is written, not at the start, so that a captioner
    that fails at once leaves no settings that would refuse the corrected command.
    """
    began, total = time.monotonic(), 0
    for done, name in enumerate(names, start=1):
        rows = list(caption_shard(source, captioner, name, kind=kind, batch=batch, seed=seed))
        note()
        sidecar.write_captions(folder, name, rows)
        total += len(rows)
        took = time.monotonic() - began
        without = sum(not captions for _, captions in rows)
        left = took / done * (len(names) - done)
        print(
            f"{printable(name)}: {len(rows):,} images, {without:,} without captions; "
            f"{total / max(took, 1e-9):,.1f} images/s, {done} of {len(names)} shards, {left / 60:,.0f} min left",
            flush=True,
        )


def caption_shard(
    source: ImageFileSource, captioner: Captioner, name: str, *, kind: str, batch: int, seed: int
) -> Iterator[tuple[str, list[sidecar.MadeCaption]]]:
    """(key, captions, the best first) of each sample of a shard, in the shard's order; damaged samples are left out.

    An image that cannot be decoded has no captions.
    """
    samples = source.samples(source.shards().index(name))
    for group in _batches((sample for sample in samples if isinstance(sample, RawSample)), batch):
        decoded = [_decode(sample, source.max_pixels) for sample in group]
        sound = [number for number, image in enumerate(decoded) if image is not None]
        found: list[list[Scored]] = [[] for _ in group]
        if sound:
            shown = [image for image in decoded if image is not None]
            answers = captioner.caption(shown, [key_seed(seed, group[number].key) for number in sound])
            if len(answers) != len(sound):
                raise UserError(
                    f"the captioner gave {len(answers)} lists of captions for {len(sound)} images"
                )
            for number, answer in zip(sound, answers, strict=True):
                found[number] = answer
        for sample, captions in zip(group, found, strict=True):
            yield sample.key, _ranked(captions, kind)


def key_seed(seed: int, key: str) -> int:
    """A seed below 2**63 that depends only on `seed` and the key."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _ranked(captions: Sequence[Scored], kind: str) -> list[sidecar.MadeCaption]:
    """The captions, best first. Blank ones are left out; those without a score come last, in their order."""
    ordered = sorted(captions, key=lambda scored: math.inf if scored[1] is None else -scored[1])
    return [sidecar.MadeCaption(text.strip(), kind, score) for text, score in ordered if text.strip()]


def _decode(sample: RawSample, max_pixels: int) -> Image.Image | None:
    try:
        return images.decode(sample.image, sample.where, sample.key, max_pixels)
    except DamagedRecord:
        return None


def _batches(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    group: list[RawSample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

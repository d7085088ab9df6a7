"""The verb `filter`: decides which samples of a raw source are kept, and gives the reason for the others.

A sample is dropped for the first of these reasons that applies:

    damaged:KIND     it cannot be read
    filter, ...      the expression is False for it or has no value (`filters`)
    exact_duplicate  its image file has the same bytes as a better sample's
    near_duplicate   its perceptual hash differs from a better sample's in at most `distance` bits (`duplicates`)

The better sample has more pixels, or, with as many, comes earlier in the order of the shards. Duplicates are searched
among the samples that no earlier reason drops. A near-duplicate of a better sample is dropped even if that sample is
dropped for the same reason, so no kept image is near a better one.

Each shard gets one file of JSON lines, a line per sample in the shard's order: {"key": KEY} for a kept sample; a
dropped one also has "dropped": REASON and, for a duplicate, "of": the key of its best duplicate. `filter.json` holds
the counts by reason.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from etils import epath

from scaling_dit.curation import beam as engine
from scaling_dit.curation import filters, sidecar
from scaling_dit.curation.columns import columns
from scaling_dit.curation.duplicates import bands, first_near, perceptual_hash
from scaling_dit.curation.raw import RawName, open_raw
from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import RawSample
from scaling_dit.errors import printable

KEPT, EXACT, NEAR = "kept", "exact_duplicate", "near_duplicate"
SUMMARY = sidecar.SETTINGS[sidecar.FILTER]
# (minus pixels, shard, position): the least is the best.
Rank = tuple[int, int, int]
# (shard, (position, row of the shard's file)).
Verdict = tuple[str, tuple[int, dict[str, str]]]


class Seen(NamedTuple):
    """A sample that passed the filter. `digest` is the sha256 of its image file, `hash` its perceptual hash."""

    rank: Rank
    key: str
    shard: str
    digest: bytes
    hash: int | None


def main(
    source: RawName,
    out: str,
    *,
    keep: str | None = None,
    duplicates: str = "exact",
    distance: int = 3,
    runner: str = "DirectRunner",
    beam_options: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Does the work of `filter`: writes the lists and prints the counts.

    Args:
      source: a source of encoded images.
      out: folder of the lists, local or remote.
      keep: filter expression; None keeps every readable sample.
      duplicates: "none", "exact", or "near", which includes exact ones.
      distance: the most bits in which the hashes of near-duplicates differ.
      runner: name of Beam's runner.
      beam_options: passed to Beam.
      as_json: whether to print the counts as JSON.

    Raises:
      UserError: the source or runner does not exist, or the expression is wrong.
    """
    chosen = filters.parse(keep) if keep else None
    settings = {"source": source.name} | dict(source.fields)
    settings |= {"filter": keep, "duplicates": duplicates}
    settings |= {"distance": distance} if duplicates == "near" else {}
    folder = epath.Path(out)
    pipe = engine.pipeline(runner, beam_options)
    build(pipe, source, folder, chosen, duplicates, distance, settings)
    engine.run(pipe)
    found = json.loads((folder / SUMMARY).read_text())
    print(json.dumps(found, indent=1) if as_json else table(found, folder))
    return 0


def build(
    pipe: beam.Pipeline,
    source: RawName,
    folder: epath.Path,
    keep: filters.Filter | None,
    duplicates: str,
    distance: int,
    settings: dict[str, Any],
) -> None:
    """Adds all of the work to a pipeline. Arguments as in `main`; `settings` are written with the counts."""
    read = engine.shards_of(pipe, source) | "Read" >> beam.ParDo(
        _Read(source, keep, hashed=duplicates == "near")
    ).with_outputs("dropped", "shards", main="seen")
    verdicts = [read.dropped]
    seen = read.seen
    if duplicates != "none":
        exact = seen | "ByContent" >> beam.GroupBy(lambda sample: sample.digest)
        judged = exact | "Exact" >> beam.FlatMapTuple(_exact).with_outputs("dropped", main="seen")
        verdicts.append(judged.dropped)
        seen = judged.seen
    if duplicates == "near":
        seen, dropped = _near(seen, distance)
        verdicts.append(dropped)
    verdicts.append(seen | "Keep" >> beam.Map(_verdict))
    judgements = verdicts | "Verdicts" >> beam.Flatten()
    engine.write_shards((judgements, read.shards) | "Rows" >> beam.Flatten(), folder)
    counts = judgements | "Reason" >> beam.Map(_reason) | "Count" >> beam.combiners.Count.PerElement()
    whole = counts | "Group" >> beam.combiners.ToDict()
    found = whole | "Summary" >> beam.Map(lambda counts: _summary(counts, settings))
    engine.write_json(found | "Entries" >> beam.FlatMap(lambda summary: summary.items()), folder / SUMMARY)


class _Read(beam.DoFn):
    """Reads one shard: gives dropped samples as verdicts, the others as `Seen`, and the shard's name."""

    def __init__(self, source: RawName, keep: filters.Filter | None, hashed: bool) -> None:
        self._source, self._keep, self._hashed = source, keep, hashed

    def process(self, shard: int) -> Iterator[Any]:
        source = open_raw(self._source)
        name = source.shards()[shard]
        yield beam.pvalue.TaggedOutput("shards", (name, None))
        for position, sample in enumerate(source.samples(shard)):
            try:
                if isinstance(sample, DamagedRecord):
                    raise sample
                found = self._examine(sample, source.max_pixels)
            except DamagedRecord as fault:
                key = fault.where if isinstance(sample, DamagedRecord) else sample.key
                row = {"key": key, "dropped": f"damaged:{fault.kind}"}
                yield beam.pvalue.TaggedOutput("dropped", (name, (position, row)))
                continue
            if isinstance(found, str):
                row = {"key": sample.key, "dropped": found}
                yield beam.pvalue.TaggedOutput("dropped", (name, (position, row)))
            else:
                pixels, digest, phash = found
                yield Seen((-pixels, shard, position), sample.key, name, digest, phash)

    def _examine(self, sample: RawSample, max_pixels: int) -> str | tuple[int, bytes, int | None]:
        """The reason to drop a sample, or its number of pixels, digest and perceptual hash."""
        row = columns(sample, max_pixels)
        reason = self._keep.why_not(row) if self._keep else None
        if reason:
            return reason
        phash = None
        if self._hashed:
            image = images.decode(sample.image, sample.where, sample.key, max_pixels)
            phash = perceptual_hash(image)
        return row["width"] * row["height"], hashlib.sha256(sample.image).digest(), phash


def _exact(_: bytes, group: Iterable[Seen]) -> Iterator[Any]:
    """Keeps the best of the samples whose files have the same bytes, and drops the others."""
    best, *others = sorted(group)
    yield best
    for sample in others:
        yield beam.pvalue.TaggedOutput("dropped", _verdict(sample, EXACT, best.key))


def _near(seen: beam.PCollection[Seen], distance: int) -> tuple[Any, Any]:
    """(kept samples, verdicts of dropped ones), by perceptual hash."""
    plain = seen | "Plain" >> beam.Filter(lambda sample: sample.hash is None)
    hashed = seen | "Hashed" >> beam.Filter(lambda sample: sample.hash is not None)
    groups = hashed | "ByHash" >> beam.GroupBy(lambda sample: sample.hash)
    ranked = groups | "Rank" >> beam.MapTuple(lambda phash, group: (phash, sorted(group)))
    banded = ranked | "Bands" >> beam.FlatMap(
        lambda group: ((band, group[1][0]) for band in bands(group[0], distance))
    )
    compared = banded | "ByBand" >> beam.GroupByKey()
    better = compared | "Compare" >> beam.FlatMap(lambda group: _compare(group[1], distance))
    joined = {"group": ranked, "better": better | "Best" >> beam.CombinePerKey(min)}
    judged = (
        joined
        | "Join" >> beam.CoGroupByKey()
        | "Near" >> beam.FlatMapTuple(_judge).with_outputs("dropped", main="kept")
    )
    return (plain, judged.kept) | "KeptByHash" >> beam.Flatten(), judged.dropped


def _compare(group: Iterable[Seen], distance: int) -> Iterator[tuple[int, tuple[Rank, str]]]:
    """For samples with a band in common, each with another hash: (hash, the best of the better samples near it)."""
    samples = sorted(group)
    firsts = first_near([sample.hash or 0 for sample in samples], distance)
    for sample, first in zip(samples, firsts, strict=True):
        if first is not None and sample.hash is not None:
            yield sample.hash, (samples[first].rank, samples[first].key)


def _judge(_: int, joined: dict[str, list[Any]]) -> Iterator[Any]:
    """Drops the samples of one hash: all of them if a better sample is near, else all but the best."""
    (group,) = joined["group"]
    if joined["better"]:
        ((_, of),) = joined["better"]
    else:
        best, *group = group
        of = best.key
        yield best
    for sample in group:
        yield beam.pvalue.TaggedOutput("dropped", _verdict(sample, NEAR, of))


def _verdict(sample: Seen, reason: str | None = None, of: str = "") -> Verdict:
    row = {"key": sample.key} | ({"dropped": reason, "of": of} if reason else {})
    return sample.shard, (sample.rank[2], row)


def _reason(verdict: Verdict) -> str:
    return verdict[1][1].get("dropped", KEPT)


def _summary(counts: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    dropped = {reason: counts[reason] for reason in sorted(counts) if reason != KEPT}
    total = sum(counts.values())
    return {"samples": total, KEPT: counts.get(KEPT, 0), "dropped": dropped, "settings": settings}


def table(found: dict[str, Any], folder: epath.Path) -> str:
    """The counts as a text table."""
    total = found["samples"]
    rows = [("samples", total), (KEPT, found[KEPT]), *found["dropped"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {n:>12,}  {n / total if total else 0:>7.2%}" for name, n in rows]
    return printable("\n".join([*lines, f"lists: {folder}"]), keep="\n")

"""`filter`: which samples of a raw source are kept, and why the others are not.

A sample is dropped for the first of these reasons that holds:

    damaged:KIND     it cannot be read
    filter, ...      the expression is False for it or has no value (`filters`)
    exact_duplicate  its image file is byte for byte that of a better sample
    near_duplicate   a better sample looks the same: their perceptual hashes differ in at most `distance` bits
                     (`duplicates`)

Better is the sample with more pixels, then the earlier one in the order of the shards. Duplicates are looked for among
the samples that no earlier reason drops, and a near-duplicate may itself be the reason for another: of pictures that
form a chain the best stays, and each of the others that stay is near no better one.

For each shard one file of JSON lines is written, a line per sample in its order: {"key": KEY} if it is kept, else with
"dropped": REASON and, for a duplicate, "of": the key of the best sample that it is a duplicate of. `filter.json` holds
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

KEPT, EXACT, NEAR = "kept", "exact_duplicate", "near_duplicate"
SUMMARY = sidecar.SETTINGS[sidecar.FILTER]
Rank = tuple[int, int, int]  # minus pixels, shard, position: the least is the best
Verdict = tuple[str, tuple[int, dict[str, str]]]  # shard, position, row of its file


class Seen(NamedTuple):
    """A sample that passed the filter."""

    rank: Rank
    key: str
    shard: str
    digest: bytes  # sha256 of the image file
    hash: int | None  # perceptual


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
    """The verb `filter`: writes the lists and prints the counts.

    Args:
      source: a source of encoded images.
      out: folder of the lists, local or remote.
      keep: filter expression; None keeps what can be read.
      duplicates: none, exact, or near, which includes exact.
      distance: most bits in which the hashes of near-duplicates differ.
      runner: of Beam.
      beam_options: passed to Beam.
      as_json: print the counts as JSON.

    Raises:
      UserError: no such source or runner, or a wrong expression.
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
    """Adds the whole of the work to a pipeline; arguments as in `main`, `settings` are written beside the counts."""
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
    """One shard's samples: dropped ones as verdicts, the others as `Seen`, and the shard's name."""

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
                found = self._look(sample, source.max_pixels)
            except DamagedRecord as fault:
                key = fault.where if isinstance(sample, DamagedRecord) else sample.key
                row = {"key": key, "dropped": f"damaged:{fault.kind}"}
                yield beam.pvalue.TaggedOutput("dropped", (name, (position, row)))
                continue
            if isinstance(found, str):
                row = {"key": sample.key, "dropped": found}
                yield beam.pvalue.TaggedOutput("dropped", (name, (position, row)))
            else:
                pixels, digest, looks = found
                yield Seen((-pixels, shard, position), sample.key, name, digest, looks)

    def _look(self, sample: RawSample, max_pixels: int) -> str | tuple[int, bytes, int | None]:
        """The reason to drop a sample, or its pixels, digest and hash."""
        row = columns(sample)
        reason = self._keep.why_not(row) if self._keep else None
        if reason:
            return reason
        looks = None
        if self._hashed:
            image = images.decode(sample.image, sample.where, sample.key, max_pixels)
            looks = perceptual_hash(image)
        return row["width"] * row["height"], hashlib.sha256(sample.image).digest(), looks


def _exact(_: bytes, group: Iterable[Seen]) -> Iterator[Any]:
    """Of files with the same bytes the best; the others are dropped."""
    best, *others = sorted(group)
    yield best
    for sample in others:
        yield beam.pvalue.TaggedOutput("dropped", _verdict(sample, EXACT, best.key))


def _near(seen: beam.PCollection[Seen], distance: int) -> tuple[Any, Any]:
    """(kept, verdicts of dropped ones) by perceptual hash."""
    plain = seen | "Plain" >> beam.Filter(lambda sample: sample.hash is None)
    hashed = seen | "Hashed" >> beam.Filter(lambda sample: sample.hash is not None)
    groups = hashed | "ByHash" >> beam.GroupBy(lambda sample: sample.hash)
    ranked = groups | "Rank" >> beam.MapTuple(lambda looks, group: (looks, sorted(group)))
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
    return (plain, judged.kept) | "KeptLooks" >> beam.Flatten(), judged.dropped


def _compare(group: Iterable[Seen], distance: int) -> Iterator[tuple[int, tuple[Rank, str]]]:
    """Of samples with a band in common and each another hash: (hash, the best of the better ones near it)."""
    samples = sorted(group)
    firsts = first_near([sample.hash or 0 for sample in samples], distance)
    for sample, first in zip(samples, firsts, strict=True):
        if first is not None and sample.hash is not None:
            yield sample.hash, (samples[first].rank, samples[first].key)


def _judge(_: int, joined: dict[str, list[Any]]) -> Iterator[Any]:
    """The samples of one hash, the best first: all dropped, or all but the best."""
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
    """The counts for people."""
    total = found["samples"]
    rows = [("samples", total), (KEPT, found[KEPT]), *found["dropped"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {n:>12,}  {n / total if total else 0:>7.2%}" for name, n in rows]
    return "\n".join([*lines, f"lists: {folder}"])

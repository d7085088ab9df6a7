"""The verb `stats`: the statistics of a whole raw source, on Apache Beam.

Each worker counts a shard and passes on the counts only.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from etils import epath

from scaling_dit.curation import beam as engine
from scaling_dit.curation import density, sidecar, statistics
from scaling_dit.curation.raw import RawName, open_raw
from scaling_dit.curation.words import Nouns, find_nouns
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.errors import UserError

TALLY = "counts.json"


def main(
    source: RawName,
    out: str,
    *,
    captions: str | None = None,
    kept: str | None = None,
    aesthetic: str = "aesthetic",
    nouns: str = "auto",
    questions: str | None = None,
    runner: str = "DirectRunner",
    beam_options: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Does the work of `stats`: writes `stats.json` and a plot, and prints the statistics.

    Args:
      source: a source of encoded images.
      out: folder to write to, local or remote.
      captions: folder of side-car captions, counted together with the source's captions.
      kept: folder that `filter` wrote; samples that it dropped are not counted.
      aesthetic: column of the aesthetic score.
      nouns: auto, spacy or lexicon, see `words`.
      questions: TIFA question file, for the information density.
      runner: name of Beam's runner.
      beam_options: passed to Beam.
      as_json: whether to print JSON.

    Raises:
      UserError: the source, a side-car, the question file or the runner is missing.
    """
    elements = density.read_elements(questions) if questions else None
    finder, folder = find_nouns(nouns), epath.Path(out)
    pipe = engine.pipeline(runner, beam_options)
    count = Count(source, finder, aesthetic, elements, captions, kept)
    build(pipe, source, count, folder)
    engine.run(pipe)
    tally = json.loads((folder / TALLY).read_text())
    found = statistics.result(
        {tuple(key): n for key, n in tally["counts"]},
        tally["pairs"],
        tally["unique"],
        nouns_by=finder.name,
        aesthetic=aesthetic,
        elements=elements,
    )
    files = statistics.write(folder, found)
    print(json.dumps(found, indent=1) if as_json else statistics.table(found))
    if not as_json:
        missing = "" if len(files) > 1 else "; a plot needs matplotlib"
        print(f"written to {folder}: {', '.join(files)}{missing}")
    return 0


def build(pipe: beam.Pipeline, source: RawName, count: "Count", folder: epath.Path) -> None:
    """Adds all of the work to a pipeline, which ends by writing `counts.json` to the folder."""
    read = engine.shards_of(pipe, source) | "Count" >> beam.ParDo(count).with_outputs("nouns", main="counts")
    counts = read.counts | "SumCounts" >> beam.CombinePerKey(sum)
    # (row of table 3, noun) -> number of images
    nouns = read.nouns | "SumNouns" >> beam.CombinePerKey(sum)
    pairs = (
        nouns | "Pairs" >> beam.MapTuple(lambda key, n: (key[0], n)) | "SumPairs" >> beam.CombinePerKey(sum)
    )
    unique = (
        nouns | "Rows" >> beam.MapTuple(lambda key, _: key[0]) | "Unique" >> beam.combiners.Count.PerElement()
    )
    entries = [
        counts
        | "Listed" >> beam.combiners.ToList()
        | "C" >> beam.Map(lambda found: ("counts", sorted(found, key=str))),
        pairs | "PairsOfRows" >> beam.combiners.ToDict() | "P" >> beam.Map(lambda found: ("pairs", found)),
        unique | "NounsOfRows" >> beam.combiners.ToDict() | "U" >> beam.Map(lambda found: ("unique", found)),
    ]
    engine.write_json(entries | beam.Flatten(), folder / TALLY)


class Count(beam.DoFn):
    """Counts one shard; arguments as in `main`."""

    def __init__(
        self,
        source: RawName,
        nouns: Nouns,
        aesthetic: str,
        elements: density.Elements | None = None,
        captions: str | None = None,
        kept: str | None = None,
    ) -> None:
        self._source, self._captions, self._kept = source, captions, kept
        self._counting = (nouns, aesthetic, elements)

    def process(self, shard: int) -> Iterator[Any]:
        counting = self.count(shard)
        yield from counting.counts.items()
        for key, images in counting.nouns_met.items():
            yield beam.pvalue.TaggedOutput("nouns", (key, images))

    def count(self, shard: int) -> statistics.Counting:
        """The counts of one shard.

        Raises:
          UserError: the shard has no side-car, or the side-car lacks a sample.
        """
        source = open_raw(self._source)
        name = source.shards()[shard]
        made = sidecar.read_captions(self._captions, name) if self._captions else {}
        kept = sidecar.read_kept(self._kept, name) if self._kept else None
        counting = statistics.Counting(*self._counting)
        for sample in source.samples(shard):
            if isinstance(sample, DamagedRecord):
                counting.add_damaged(sample.kind)
                continue
            if kept is not None and sample.key not in kept:
                continue
            more: Sequence[sidecar.MadeCaption] = ()
            if self._captions:
                if sample.key not in made:
                    raise UserError(
                        f"{sidecar.path_of(self._captions, name, sidecar.CAPTIONS)} has no {sample.key!r}"
                    )
                more = made[sample.key]
            own = zip(sample.captions, sample.kinds, strict=True)
            counting.add([*own, *((caption.text, caption.kind) for caption in more)], sample.metadata)
        return counting

"""The verbs over whole data sets: `prepare`, `filter`, `stats` and `caption`."""

import dataclasses
from typing import Literal

from scaling_dit.cli.options import flag, group
from scaling_dit.cli.verb import Verb, config_flag, json_flag
from scaling_dit.errors import UserError
from scaling_dit.fields import BATCH, COUNT, FROM_0, Rule

_FILTER = "keep samples for which this is true, such as 'aesthetic >= 5 and min(width, height) >= 256'"
_SOURCE = (
    "folder:PATH, webdataset:GLOB, parquet:GLOB or tfds:NAME; its fields are --config.source.FIELD=VALUE"
)
_KEPT = "folder that the filter verb wrote: skip the samples that it dropped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """The flags of the verbs that run on Apache Beam."""

    runner: str = flag(
        "runner of Apache Beam, such as DataflowRunner, FlinkRunner, SparkRunner; its options follow --",
        "DirectRunner",
    )
    json: bool = json_flag()

    @staticmethod
    def check_installed() -> None:
        """Raises UserError where Apache Beam cannot be imported."""
        try:
            import apache_beam  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"Apache Beam cannot be loaded ({error}); pip install 'scaling-dit[beam]'"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(Verb):
    """Encodes a data set once: raw images to shards of latents that runs train from."""

    EXAMPLE = (
        "scaling-dit prepare --config=shapes --config.source.name=folder:data/mine --config.codec.name=dct "
        "--out=data/mine_latents"
    )
    OVERRIDES = True

    config: str = config_flag(required=True)
    out: str = flag(
        "folder of the prepared set, local or gs://; finished shards are kept", required=True, path=True
    )
    filter: str = flag(_FILTER, "")
    min_size: int = flag("skip images whose shorter side has fewer pixels", 0, FROM_0)
    buckets: bool = flag("crop images to the nearest of seven aspect ratios, not to squares", False)
    columns: tuple[str, ...] = flag("comma-separated metadata that records keep", ())
    kept: str = flag(_KEPT, "", path=True)
    captions: str = flag("folder that the caption verb wrote: captions to add", "", path=True)
    variants: int = flag(
        "random variants, such as masks, of each condition in config.conditioning.names", 1, COUNT
    )
    batch: int = flag("images encoded at once", 64, BATCH)
    process: int | None = flag(
        "number of this process, from 0; by default what the distributed job says", None, FROM_0
    )
    processes: int | None = flag("how many processes share the work", None, COUNT)

    def run(self) -> int:
        """Prepares this process's parts of the set."""
        from scaling_dit import config as config_lib

        config = config_lib.load(self.config, self.overrides)

        from scaling_dit.curation import job

        options = job.Options(
            batch=self.batch,
            min_size=self.min_size,
            buckets=self.buckets,
            filter=self.filter,
            columns=self.columns,
            kept=self.kept,
            captions=self.captions,
            variants=self.variants,
            process=job.process_of(self.process, self.processes),
        )
        return job.main(config, self.out, options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(Verb):
    """Lists which samples of a data set to keep: by columns, without duplicates."""

    EXAMPLE = (
        "scaling-dit filter --source='webdataset:data/*.tar' --filter='aesthetic>=5' --duplicates=near "
        "--out=data/kept"
    )
    ARGUMENTS = "[-- BEAM OPTIONS]"
    OVERRIDES = True

    source: str = flag(_SOURCE, required=True)
    out: str = flag("folder of the lists, one for each shard, local or gs://", required=True, path=True)
    filter: str | None = flag(_FILTER)
    duplicates: Literal["none", "exact", "near"] = flag(
        "drop all but the best of equal files (exact), or also of images that look alike (near)", "exact"
    )
    distance: int = flag(
        "most bits, of 64, in which the hashes of two near-duplicates differ",
        3,
        Rule("from 0 to 15", lambda x: 0 <= x <= 15),
    )
    beam: BeamOptions = group(BeamOptions)

    def run(self) -> int:
        """Writes the lists."""
        self.beam.check_installed()

        from scaling_dit.curation import filter_pipeline
        from scaling_dit.curation.raw import raw_name

        return filter_pipeline.main(
            raw_name(self.source, self.overrides),
            self.out,
            keep=self.filter,
            duplicates=self.duplicates,
            distance=self.distance,
            runner=self.beam.runner,
            beam_options=self.arguments,
            as_json=self.beam.json,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats(Verb):
    """Counts a data set: images, aesthetic score, words and nouns of its captions."""

    EXAMPLE = "scaling-dit stats --source='webdataset:data/*.tar' --kept=data/kept --out=data/stats"
    ARGUMENTS = "[-- BEAM OPTIONS]"
    OVERRIDES = True

    source: str = flag(_SOURCE, required=True)
    out: str = flag("folder for stats.json and the histograms, local or gs://", required=True, path=True)
    captions: str | None = flag("folder that the caption verb wrote: captions to count too", path=True)
    kept: str | None = flag(_KEPT, path=True)
    aesthetic: str = flag("column of the aesthetic score", "aesthetic")
    nouns: Literal["auto", "spacy", "lexicon"] = flag(
        "how nouns are found; auto takes spacy where its model is installed", "auto"
    )
    questions: str | None = flag(
        "TIFA question file: the share of captions that contain its elements, by type", path=True
    )
    beam: BeamOptions = group(BeamOptions)

    def run(self) -> int:
        """Writes the counts and histograms."""
        self.beam.check_installed()

        from scaling_dit.curation import stats_pipeline
        from scaling_dit.curation.raw import raw_name

        return stats_pipeline.main(
            raw_name(self.source, self.overrides),
            self.out,
            captions=self.captions,
            kept=self.kept,
            aesthetic=self.aesthetic,
            nouns=self.nouns,
            questions=self.questions,
            runner=self.beam.runner,
            beam_options=self.arguments,
            as_json=self.beam.json,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Verb):
    """Writes captions for the images of a data set, with a model or a server."""

    EXAMPLE = (
        "scaling-dit caption --source='webdataset:data/*.tar' --captioner=transformers:models/blip2 "
        "--out=data/captions"
    )
    OVERRIDES = True

    source: str = flag(_SOURCE, required=True)
    captioner: str = flag(
        "transformers:FOLDER, openai:URL, shapes, or package.module:Class of your own", required=True
    )
    out: str = flag(
        "folder of the captions, one file for each shard, local or gs://; finished ones are kept",
        required=True,
        path=True,
    )
    option: tuple[str, ...] = flag("a field of the captioner, such as captions=5; repeat it", (), repeat=True)
    kind: Literal["synthetic", "long"] = flag("kind of captions, as a caption policy sees them", "synthetic")
    batch: int = flag("images captioned at once", 16, BATCH)
    seed: int = flag("seed of the captions", 0, FROM_0)
    process: int = flag("number of this process, from 0", 0, FROM_0)
    processes: int = flag("how many processes share the work", 1, COUNT)

    def run(self) -> int:
        """Writes the captions of this process's shards."""
        options = {}
        for option in self.option:
            field, equals, value = option.partition("=")
            if not equals:
                raise UserError(f"--option={option}: write FIELD=VALUE, such as --option=captions=5")
            options[field] = value

        from scaling_dit.curation.captioning import runner
        from scaling_dit.curation.raw import raw_name

        return runner.main(
            raw_name(self.source, self.overrides),
            self.captioner,
            self.out,
            options=options,
            kind=self.kind,
            batch=self.batch,
            seed=self.seed,
            process=self.process,
            processes=self.processes,
        )

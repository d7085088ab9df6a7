"""The verbs over whole data sets, for `cli`: their flags, and the calls they become."""

import functools
from typing import Any

from absl import flags

from scaling_dit.errors import UserError


def _define_source(values: flags.FlagValues) -> None:
    source = (
        "folder:PATH, webdataset:GLOB, parquet:GLOB or tfds:NAME; its fields are --config.source.FIELD=VALUE"
    )
    flags.DEFINE_string("source", None, source, flag_values=values)


def _define_beam(values: flags.FlagValues) -> None:
    runner = "of Apache Beam, such as DataflowRunner, FlinkRunner, SparkRunner; its options follow --"
    flags.DEFINE_string("runner", "DirectRunner", runner, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the figures as JSON", flag_values=values)


def define_filter(values: flags.FlagValues) -> None:
    """Flags of `filter`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    _define_source(values)
    string("out", None, "folder of the lists, one for each shard, local or gs://")
    string(
        "filter", None, "keep what this is true of, such as 'aesthetic >= 5 and min(width, height) >= 256'"
    )
    duplicates = "what is dropped but for the best: copies of a file, or also pictures that look alike"
    flags.DEFINE_enum("duplicates", "exact", ("none", "exact", "near"), duplicates, flag_values=values)
    distance = "most of 64 bits in which the hashes of near-duplicates differ"
    flags.DEFINE_integer("distance", 3, distance, lower_bound=0, upper_bound=15, flag_values=values)
    _define_beam(values)


def run_filter(values: flags.FlagValues, arguments: list[str], overrides: list[str]) -> int:
    """The verb `filter`."""
    _need_beam()
    from scaling_dit.curation import filter_pipeline
    from scaling_dit.curation.raw import raw_name

    return filter_pipeline.main(
        raw_name(values.source, overrides),
        values.out,
        keep=values.filter,
        duplicates=values.duplicates,
        distance=values.distance,
        runner=values.runner,
        beam_options=arguments,
        as_json=values.json,
    )


def define_stats(values: flags.FlagValues) -> None:
    """Flags of `stats`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    _define_source(values)
    string("out", None, "folder for stats.json and the histograms, local or gs://")
    string("captions", None, "folder that the caption verb wrote: captions to count too")
    string("kept", None, "folder that the filter verb wrote: leave out what it dropped")
    string("aesthetic", "aesthetic", "column of the aesthetic score")
    nouns = "how nouns are found; auto is spacy where its model is installed"
    flags.DEFINE_enum("nouns", "auto", ("auto", "spacy", "lexicon"), nouns, flag_values=values)
    string("questions", None, "TIFA question file: the share of captions that contain its elements, by type")
    _define_beam(values)


def run_stats(values: flags.FlagValues, arguments: list[str], overrides: list[str]) -> int:
    """The verb `stats`."""
    _need_beam()
    from scaling_dit.curation import stats_pipeline
    from scaling_dit.curation.raw import raw_name

    names = ("captions", "kept", "aesthetic", "nouns", "questions", "runner")
    given: dict[str, Any] = {name: values[name].value for name in names}
    source = raw_name(values.source, overrides)
    return stats_pipeline.main(source, values.out, **given, beam_options=arguments, as_json=values.json)


def define_caption(values: flags.FlagValues) -> None:
    """Flags of `caption`."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    _define_source(values)
    captioner = "transformers:FOLDER, openai:URL, shapes, or package.module:Class of your own"
    string("captioner", None, captioner)
    string(
        "out", None, "folder of the captions, one file for each shard, local or gs://; finished ones are kept"
    )
    option = "a field of the captioner, such as captions=5; repeat it"
    flags.DEFINE_multi_string("option", [], option, flag_values=values)
    kind = "what a caption policy takes the captions for"
    flags.DEFINE_enum("kind", "synthetic", ("synthetic", "long"), kind, flag_values=values)
    integer("batch", 16, "pictures captioned at once", lower_bound=1)
    integer("seed", 0, "seed of the captions", lower_bound=0)
    integer("process", 0, "number of this process, from 0", lower_bound=0)
    integer("processes", 1, "how many processes share the work", lower_bound=1)


def run_caption(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    """The verb `caption`."""
    options = {}
    for option in values.option:
        field, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--option={option}: write FIELD=VALUE, such as --option=captions=5")
        options[field] = value
    from scaling_dit.curation.captioning import runner
    from scaling_dit.curation.raw import raw_name

    names = ("kind", "batch", "seed", "process", "processes")
    given: dict[str, Any] = {name: values[name].value for name in names}
    source = raw_name(values.source, overrides)
    return runner.main(source, values.captioner, values.out, options=options, **given)


def _need_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError(f"Apache Beam cannot be loaded ({error}); pip install 'scaling-dit[beam]'") from None

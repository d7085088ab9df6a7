"""Runs jobs over all shards of a data set with Apache Beam, on one machine or on Dataflow, Flink or Spark.

A pipeline gets the numbers of the shards. A worker opens the source itself, reads one shard from start to end and
passes on small summaries, never images. Any order and any number of workers give the same result.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, TypeOptions
from etils import epath

from scaling_dit.curation import sidecar
from scaling_dit.curation.raw import RawName, open_raw
from scaling_dit.errors import UserError
from scaling_dit.files import write_whole


def pipeline(runner: str, arguments: Sequence[str]) -> beam.Pipeline:
    """An empty pipeline.

    Args:
      runner: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, ...
      arguments: options of Beam and of the runner, such as --project=NAME or --direct_num_workers=4.

    Raises:
      UserError: the runner does not exist or refuses the options.
    """
    for argument in arguments:
        if not argument.startswith("--"):
            raise UserError(f"{argument!r} is no pipeline option; after -- they look like --project=NAME")
    try:
        options = PipelineOptions(list(arguments))
        if runner == "DirectRunner":
            # It would first download a server, Prism, to run there. These pipelines have no triggers, safe or unsafe;
            # with the option it runs them in this process.
            options.view_as(TypeOptions).allow_unsafe_triggers = True
        return beam.Pipeline(runner=runner, options=options)
    except (ValueError, ImportError, SystemExit) as error:
        raise UserError(f"--runner={runner} with {' '.join(arguments) or 'no options'}: {error}") from None


def run(pipe: beam.Pipeline) -> None:
    """Runs a pipeline to its end.

    Raises:
      UserError: a worker raised one, or the runner gave up.
    """
    workers = logging.getLogger("apache_beam.runners.common")
    level = workers.level
    # Beam would log the traceback of the error that is raised here.
    workers.setLevel(logging.CRITICAL)
    try:
        state = pipe.run().wait_until_finish()
    except Exception as error:
        faults = [cause for cause in _causes(error) if isinstance(cause, UserError)]
        # The last cause is the original error; Beam adds the step's name to the others.
        if faults:
            raise UserError(str(faults[-1])) from error
        raise
    finally:
        workers.setLevel(level)
    if state not in ("DONE", None):
        raise UserError(f"the pipeline ended as {state}; the runner's own log says why")


def shards_of(pipe: beam.Pipeline, source: RawName) -> beam.PCollection[int]:
    """The numbers of a source's shards, distributed to the workers."""
    numbers = list(range(len(open_raw(source).shards())))
    return pipe | "Shards" >> beam.Create(numbers, reshuffle=False) | beam.Reshuffle()


def write_json(values: beam.PCollection[tuple[str, Any]], path: epath.PathLike) -> None:
    """Writes all (name, value) pairs as one JSON object, on one worker."""
    _ = values | "Collect" >> beam.combiners.ToDict() | "Write" >> beam.Map(_write_object, str(path))


def write_shards(rows: beam.PCollection[tuple[str, Any]], folder: epath.PathLike) -> None:
    """Writes (shard, (position, row)) as one file of rows per shard, in the order of the positions.

    (shard, None) makes sure that a shard without rows gets a file as well.
    """
    grouped = rows | "ByShard" >> beam.GroupByKey()
    _ = grouped | "WriteShard" >> beam.Map(_write_shard, str(folder))


def _write_shard(group: tuple[str, Iterable[tuple[int, dict[str, Any]] | None]], folder: str) -> None:
    shard, rows = group
    ordered = sorted((row for row in rows if row is not None), key=lambda row: row[0])
    path = sidecar.path_of(folder, shard, sidecar.FILTER)
    sidecar.write_lines(path, (row for _, row in ordered))


def _write_object(values: dict[str, Any], path: str) -> None:
    place = epath.Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, (json.dumps(dict(sorted(values.items())), indent=1) + "\n").encode())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

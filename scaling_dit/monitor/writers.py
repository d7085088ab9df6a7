"""Writes a run's metrics: always as JSON lines, and through clu to TensorBoard if its packages are installed.

Only this file knows clu and TensorBoard. Every start of a run writes its own segment file in the folder of metrics, so
no process renames or appends to another's file. The values of a resumed run replace those of the start that was killed.
"""

import contextlib
import functools
import importlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self

import jax
import numpy as np
from etils import epath

from scaling_dit import storage, trees
from scaling_dit.errors import printable
from scaling_dit.monitor.grid import write_png
from scaling_dit.monitor.jsonl import JsonLines, read_rows

# Files of TensorBoard, with the second in which each was made.
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)")
# Seconds to wait for a later one; more means that the clock was set back.
_WAIT = 3.0
_INSTALL = 'TensorBoard is off: no module {missing!r}; for it: pip install "scaling-dit[tensorboard]"'


class Writer(Protocol):
    """The interface that the trainer calls. Steps count optimizer updates."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers by name: Python, numpy or jax scalars."""

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes images by name: uint8 [H, W, 3]."""

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Writes the resolved config: dotted key -> value."""

    def parameter_overview(self, params: Any) -> None:
        """Writes a table of the parameters, which may be abstract."""

    def back_to(self, step: int) -> None:
        """Notes that the run returned to this step, which undid the updates of later steps."""

    def begin(self, step: int, shown: Mapping[str, Any] | None = None) -> None:
        """Notes that a start begins after this step; later values of earlier starts count no more.

        Args:
          shown: where what earlier starts wrote at `step` itself counts no more either, its scalars that still do.
        """

    def flush(self) -> None:
        """Makes everything written so far readable by others."""

    def close(self) -> None:
        """Flushes and closes files."""


def create_writer(
    metrics: epath.PathLike, tensorboard: epath.PathLike | None = None, patience: float = 0.0
) -> "MultiWriter":
    """The writers of a run, as a context: JSONL in the folder `metrics`, TensorBoard in the other one if it is given.

    Without the extra `[tensorboard]` one line on stderr names the missing module, and only JSONL is written. In all
    processes but the first the writer does nothing.

    Args:
      patience: seconds to try again while the disk or bucket refuses a row of JSONL.
    """
    if jax.process_index() != 0:
        return MultiWriter([])
    writers: list[Writer] = [JsonlWriter(metrics, patience=patience)]
    if tensorboard is not None:
        try:
            writers.append(TensorBoardWriter(tensorboard))
        except ModuleNotFoundError as error:
            print(_INSTALL.format(missing=error.name), file=sys.stderr)
    return MultiWriter(writers)


class MultiWriter:
    """Passes every call to several writers. As a context it closes them at the end."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self.writers = tuple(writers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
            return
        # What ended the run is what the user must know.
        with contextlib.suppress(Exception):
            self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.scalars(step, values)

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        for writer in self.writers:
            writer.images(step, values)

    def hparams(self, values: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.hparams(values)

    def parameter_overview(self, params: Any) -> None:
        for writer in self.writers:
            writer.parameter_overview(params)

    def back_to(self, step: int) -> None:
        for writer in self.writers:
            writer.back_to(step)

    def begin(self, step: int, shown: Mapping[str, Any] | None = None) -> None:
        for writer in self.writers:
            writer.begin(step, shown)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class JsonlWriter:
    """Metrics as JSON lines (see `JsonLines`), and images as PNG files next to them.

    A row is {"step", "scalars"}, {"step", "images"} (file names), {"hparams"}, {"parameter_overview"} or
    {"back_to": step}.
    """

    def __init__(
        self, directory: epath.PathLike, *, append: bool | None = None, patience: float = 0.0
    ) -> None:
        self._patience = patience
        self._rows = JsonLines(directory, append=append, patience=patience)
        self.directory, self.segment = self._rows.directory, self._rows.segment

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._rows.write(
            {"step": int(step), "scalars": {name: _number(value) for name, value in values.items()}}
        )

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        names = {}
        for name, pixels in values.items():
            file = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{step:08d}.png"
            path = self.directory / file
            storage.patiently(functools.partial(write_png, path, pixels), str(path), self._patience)
            names[name] = file
        self._rows.write({"step": int(step), "images": names})

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._rows.write({"hparams": plain(values)})

    def parameter_overview(self, params: Any) -> None:
        self._rows.write({"parameter_overview": overview_text(params)})

    def back_to(self, step: int) -> None:
        self._rows.write({"back_to": int(step)})

    def begin(self, step: int, shown: Mapping[str, Any] | None = None) -> None:
        # Who reads takes the newest value of a step.
        pass

    def flush(self) -> None:
        self._rows.flush()

    def close(self) -> None:
        self._rows.close()


class TensorBoardWriter:
    """TensorBoard events through `clu.metric_writers`.

    Every start, and every return to an earlier step, begins new event files with the mark at which TensorBoard drops
    what older files hold of the same and later steps. If the disk refuses, one line says so and nothing more is
    written by this start; the JSON lines have everything.

    Raises:
      ModuleNotFoundError: if clu, tensorflow or tensorboard is missing; clu declares neither of the other two.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        # TensorFlow reads these once, when it is loaded. It would log at any level that oneDNN is on.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        # TensorFlow warns about accelerators that it does not use here, on a logger of its own.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        for module in ("tensorflow", "tensorboard"):
            importlib.import_module(module)
        self._metric_writers = importlib.import_module("clu.metric_writers")
        self._directory = os.fspath(directory)
        self._writer: Any = None
        # The step of the last mark.
        self._marked: int | None = None
        # Whether the disk refused, so that nothing more is written.
        self.off = False

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {_tag(name): _number(value) for name, value in values.items()}
        self._write(lambda writer: writer.write_scalars(int(step), numbers))

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        tagged = {_tag(name): pixels for name, pixels in values.items()}
        self._write(lambda writer: writer.write_images(int(step), tagged))

    def hparams(self, values: Mapping[str, Any]) -> None:
        shown = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in plain(values).items()
        }
        self._write(lambda writer: writer.write_hparams(shown))

    def parameter_overview(self, params: Any) -> None:
        # TensorBoard renders text as Markdown, in which an indented block keeps a table's columns.
        indented = "\n".join("    " + printable(line) for line in overview_text(params).splitlines())
        self._write(lambda writer: writer.write_texts(0, {"parameter_overview": indented}))

    def back_to(self, step: int) -> None:
        self.begin(step)
        self._write(
            lambda writer: writer.write_texts(int(step), {"rewind": f"went back to step {int(step)}"})
        )

    def begin(self, step: int, shown: Mapping[str, Any] | None = None) -> None:
        # A run that begins at step 0 writes its texts there again.
        first = step + 1 if step and shown is None else step
        if self._writer is not None or self._marked != first:
            self.close()
            self._guard(lambda: _mark_start(self._directory, first))
            self._marked = first
        if shown:
            self.scalars(step, shown)

    def flush(self) -> None:
        if self._writer is not None:
            self._write(lambda writer: writer.flush())

    def close(self) -> None:
        def close(writer: Any) -> None:
            writer.flush()
            writer.close()

        if self._writer is not None:
            self._write(close)
        self._writer = None

    def _write(self, work: Callable[[Any], None]) -> None:
        def write() -> None:
            if self._writer is None:
                self._writer = self._metric_writers.SummaryWriter(self._directory)
            work(self._writer)

        self._guard(write)

    def _guard(self, work: Callable[[], None]) -> None:
        if self.off:
            return
        try:
            work()
        except Exception as error:
            if not storage.is_refusal(error):
                raise
            self._writer, self.off = None, True
            print(
                f"scaling-dit: cannot write {self._directory}: {storage.reason(error)}; TensorBoard gets nothing more "
                "from this start, the JSON lines do",
                file=sys.stderr,
            )


def _mark_start(directory: str, step: int) -> None:
    """Writes an event file with the mark of a start, at which TensorBoard drops older events from `step` on.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second in which they were
    made. The mark must come after those of earlier starts, and before the next one even if that is of the same second.
    """
    gfile = importlib.import_module("tensorflow").io.gfile
    record_writer = importlib.import_module("tensorboard.summary.writer.record_writer")
    event_pb2 = importlib.import_module("tensorboard.compat.proto.event_pb2")
    gfile.makedirs(directory)
    names = [found for name in gfile.listdir(directory) if (found := _EVENTS.match(name))]
    ahead = max((int(found[1]) for found in names), default=0) + 1 - time.time()
    if ahead > _WAIT:
        print(
            f"scaling-dit: the clock was set back by {ahead:,.0f} s: TensorBoard may show steps of several starts; the "
            "JSON lines have the right ones",
            file=sys.stderr,
        )
    elif ahead > 0:
        time.sleep(ahead)
    now = time.time()
    mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    with gfile.GFile(f"{directory}/events.out.tfevents.{int(now):010d}.!start", "wb") as file:
        writer = record_writer.RecordWriter(file)
        for event in (
            event_pb2.Event(wall_time=now, file_version="brain.Event:2"),
            event_pb2.Event(wall_time=now, step=step, session_log=mark),
        ):
            writer.write(event.SerializeToString())
        writer.flush()


def read_scalars(metrics: epath.PathLike) -> list[dict[str, Any]]:
    """All scalars that `JsonlWriter` wrote to a folder, over all starts of a run.

    If several starts wrote the same scalar for the same step, the newest value counts. Values of updates that a rewind
    undid are left out, and so is a last line that a kill cut short.

    Returns:
      One dict for each step, ascending: "step" and each scalar by name.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for segment in read_rows(epath.Path(metrics), _is_row):
        for row in segment:
            if "scalars" in row:
                by_step.setdefault(row["step"], {"step": row["step"]}).update(row["scalars"])
            elif "back_to" in row:
                by_step = {step: values for step, values in by_step.items() if step <= row["back_to"]}
    return [by_step[step] for step in sorted(by_step)]


def read_hparams(metrics: epath.PathLike) -> dict[str, Any] | None:
    """What `JsonlWriter.hparams` noted first in a folder, values of types that JSON lacks as texts; None without it."""
    for segment in read_rows(epath.Path(metrics), _is_row):
        for row in segment:
            if isinstance(row.get("hparams"), dict):
                return dict(row["hparams"])
    return None


def _is_row(row: dict[str, Any]) -> bool:
    """Whether what a row has of scalars or a rewind is as `JsonlWriter` writes it."""
    scalars, back_to = row.get("scalars", {}), row.get("back_to", 0)
    numbers = isinstance(scalars, dict) and all(isinstance(value, int | float) for value in scalars.values())
    return numbers and type(back_to) is int and ("scalars" not in row or type(row.get("step")) is int)


def overview_text(params: Any) -> str:
    """A table of the parameters' names, shapes and sizes: clu's (which needs no TensorFlow) if it is installed."""
    try:
        overview = importlib.import_module("clu.parameter_overview")
    except ModuleNotFoundError:
        rows = [
            ("/".join(path), tuple(leaf.shape), math.prod(leaf.shape))
            for path, leaf in trees.by_path(params).items()
        ]
        lines = [f"{name}  {shape}  {size:,}" for name, shape, size in rows]
        return "\n".join([*lines, f"Total: {sum(size for *_, size in rows):,}"])
    return str(overview.get_parameter_overview(params, include_stats=False))


def plain(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Values of types that the formats support: bool, number or text; anything else as its repr."""
    return {
        name: value if isinstance(value, bool | int | float | str) else repr(value)
        for name, value in values.items()
    }


def _tag(name: str) -> str:
    """The name of a curve or image, as pages show it: the scalars of a user's own metric may be called anything."""
    return re.sub(r"[^\w./@:+= -]", "_", name)


def _number(value: Any) -> int | float:
    array = np.asarray(value)
    return int(array) if np.issubdtype(array.dtype, np.integer) else float(array)

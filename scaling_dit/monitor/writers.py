"""Where metrics go: JSON lines always, TensorBoard through clu when its packages are installed.

The only file that knows clu and TensorBoard. Every start of a run writes a segment file of its own under
`metrics/`, so that nothing is ever renamed or appended to by another process, and a resumed run's figures replace
those of the start that was killed.
"""

import importlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self

import jax
import numpy as np
from etils import epath

from scaling_dit import trees
from scaling_dit.monitor.grid import write_png

_SEGMENT = re.compile(r"segment-(\d+)\.jsonl")
_INSTALL = 'TensorBoard is off: no module {missing!r}; for it: pip install "scaling-dit[tensorboard]"'


class Writer(Protocol):
    """What the trainer calls. Steps count optimiser updates."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by name: Python, numpy or jax scalars."""

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Pictures by name: uint8 [H, W, 3]."""

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The resolved config: dotted key -> value."""

    def parameter_overview(self, params: Any) -> None:
        """A table of the (abstract) parameters."""

    def flush(self) -> None:
        """Make all that was written readable by others."""

    def close(self) -> None:
        """Flush and let go of files."""


def create_writer(workdir: epath.PathLike, tensorboard: bool = True) -> "MultiWriter":
    """The writers of a run, as a context: JSONL in `workdir/metrics`, TensorBoard in `workdir/tensorboard`.

    Without the extra `[tensorboard]` one line on stderr says what is missing, and JSONL goes on alone. On all
    processes but the first the writer does nothing.
    """
    if jax.process_index() != 0:
        return MultiWriter([])
    workdir = epath.Path(workdir)
    writers: list[Writer] = [JsonlWriter(workdir / "metrics")]
    if tensorboard:
        try:
            writers.append(TensorBoardWriter(workdir / "tensorboard"))
        except ModuleNotFoundError as error:
            print(_INSTALL.format(missing=error.name), file=sys.stderr)
    return MultiWriter(writers)


class MultiWriter:
    """Hands everything to several writers; as a context it closes them."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self.writers = tuple(writers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class JsonlWriter:
    """JSON lines in `segment-NNNNN.jsonl`, one file for each start, and pictures as PNG files next to it.

    A row is {"step", "scalars"}, {"step", "images"} (file names), {"hparams"} or {"parameter_overview"}. A local
    segment grows line by line; a remote one (no append on object stores) is rewritten whole by `flush`.

    Args:
      directory: made if it does not exist.
      append: whether files can be appended to; by default if the directory is local.
    """

    def __init__(self, directory: epath.PathLike, *, append: bool | None = None) -> None:
        self.directory = epath.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in self.directory.iterdir() if (m := _SEGMENT.fullmatch(p.name))]
        self.segment = self.directory / f"segment-{max(taken, default=0) + 1:05d}.jsonl"
        if append is None:
            append = "://" not in os.fspath(directory)
        self._lines: list[str] = []
        self._file = self.segment.open("a") if append else None
        self.flush()  # the file exists from the start, so that the number is taken

    def _write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row)
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._write({"step": int(step), "scalars": {name: _number(value) for name, value in values.items()}})

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        names = {}
        for name, pixels in values.items():
            file = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{step:08d}.png"
            write_png(self.directory / file, pixels)
            names[name] = file
        self._write({"step": int(step), "images": names})

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._write({"hparams": _plain(values)})

    def parameter_overview(self, params: Any) -> None:
        self._write({"parameter_overview": overview_text(params)})

    def flush(self) -> None:
        if self._file is None:
            self.segment.write_text("".join(line + "\n" for line in self._lines))
        else:
            self._file.flush()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


class TensorBoardWriter:
    """TensorBoard events through `clu.metric_writers`.

    Raises:
      ModuleNotFoundError: if clu, tensorflow or tensorboard is missing; clu declares neither of the other two.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        # Read once, when TensorFlow is loaded. That oneDNN is on it would tell at any log level.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        # TensorFlow sets its own logger up and warns on it about accelerators it will not use here.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        for module in ("tensorflow", "tensorboard"):
            importlib.import_module(module)
        metric_writers = importlib.import_module("clu.metric_writers")
        self._writer = metric_writers.SummaryWriter(os.fspath(directory))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._writer.write_scalars(int(step), {name: _number(value) for name, value in values.items()})

    def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self._writer.write_images(int(step), values)

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._writer.write_hparams(_plain(values))

    def parameter_overview(self, params: Any) -> None:
        # TensorBoard renders texts as Markdown, where an indented block keeps a table's columns.
        indented = "\n".join("    " + line for line in overview_text(params).splitlines())
        self._writer.write_texts(0, {"parameter_overview": indented})

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self.flush()
        self._writer.close()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All scalars a run wrote over all its starts.

    Where several starts wrote the same figure of the same step, the newest start's stands. A last line that a
    kill cut short is left out.

    Returns:
      One dict for each step, ascending: "step" and each scalar by name.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in _rows(epath.Path(workdir) / "metrics"):
        if "scalars" in row:
            by_step.setdefault(row["step"], {"step": row["step"]}).update(row["scalars"])
    return [by_step[step] for step in sorted(by_step)]


def _rows(directory: epath.Path) -> Iterable[dict[str, Any]]:
    """Rows of all segments, in the order they were written."""
    if not directory.exists():
        return
    for path in sorted((p for p in directory.iterdir() if _SEGMENT.fullmatch(p.name)), key=lambda p: p.name):
        # Split on newlines only: splitlines would also cut inside a text at other separators.
        lines = path.read_bytes().split(b"\n")
        for i, line in enumerate(lines):
            if not line:
                continue
            try:
                yield json.loads(line)
            except ValueError:
                if i != len(lines) - 1:  # only the last line can be torn; anything else is damage
                    raise ValueError(f"{path}: line {i + 1} is not JSON") from None


def overview_text(params: Any) -> str:
    """A table of names, shapes and sizes.

    With clu installed it is `clu.parameter_overview`'s table (which needs no TensorFlow).
    """
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


def _plain(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Values that the formats know: bool, number or text, anything else by its repr."""
    return {
        name: value if isinstance(value, bool | int | float | str) else repr(value)
        for name, value in values.items()
    }


def _number(value: Any) -> int | float:
    array = np.asarray(value)
    return int(array) if np.issubdtype(array.dtype, np.integer) else float(array)

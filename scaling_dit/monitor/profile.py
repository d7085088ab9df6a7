"""Profiler traces of a window of training steps, for TensorBoard's profile tab and Perfetto."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath


class Profiler:
    """Traces the steps of `config.log.profile` with `jax.profiler`, as a context around the loop.

    Files go to `directory/plugins/profile/TIME/`, one set for each process and start, so nothing is overwritten. A
    start that begins inside the window traces the rest of the window. A start that begins after it traces nothing.

    Args:
      directory: TensorBoard's log directory, local or gs://; created when the window begins.
      window: (first, last) step, both traced; () for no trace.
    """

    def __init__(self, directory: epath.Path, window: Sequence[int]) -> None:
        self._directory = directory
        self._first, self._last = window or (1, 0)
        # The profiler writes local files only. For a remote store they are copied when the trace ends.
        self._copied = tempfile.TemporaryDirectory() if "://" in os.fspath(directory) else None
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._copied is not None:
            self._copied.cleanup()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for the dispatch of a step, which marks the step in the trace."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._tracing:
            jax.profiler.start_trace(self._copied.name if self._copied else os.fspath(self._directory))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, result: Any) -> None:
        """Ends the trace after its last step. Waits for the `result` of that step, but of no other."""
        if self._tracing and number >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        if self._copied is not None:
            copy_files(pathlib.Path(self._copied.name), self._directory)


def copy_files(source: pathlib.Path, target: epath.Path) -> None:
    """Copies a local folder's files with their relative paths; `target` may be remote."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())

"""Measures the time of every training step without waiting for any of them.

Steps are dispatched asynchronously, so the loop does not know when one ends. A thread waits for a small result of each
step and notes the time. The loop itself waits no more than it does without this.

The time of a step runs from the end of the step before it to its own end, so it includes waiting for data. Its host
wait is the part before the host dispatched it, during which the devices had nothing to do. In a run of several
processes all devices finish a step together: the slowest host does not show in the time of steps, but in its host wait.
"""

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np


class Window(NamedTuple):
    """The steps since the last window, in seconds; `host_wait` is the mean of a step."""

    steps: int
    p50: float
    p95: float
    longest: float
    host_wait: float


class _Step(NamedTuple):
    step: int
    result: Any
    dispatched: float


class StepTimes:
    """A context that measures steps between its `window`s.

    The first step of a start is left out, because it includes compilation, and so is the time between `pause` and the
    next step.

    Args:
      reached: called with each finished step, in another thread.
      wait: returns once a result is there.
      clock: seconds since any fixed moment.
    """

    def __init__(
        self,
        reached: Callable[[int], None] = lambda step: None,
        *,
        wait: Callable[[Any], Any] = jax.block_until_ready,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._reached, self._wait, self.clock = reached, wait, clock
        # Steps, the ends of pauses, requests to answer once all before them is done, and None at the end.
        self._queue: queue.SimpleQueue[_Step | float | threading.Event | None] = queue.SimpleQueue()
        self._paused = True
        # Written by the thread, read by the loop only after the thread has answered.
        self._rows: list[tuple[float, float]] = []
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        # After an error of the devices a result may never come.
        if kind is None:
            self._thread.join()

    def resume(self) -> None:
        """Ends a pause, if there is one: call it before the loop asks for the next batch."""
        if self._paused:
            self._paused = False
            self._queue.put(self.clock())

    def add(self, step: int, result: Any, dispatched: float) -> None:
        """Notes a step that the loop has dispatched.

        Args:
          step: its number.
          result: an array that the step computes and that nothing donates.
          dispatched: `clock` just before the call.
        """
        self._queue.put(_Step(step, result, dispatched))

    def pause(self) -> None:
        """The loop does something other than steps from now on; call it where the loop has read a result."""
        self._paused = True

    def window(self) -> Window | None:
        """The steps since the last window; None if none was measured. Call it where the loop has read a result."""
        answered = threading.Event()
        self._queue.put(answered)
        answered.wait()
        rows, self._rows = np.asarray(self._rows, float).reshape(-1, 2), []
        if not len(rows):
            return None
        p50, p95 = np.percentile(rows[:, 0], (50, 95))
        return Window(len(rows), float(p50), float(p95), float(rows[:, 0].max()), float(rows[:, 1].mean()))

    def _run(self) -> None:
        compiled = False
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, float):
                self._since = item
            elif self._finished(item):
                # So that it holds no array while it waits for the next one.
                step, dispatched = item.step, item.dispatched
                del item
                self._note(step, dispatched, keep=compiled)
                compiled = True

    def _finished(self, item: _Step) -> bool:
        try:
            self._wait(item.result)
        except Exception:
            # The loop meets the same error and ends the run.
            return False
        return True

    def _note(self, step: int, dispatched: float, keep: bool) -> None:
        now = self.clock()
        since = now if self._since is None else self._since
        if keep:
            self._rows.append((now - since, max(0.0, dispatched - since)))
        self._since = now
        self._reached(step)

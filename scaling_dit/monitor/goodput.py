"""Where the time of a run goes: a stopwatch that always runs in exactly one part, and its record in the workdir.

| part | what it is |
|---|---|
| start_up | from the command to the first step: imports, building, restoring |
| compile | tracing, lowering and compiling, wherever it happens (`jax.monitoring`) |
| step | the loop when it is in none of the others: training steps are on the devices |
| data_wait | the loop waits for the next batch |
| evaluation | validation loss, sample grid, metrics |
| checkpoint | the loop is held up by a save; writing goes on in the background and then counts as step |
| other | writing metrics and traces, going back after a loss spike, closing |
| lost | steps and data waits whose results were thrown away: a later start, or a rewind, began before them |
| downtime | from the last sign of life of a start to the next start |

Steps are dispatched asynchronously. The host runs ahead until it reads metrics or saves, and there it waits for the
devices; that wait is in the loop and so is step time. Over any stretch between two such moments the parts are exact.

Each start writes a segment of rows to a folder: seconds of each part so far. Every part but `lost` and `downtime` is
measured while it runs; those two follow from the rows of all starts, see `summary`.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from scaling_dit.monitor.jsonl import JsonLines, read_rows

START_UP, COMPILE, STEP, DATA_WAIT = "start_up", "compile", "step", "data_wait"
EVALUATION, CHECKPOINT, OTHER, LOST, DOWNTIME = "evaluation", "checkpoint", "other", "lost", "downtime"
PARTS = (STEP, DATA_WAIT, COMPILE, START_UP, EVALUATION, CHECKPOINT, OTHER, LOST, DOWNTIME)
_MEASURED = PARTS[:-2]
_LOSABLE = (STEP, DATA_WAIT)

_COMPILE_EVENTS = "/jax/core/compile/"
# A row is due after this share of the start's length so far, so that rows grow with its logarithm.
_BEAT = 1 / 200
_SHORTEST, _LONGEST = 1.0, 60.0  # but not sooner and not later than so many seconds


class Stopwatch:
    """Seconds of each part since `began`; their sum is the time since then, always.

    Args:
      began: when this start began, in seconds since 1970; now by default.
      clock: seconds since any fixed moment; it must not go back.
      now: seconds since 1970.
    """

    def __init__(
        self,
        began: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ) -> None:
        moment = now()
        self.began = moment if began is None else min(began, moment)
        self.clock = clock
        self._seconds = dict.fromkeys(_MEASURED, 0.0)
        self._since = clock() - (moment - self.began)
        self._part = START_UP
        self._compiled: list[tuple[float, float]] = []  # (start, end) of the outermost compilations so far
        self._lock = threading.Lock()  # the heartbeat reads while the loop writes
        self._thread = threading.get_ident()

    def switch(self, part: str) -> str:
        """From now on time belongs to `part`; returns the part before."""
        with self._lock:
            now = self.clock()
            self._seconds[self._part] += now - self._since
            self._since, before, self._part = now, self._part, part
        return before

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Time inside belongs to `part`, and after it to the part before again."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each measured part up to now."""
        with self._lock:
            running = self.clock() - self._since
            return {
                part: value + (running if part == self._part else 0.0)
                for part, value in self._seconds.items()
            }

    def compiled(self, seconds: float) -> None:
        """A compilation of so many seconds has just ended: they belong to `compile`, not to the part it ran in.

        Traces report from the inside out, so one may contain others; each second is counted once.
        """
        if threading.get_ident() != self._thread:
            return
        end = self.clock()
        start = end - seconds
        while self._compiled and self._compiled[-1][0] >= start:
            inner = self._compiled.pop()
            seconds -= inner[1] - inner[0]
        self._compiled.append((start, end))
        with self._lock:
            self._seconds[COMPILE] += seconds
            self._seconds[self._part] -= seconds


class Recorder:
    """Writes a stopwatch's rows to a folder, as a context; nothing on all processes but the first.

    A row is {"time": seconds since 1970, "began", "step", "event", "seconds": {part: seconds so far}}. Events are
    "start", "resumed", "step", "saved", "spike", "back" (to an earlier step), "done" and "stopped". A thread writes a
    row now and then while the loop is held up, so a killed process has told nearly all of its time.
    """

    def __init__(self, directory: epath.Path, watch: Stopwatch) -> None:
        self._watch = watch
        self._rows = JsonLines(directory) if jax.process_index() == 0 else None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._step: int | None = None
        self._told = watch.clock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        self._write("start")
        if self._rows is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        if self._rows is not None:
            self._closed.set()
            self._thread.join()
            self._write("done" if kind is None else "stopped")
            self._rows.close()

    def tell(self, event: str, step: int) -> None:
        """The state is at `step` now. "step" rows are written only now and then, all other events always."""
        self._step = step
        if event != "step" or self._due():
            self._write(event)

    def _due(self) -> bool:
        watch = self._watch
        gap = min(max(_SHORTEST, _BEAT * sum(watch.seconds().values())), _LONGEST)
        return watch.clock() - self._told >= gap

    def _beat(self) -> None:
        while not self._closed.wait(_SHORTEST):
            if self._due():
                self._write("step")

    def _write(self, event: str) -> None:
        if self._rows is None:
            return
        with self._lock:
            seconds = self._watch.seconds()
            self._told = self._watch.clock()
            row = {"time": self._watch.began + sum(seconds.values()), "began": self._watch.began}
            self._rows.write(row | {"step": self._step, "event": event, "seconds": _rounded(seconds)})
            self._rows.flush()

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILE_EVENTS) and event.endswith("_duration"):
            self._watch.compiled(duration_secs)


def summary(directory: epath.PathLike) -> dict[str, Any]:
    """Goodput over all starts of a run, from the rows that `Recorder` wrote.

    Wall time is from the first start to the last sign of life; a pause after a finished run is not part of it. A step
    is lost when a later start, or a rewind, began before it; its time, with the waits for its data, is moved from
    `step` and `data_wait` to `lost`. So is the time of a killed start after its last step known to be done. Where no
    row was written at exactly the step gone back to, the time between the two rows around it is split by steps.

    Returns:
      "wall": seconds; "seconds": {part: seconds}, which add up to it; "goodput": step / wall; "starts"; "step": the
      last one known; "lost_steps". Zeros where nothing is recorded.
    """
    return summarise(read_rows(epath.Path(directory)))


def summarise(starts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """`summary` of the rows of each start."""
    starts = [rows for rows in starts if rows]
    seconds = dict.fromkeys(PARTS, 0.0)
    done = _Ledger()
    for number, rows in enumerate(starts):
        for part in _MEASURED:
            seconds[part] += rows[-1]["seconds"][part]
        if number and starts[number - 1][-1]["event"] != "done":
            seconds[DOWNTIME] += rows[0]["began"] - starts[number - 1][-1]["time"]
        restart, before = True, rows[0]["seconds"]
        for row in rows:
            done.spend({part: row["seconds"][part] - before[part] for part in _LOSABLE})
            before = row["seconds"]
            if row["step"] is not None:
                done.reach(row["step"], restart)
                restart = False
    for part, lost in done.lost.items():
        seconds[part] -= lost
        seconds[LOST] += lost
    wall = sum(seconds.values())
    return {
        "wall": wall,
        "seconds": seconds,
        "goodput": seconds[STEP] / wall if wall else 0.0,
        "starts": len(starts),
        "step": done.step,
        "lost_steps": done.lost_steps,
    }


class _Ledger:
    """Stretches of steps that count, and what of them was lost."""

    def __init__(self) -> None:
        self.step = 0
        self.lost = dict.fromkeys(_LOSABLE, 0.0)
        self.lost_steps = 0
        self._stretches: list[tuple[int, int, dict[str, float]]] = []  # steps (first, last] and their seconds
        self._pending = dict.fromkeys(_LOSABLE, 0.0)  # after the last step whose result was known

    def spend(self, seconds: dict[str, float]) -> None:
        for part in _LOSABLE:
            self._pending[part] += seconds[part]

    def reach(self, step: int, restart: bool) -> None:
        """The run is at `step`: on from where it was, or back; after a restart what was pending is gone."""
        if step > self.step:
            self._stretches.append((self.step, step, self._pending))
        elif step < self.step or restart:
            self._lose(self._pending)
            self._go_back(step)
        else:
            return
        self.step, self._pending = step, dict.fromkeys(_LOSABLE, 0.0)

    def _go_back(self, step: int) -> None:
        while self._stretches and self._stretches[-1][1] > step:
            first, last, seconds = self._stretches.pop()
            kept = max(step - first, 0) / (last - first)
            self.lost_steps += last - max(step, first)
            self._lose(seconds, 1 - kept)
            if kept:
                self._stretches.append((first, step, {part: kept * value for part, value in seconds.items()}))

    def _lose(self, seconds: dict[str, float], share: float = 1.0) -> None:
        for part, value in seconds.items():
            self.lost[part] += share * value


def lines(figures: dict[str, Any]) -> list[str]:
    """A summary as lines for people: seconds and share of each part, goodput, starts, steps."""
    if not figures["starts"]:
        return ["no record of its time (runs of older versions kept none)"]
    wall = figures["wall"]
    rows = [f"{'part':12} {'seconds':>12} {'share':>7}"]
    rows += [
        f"{part.replace('_', ' '):12} {value:12,.1f} {value / wall if wall else 0.0:7.1%}"
        for part, value in figures["seconds"].items()
    ]
    rows.append(f"{'wall time':12} {wall:12,.1f} {1 if wall else 0:7.1%}")
    rows.append(
        f"goodput {figures['goodput']:.1%} over {figures['starts']} start{'s' * (figures['starts'] != 1)}, "
        f"step {figures['step']:,}, {figures['lost_steps']:,} steps lost"
    )
    return rows


def show(directory: epath.Path) -> None:
    """Tells the goodput of a run that has ended, on stderr of the first process."""
    if jax.process_index() == 0:
        print("\n".join(lines(summary(directory))), file=sys.stderr)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {part: round(value, 4) for part, value in seconds.items()}

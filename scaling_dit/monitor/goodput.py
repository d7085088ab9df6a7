"""Measures how a run spends its time. A stopwatch always runs in exactly one part; its rows go to the workdir.

| part | meaning |
|---|---|
| start_up | from the command to the first step: imports, building, restoring |
| compile | tracing, lowering and compiling, wherever it happens (`jax.monitoring`) |
| step | the loop is in no other part: the devices run training steps |
| data_wait | the loop waits for the next batch |
| evaluation | validation loss, sample grid, metrics |
| checkpoint | the loop waits for a save; writing continues in the background, and that time counts as step |
| other | writing metrics and traces, rewinding after a loss spike, closing |
| lost | steps and data waits whose results were discarded, because a later start or a rewind began before them |
| downtime | from the last row of a start to the next start |

Steps are dispatched asynchronously. The host runs ahead until it reads metrics or saves a checkpoint. There it waits
for the devices, and this wait counts as step time. Between two such moments the parts are exact.

Each start writes a segment of rows to a folder, with the seconds of each part so far. All parts but `lost` and
`downtime` are measured while the run goes; `summary` computes these two from the rows of all starts.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from scaling_dit.errors import StorageError, UserError, printable
from scaling_dit.monitor.jsonl import JsonLines, read_rows

START_UP, COMPILE, STEP, DATA_WAIT = "start_up", "compile", "step", "data_wait"
EVALUATION, CHECKPOINT, OTHER, LOST, DOWNTIME = "evaluation", "checkpoint", "other", "lost", "downtime"
PARTS = (STEP, DATA_WAIT, COMPILE, START_UP, EVALUATION, CHECKPOINT, OTHER, LOST, DOWNTIME)
_MEASURED = PARTS[:-2]
_LOSABLE = (STEP, DATA_WAIT)

_COMPILE_EVENTS = "/jax/core/compile/"
# A row is due after this share of the start's duration so far, so that the number of rows grows with its logarithm.
_BEAT = 1 / 200
# Seconds that two clocks may differ by without one of them having been set.
_DRIFT = 2.0
# Bounds on the time between rows, in seconds.
_SHORTEST, _LONGEST = 1.0, 60.0


class Stopwatch:
    """Seconds of each part since `began`. They always sum to the time since then.

    Args:
      began: when this start began, in seconds since 1970; now by default.
      clock: seconds since any fixed moment; must be monotonic.
      now: seconds since 1970.
    """

    def __init__(
        self,
        began: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        moment = now()
        self.began = moment if began is None else min(began, moment)
        self.clock = clock
        self._seconds = dict.fromkeys(_MEASURED, 0.0)
        self._since = clock() - (moment - self.began)
        self._part = START_UP
        # (start, end) of the outermost compilations so far.
        self._compiled: list[tuple[float, float]] = []
        # The heartbeat thread reads while the loop writes.
        self._lock = threading.Lock()
        self._thread = threading.get_ident()

    def switch(self, part: str) -> str:
        """Counts the time from now on as `part`; returns the previous part."""
        with self._lock:
            now = self.clock()
            self._seconds[self._part] += now - self._since
            self._since, before, self._part = now, self._part, part
        return before

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Counts the time inside the context as `part`, then returns to the previous part."""
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

    def shift(self) -> float:
        """Seconds by which the clock of the day has been set ahead since the stopwatch began; below 0 if back."""
        return self._now() - (self.began + sum(self.seconds().values()))

    def compiled(self, seconds: float) -> None:
        """Moves the seconds of a compilation that has just ended from the current part to `compile`.

        jax reports nested traces from the inside out. Each second is counted once. jax takes them from the clock of the
        day, which may be set meanwhile: no more is moved than the part has.
        """
        if threading.get_ident() != self._thread:
            return
        seconds = min(max(seconds, 0.0), sum(self.seconds().values()))
        end = self.clock()
        start = end - seconds
        while self._compiled and self._compiled[-1][0] >= start:
            inner = self._compiled.pop()
            seconds -= inner[1] - inner[0]
        self._compiled.append((start, end))
        seconds = min(max(seconds, 0.0), self.seconds()[self._part])
        with self._lock:
            self._seconds[COMPILE] += seconds
            self._seconds[self._part] -= seconds


class Recorder:
    """A context that writes a stopwatch's rows to a folder. Only the first process writes.

    A row is {"time": seconds since 1970, "began", "step", "event", "seconds": {part: seconds so far}, "shift": seconds
    by which the clock was set meanwhile}. "time" is "began" and the seconds since, whatever the clock shows. Events are
    "start", "resumed", "step", "saved", "spike", "back" (to an earlier step), "done" and "stopped". A thread writes
    rows while the loop is blocked, so a killed process loses at most a minute of accounting.
    """

    def __init__(self, directory: epath.Path, watch: Stopwatch) -> None:
        self._watch = watch
        self._account = Account()
        self._rows = None
        if jax.process_index() == 0:
            for rows in read_rows(directory):
                self._account.start()
                for row in rows:
                    self._account.add(row)
            self._account.start()
            self._rows = JsonLines(directory)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._step: int | None = None
        self._last_write = watch.clock()
        self._compile_in_last_row = 0.0
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
            with contextlib.suppress(StorageError):
                self._rows.close()

    def record(self, event: str, step: int) -> None:
        """Records an event at `step`. "step" rows are written only when one is due, other events always."""
        self._step = step
        if event != "step" or self._due():
            self._write(event)

    def so_far(self) -> dict[str, Any]:
        """The `summary` of all starts up to this start's last row; zeros in all processes but the first.

        A row that was written in the middle of a compilation counts its time as the step's, so another one follows it.
        """
        if self._watch.seconds()[COMPILE] != self._compile_in_last_row:
            self._write("step")
        with self._lock:
            return self._account.summary()

    def _due(self) -> bool:
        watch = self._watch
        gap = min(max(_SHORTEST, _BEAT * sum(watch.seconds().values())), _LONGEST)
        return watch.clock() - self._last_write >= gap

    def _beat(self) -> None:
        while not self._closed.wait(_SHORTEST):
            if self._due():
                self._write("step")

    def _write(self, event: str) -> None:
        if self._rows is None:
            return
        with self._lock:
            seconds = self._watch.seconds()
            self._last_write = self._watch.clock()
            self._compile_in_last_row = seconds[COMPILE]
            row = {
                "time": self._watch.began + sum(seconds.values()),
                "began": self._watch.began,
                "step": self._step,
                "event": event,
                "seconds": _rounded(seconds),
                "shift": round(self._watch.shift(), 3),
            }
            # Accounting ends no run: what the disk refuses is written with the next row, and metrics and checkpoints
            # meet the same disk.
            with contextlib.suppress(StorageError):
                self._rows.write(row)
                self._rows.flush()
            self._account.add(row)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILE_EVENTS) and event.endswith("_duration"):
            self._watch.compiled(duration_secs)


def summary(directory: epath.PathLike) -> dict[str, Any]:
    """Goodput over all starts of a run, from the rows that `Recorder` wrote.

    Wall time runs from the first start to the last row, without pauses after a finished run. A step is lost when a
    later start or a rewind began before it; its time and the waits for its data move from `step` and `data_wait` to
    `lost`. So does the time of a killed start after its last completed step. If no row was written at exactly the step
    that the run returned to, the time between the rows around it is divided in proportion to steps.

    Returns:
      "wall": seconds; "seconds": {part: seconds}, which sum to "wall"; "goodput": step / wall; "starts": their number;
      "step": the last recorded one; "lost_steps"; "clock": a line for each time that the clock was set. All are zero
      or empty without a record.
    """
    return summarise(read_rows(epath.Path(directory), _is_row))


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a row has all that a summary reads, in the right types."""
    seconds, step = row.get("seconds"), row.get("step")
    return (
        isinstance(seconds, dict)
        and all(_is_time(seconds.get(part)) for part in _MEASURED)
        and _is_time(row.get("time"))
        and _is_time(row.get("began"))
        and isinstance(row.get("event"), str)
        and (step is None or type(step) is int)
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def summarise(starts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The `summary` of the rows of each start."""
    account = Account()
    for rows in starts:
        account.start()
        for row in rows:
            account.add(row)
    return account.summary()


class Account:
    """The `summary` of rows that are added one by one, in constant time and memory for each."""

    def __init__(self) -> None:
        # Of the starts before this one.
        self._closed = dict.fromkeys(PARTS, 0.0)
        self._last: dict[str, Any] | None = None
        self._done = _Ledger()
        self._starts = 0
        self._clock: list[str] = []
        self._fresh = self._restart = True

    def start(self) -> None:
        """The next row is the first of another start."""
        self._fresh = self._restart = True

    def add(self, row: dict[str, Any]) -> None:
        """Adds the next row of this start."""
        before = self._last
        if self._fresh:
            if before is not None:
                for part in _MEASURED:
                    self._closed[part] += before["seconds"][part]
                self._clock += _clock_set(before, self._starts)
                pause = row["began"] - (before["time"] + _shift(before))
                if pause < 0:
                    self._clock.append(
                        f"the clock was set back by {-pause:,.0f} s or more before start {self._starts + 1}"
                    )
                if before["event"] != "done":
                    self._closed[DOWNTIME] += max(pause, 0.0)
            self._fresh, self._starts, before = False, self._starts + 1, row
        assert before is not None
        self._done.spend({part: row["seconds"][part] - before["seconds"][part] for part in _LOSABLE})
        self._last = row
        if row["step"] is not None:
            self._done.reach(row["step"], self._restart)
            self._restart = False

    def summary(self) -> dict[str, Any]:
        """As the function `summary`."""
        seconds = dict(self._closed)
        for part, value in (self._last["seconds"] if self._last else {}).items():
            seconds[part] += value
        for part, lost in self._done.lost.items():
            seconds[part] -= lost
            seconds[LOST] += lost
        wall = sum(seconds.values())
        return {
            "wall": wall,
            "seconds": seconds,
            "goodput": seconds[STEP] / wall if wall else 0.0,
            "starts": self._starts,
            "step": self._done.step,
            "lost_steps": self._done.lost_steps,
            "clock": [*self._clock, *(_clock_set(self._last, self._starts) if self._last else ())],
        }


def _shift(row: dict[str, Any]) -> float:
    """Seconds by which the clock was set up to a row; rows of older versions do not say."""
    shift = row.get("shift")
    return float(shift) if isinstance(shift, int | float) and math.isfinite(shift) else 0.0


def _clock_set(last: dict[str, Any], start: int) -> list[str]:
    """A line if the clock was set during a start, by its last row."""
    shift = _shift(last)
    if abs(shift) <= _DRIFT:
        return []
    return [
        f"the clock was set {'ahead' if shift > 0 else 'back'} by {abs(shift):,.0f} s during start {start}"
    ]


class _Ledger:
    """The stretches of steps that count so far, and the time of those that were lost."""

    def __init__(self) -> None:
        self.step = 0
        self.lost = dict.fromkeys(_LOSABLE, 0.0)
        self.lost_steps = 0
        # Each has the steps (first, last] and their seconds.
        self._stretches: list[tuple[int, int, dict[str, float]]] = []
        # Seconds since the last recorded step.
        self._pending = dict.fromkeys(_LOSABLE, 0.0)

    def spend(self, seconds: dict[str, float]) -> None:
        for part in _LOSABLE:
            self._pending[part] += seconds[part]

    def reach(self, step: int, restart: bool) -> None:
        """Moves the run to `step`, forward or back. Going back or restarting loses the pending seconds."""
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


def lines(totals: dict[str, Any]) -> list[str]:
    """A summary as lines of text: seconds and share of each part, goodput, starts, steps."""
    if not totals["starts"]:
        return ["no record of its time (runs of older versions kept none)"]
    wall = totals["wall"]
    rows = [f"{'part':12} {'seconds':>12} {'share':>7}"]
    rows += [
        f"{part.replace('_', ' '):12} {value:12,.1f} {value / wall if wall else 0.0:7.1%}"
        for part, value in totals["seconds"].items()
    ]
    rows.append(f"{'wall time':12} {wall:12,.1f} {1 if wall else 0:7.1%}")
    rows.append(
        f"goodput {totals['goodput']:.1%} over {totals['starts']} start{'s' * (totals['starts'] != 1)}, "
        f"step {totals['step']:,}, {totals['lost_steps']:,} steps lost"
    )
    return rows + totals["clock"]


def show(directory: epath.Path) -> None:
    """Prints the goodput of a run that has ended to stderr of the first process.

    The run is whole without it, so a record that cannot be read is one line and no error.
    """
    if jax.process_index() != 0:
        return
    try:
        print("\n".join(lines(summary(directory))), file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"scaling-dit: where the time went is not known: {printable(str(error))}", file=sys.stderr)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {part: round(value, 4) for part, value in seconds.items()}

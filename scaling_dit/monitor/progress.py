"""The speed of a run and its remaining time: a meter, and the progress line that shows it."""

import sys
from collections import deque
from typing import NamedTuple, TextIO

from tqdm import tqdm

from scaling_dit.monitor.goodput import DATA_WAIT, STEP, Stopwatch

# Seconds over which the current rate is measured: enough to smooth jitter, short enough to show a change soon.
_RECENT = 30.0


class _Mark(NamedTuple):
    """A step of this start, the seconds of training up to it, and those of them spent waiting for data."""

    step: int
    active: float
    waited: float


class Meter:
    """Measures the rate of training steps in this start, from the stopwatch's time in steps and in waits for data.

    Steps are dispatched asynchronously, so a rate is right only between two moments at which the host has read a
    result: call `mark` then. The time before the first mark is warm-up, and is left out of all rates once there is a
    second mark. Compilation never counts.

    Args:
      start: the step this start begins at.
      batch: images in a step, over all devices.
      watch: the start's stopwatch.
    """

    def __init__(self, start: int, batch: int, watch: Stopwatch) -> None:
        self.batch = batch
        self._watch = watch
        self.back_to(start)

    def back_to(self, step: int) -> None:
        """Restarts the rates at this step."""
        self._first = self._now(step)
        self._recent: deque[_Mark] = deque([self._first])
        self._warming = True

    def _now(self, step: int) -> _Mark:
        seconds = self._watch.seconds()
        waited = seconds[DATA_WAIT]
        return _Mark(step, seconds[STEP] + waited, waited)

    def mark(self, step: int) -> None:
        """Notes the time at a step whose result the host has read. A second call for the same step does nothing."""
        if step <= self._recent[-1].step:
            return
        now = self._now(step)
        if self._warming and len(self._recent) == 2:
            self._recent.popleft()
            self._first, self._warming = self._recent[0], False
        self._recent.append(now)
        while len(self._recent) > 2 and now.active - self._recent[1].active >= _RECENT:
            self._recent.popleft()

    def _since(self, mark: _Mark) -> tuple[float, float]:
        """Steps per second, and the share of time spent waiting for data, from a mark to the last mark."""
        last = self._recent[-1]
        seconds = last.active - mark.active
        if seconds <= 0:
            return 0.0, 0.0
        return (last.step - mark.step) / seconds, min((last.waited - mark.waited) / seconds, 1.0)

    @property
    def steps_per_second(self) -> float:
        """The current rate; 0 before the first mark."""
        return self._since(self._recent[0])[0]

    @property
    def data_wait(self) -> float:
        """The share of recent time spent waiting for data, 0 to 1."""
        return self._since(self._recent[0])[1]

    def eta(self, remaining: int) -> float | None:
        """Seconds for the remaining steps at the current rate; None before a rate is known."""
        rate = self.steps_per_second
        return remaining / rate if rate else None

    def rates(self) -> dict[str, float]:
        """Rates for the metric writers: "mean" over this start, the others over its last half minute."""
        mean, mean_wait = self._since(self._first)
        return {
            "speed/steps_per_second": self.steps_per_second,
            "speed/images_per_second": self.steps_per_second * self.batch,
            "speed/data_wait": self.data_wait,
            "speed/mean_images_per_second": mean * self.batch,
            "speed/mean_data_wait": mean_wait,
        }


class Progress:
    """Shows step, loss, rates, remaining time and data wait: as a bar on a terminal, else as a line now and then.

    Args:
      total: the step at which the run ends.
      start: the step at which this start begins; after a resume, the checkpoint's.
      batch: images in a step, over all devices.
      watch: the start's stopwatch, for the rates.
      stream: where to print; stderr by default.
      every: seconds between lines.
      enabled: false prints nothing, as in all processes but the first. Rates are measured all the same.
    """

    def __init__(
        self,
        total: int,
        start: int,
        batch: int,
        watch: Stopwatch,
        *,
        stream: TextIO | None = None,
        every: float = 10.0,
        enabled: bool = True,
    ) -> None:
        self.meter = Meter(start, batch, watch)
        self._total, self._step = total, start
        self._stream = stream or sys.stderr
        self._every, self._enabled, self._clock = every, enabled, watch.clock
        self._last_print, self._printed_step = watch.clock(), start
        self._loss: float | None = None
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
                desc=self.line(),
            )

    def rates(self, step: int) -> dict[str, float]:
        """Rates for the metric writers, at a step whose result is known; see `Meter.rates`."""
        self.meter.mark(step)
        return self.meter.rates()

    def update(self, step: int, loss: float | None = None) -> None:
        """Shows a step whose result is known. Without a new loss the last one stays."""
        self.meter.mark(step)
        advance, self._step = step - self._step, step
        self._loss = self._loss if loss is None else float(loss)
        if self._bar is not None:
            self._bar.set_description_str(self.line(), refresh=False)
            self._bar.update(advance)
        elif self._enabled and self._clock() - self._last_print >= self._every:
            self._print()

    def back_to(self, step: int) -> None:
        """Restarts the rates at an earlier step. The display follows with the next update."""
        self.meter.back_to(step)

    def line(self) -> str:
        """The text shown, in one line."""
        parts = [f"step {self._step}/{self._total}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        rate, eta = self.meter.steps_per_second, self.meter.eta(self._total - self._step)
        if eta is not None:
            parts.append(f"{_rate_text(rate)} steps/s")
            parts.append(f"{_rate_text(rate * self.meter.batch)} images/s")
            parts.append(f"{tqdm.format_interval(round(eta))} to go")
            parts.append(f"data wait {self.meter.data_wait:.0%}")
        return ", ".join(parts)

    def _print(self) -> None:
        self._last_print, self._printed_step = self._clock(), self._step
        print(self.line(), file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last state, which stays on the screen."""
        if self._bar is not None:
            self._bar.set_description_str(self.line())
            self._bar.close()
        elif self._enabled and self._printed_step != self._step:
            self._print()


def _rate_text(value: float) -> str:
    """A number with three significant digits; from 100 on as a whole number."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

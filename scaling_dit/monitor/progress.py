"""How fast a run goes and when it will end: a meter, and a line that shows it."""

import sys
from collections import deque
from typing import NamedTuple, TextIO

from tqdm import tqdm

from scaling_dit.monitor.goodput import DATA_WAIT, STEP, Stopwatch

_RECENT = 30.0  # seconds the current rate is taken over: smooths jitter, follows a change soon


class _Mark(NamedTuple):
    step: int
    active: float  # seconds of this start up to the step, without pauses
    waited: float  # of these, seconds spent waiting for data


class Meter:
    """Steps and time of this start only: training and the waits for data within it, as a stopwatch has them.

    Steps are dispatched asynchronously, so a rate is right between two moments at which the host has read a result;
    those are the moments to call `mark`. What lies before the first mark warms up and is left out of all rates as
    soon as there is a second one; compilation is in no rate.

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
        """Rates start anew from this step."""
        self._first = self._now(step)
        self._recent: deque[_Mark] = deque([self._first])
        self._warming = True

    def _now(self, step: int) -> _Mark:
        seconds = self._watch.seconds()
        waited = seconds[DATA_WAIT]
        return _Mark(step, seconds[STEP] + waited, waited)

    def mark(self, step: int) -> None:
        """At a step whose result is known; a second call for the same step changes nothing."""
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
        """Steps per second, and the share of time spent waiting for data, from a mark to the last one."""
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
        """Seconds that so many steps take at the current rate; None while it is not known."""
        rate = self.steps_per_second
        return remaining / rate if rate else None

    def rates(self) -> dict[str, float]:
        """Figures for the metric writers; "mean" is over this start, the others over its last half minute."""
        mean, mean_wait = self._since(self._first)
        return {
            "speed/steps_per_second": self.steps_per_second,
            "speed/images_per_second": self.steps_per_second * self.batch,
            "speed/data_wait": self.data_wait,
            "speed/mean_images_per_second": mean * self.batch,
            "speed/mean_data_wait": mean_wait,
        }


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere: step, loss, rates, time to go, data wait.

    Args:
      total: the step the run ends at.
      start: the step this start begins at; after a resume, the checkpoint's.
      batch: images in a step, over all devices.
      watch: the start's stopwatch, which rates are taken from.
      stream: where it is shown; stderr by default.
      every: seconds between plain lines.
      enabled: false shows nothing, for all processes but the first; rates are kept all the same.
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
        self._told, self._told_step = watch.clock(), start
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
        """Figures for the metric writers at a step whose result is known; see `Meter.rates`."""
        self.meter.mark(step)
        return self.meter.rates()

    def update(self, step: int, loss: float | None = None) -> None:
        """At a step whose result is known; the last loss given stays shown."""
        self.meter.mark(step)
        advance, self._step = step - self._step, step
        self._loss = self._loss if loss is None else float(loss)
        if self._bar is not None:
            self._bar.set_description_str(self.line(), refresh=False)
            self._bar.update(advance)
        elif self._enabled and self._clock() - self._told >= self._every:
            self._tell()

    def back_to(self, step: int) -> None:
        """The run goes back to an earlier step; what is shown follows with the next update."""
        self.meter.back_to(step)

    def line(self) -> str:
        """What is shown, in one line."""
        parts = [f"step {self._step}/{self._total}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        rate, eta = self.meter.steps_per_second, self.meter.eta(self._total - self._step)
        if eta is not None:
            parts.append(f"{_figures(rate)} steps/s")
            parts.append(f"{_figures(rate * self.meter.batch)} images/s")
            parts.append(f"{tqdm.format_interval(round(eta))} to go")
            parts.append(f"data wait {self.meter.data_wait:.0%}")
        return ", ".join(parts)

    def _tell(self) -> None:
        self._told, self._told_step = self._clock(), self._step
        print(self.line(), file=self._stream, flush=True)

    def close(self) -> None:
        """The last state stays on the screen."""
        if self._bar is not None:
            self._bar.set_description_str(self.line())
            self._bar.close()
        elif self._enabled and self._told_step != self._step:
            self._tell()


def _figures(value: float) -> str:
    """Three significant figures for small numbers, whole ones above."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

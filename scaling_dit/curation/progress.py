"""Progress of `prepare`: speed and remaining time of this process, as a bar on a terminal, else as occasional lines."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TextIO

from tqdm import tqdm

# Seconds over which the rate is measured.
_RECENT = 60.0


class Progress:
    """Counts the parts and images of one process and shows them.

    The remaining time is the number of remaining parts times the mean time of the parts made since the start. It is
    unknown before the first part is done.

    Args:
      total: parts of this process, made before or still to make.
      stream: where to print; stderr by default.
      every: seconds between lines.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stream, self._every, self._clock = total, stream or sys.stderr, every, clock
        self._skipped = self._made = self._images = self._damaged = self._filtered = 0
        self._start = self._last_print = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)])
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, file=self._stream, dynamic_ncols=True,
                             bar_format="{percentage:3.0f}% |{bar}| {desc}", desc=self.line())  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._made:
            print(self.line(), file=self._stream, flush=True)

    def skip(self) -> None:
        """Counts a part that was made before."""
        self._skipped += 1
        self._show(1)

    def add(self, images: int) -> None:
        """Counts images that were written since the last call."""
        self._images += images
        now = self._clock()
        self._recent.append((now, self._images))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RECENT:
            self._recent.popleft()
        self._show(0)

    def done(self, damaged: int, filtered: int) -> None:
        """Counts a part that was made, and the samples that it left out as damaged or filtered."""
        self._made += 1
        self._damaged += damaged
        self._filtered += filtered
        self._show(1)

    def line(self) -> str:
        """The text shown, in one line."""
        finished = self._skipped + self._made
        parts = [f"part {finished}/{self._total}", f"{self._images:,} images"]
        (then, before), (now, written) = self._recent[0], self._recent[-1]
        if now > then:
            parts.append(f"{(written - before) / (now - then):,.0f} images/s")
        if self._made:
            to_go = (self._clock() - self._start) / self._made * (self._total - finished)
            parts.append(f"{tqdm.format_interval(round(to_go))} to go")
        if self._filtered:
            parts.append(f"{self._filtered:,} filtered")
        if self._damaged:
            parts.append(f"{self._damaged:,} damaged")
        return ", ".join(parts)

    def _show(self, advance: int) -> None:
        if self._bar is not None:
            self._bar.set_description_str(self.line(), refresh=False)
            self._bar.update(advance)
        elif self._clock() - self._last_print >= self._every:
            self._last_print = self._clock()
            print(self.line(), file=self._stream, flush=True)

"""A clock for tests that measure time."""

from scaling_dit.monitor.goodput import Stopwatch


class Clock:
    """Seconds that pass only when a test advances them, and a stopwatch that reads them."""

    def __init__(self, now: float = 1000.0):
        self.now = now
        self.watch = Stopwatch(clock=self, now=self)

    def __call__(self):
        return self.now

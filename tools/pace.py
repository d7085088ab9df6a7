"""How fast a core is while something else runs: `python -m tools.pace` samples until SIGTERM, then prints one line.

Two suites, or two versions of one, can be compared only where their cores were equally fast. In a virtual machine they
are not: a neighbour on the other thread of a core slows a program down to half, and no counter of the guest shows it.
"""

import signal
import statistics
import time
from collections.abc import Sequence

# Turns of the loop, some hundredths of a second; and seconds between two samples, which then take under a hundredth of
# a core.
_TURNS = 500_000
_EVERY = 15.0


def sample(turns: int = _TURNS) -> float:
    """Seconds of the processor that a loop of so many turns takes."""
    began, total = time.process_time(), 0
    for turn in range(turns):
        total += turn % 7
    return time.process_time() - began


def summary(samples: Sequence[float]) -> str:
    """One line on some samples in seconds; at least one."""
    middle, best = statistics.median(samples), min(samples)
    return f"a fixed loop took {middle:.3f} s in the median and {best:.3f} s at its fastest"


def main(every: float = _EVERY) -> None:
    """Samples until SIGTERM."""
    # Blocked and waited for, so that it ends no sample and is not missed between two.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    samples = [sample()]
    while signal.sigtimedwait({signal.SIGTERM}, every) is None:
        samples.append(sample())
    print(summary(samples))


if __name__ == "__main__":
    main()

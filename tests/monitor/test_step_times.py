"""Times of steps that end whenever a test says so."""

import queue
import threading

import pytest

from scaling_dit.monitor.step_times import StepTimes


class Devices:
    """Results whose `wait` ends when the test finishes them, and the clock that both read."""

    def __init__(self):
        self.now = 100.0
        self._ready = queue.SimpleQueue()
        self.times = StepTimes(self.reached, wait=self.wait, clock=lambda: self.now)
        self.steps, self._noted = [], threading.Semaphore(0)

    def wait(self, result):
        found = self._ready.get(timeout=30)
        if isinstance(found, Exception):
            raise found
        assert found == result

    def reached(self, step):
        self.steps.append(step)
        self._noted.release()

    def finish(self, step, at):
        """A step ends at a time, and its end has been noticed."""
        self.now = at
        self._ready.put(step)
        assert self._noted.acquire(timeout=30)

    def dispatch(self, step, at):
        self.now = at
        self.times.resume()
        self.times.add(step, step, at)


@pytest.fixture
def devices():
    found = Devices()
    with found.times:
        yield found


def test_a_step_takes_from_the_end_of_the_last_to_its_own(devices):
    # The host runs ahead: all three are dispatched before the first ends.
    for step in (1, 2, 3):
        devices.dispatch(step, 100.0)
    devices.finish(1, 150.0)
    devices.finish(2, 152.0)
    devices.finish(3, 156.0)
    window = devices.times.window()
    # The first step of a start compiles.
    assert window.steps == 2
    assert (window.p50, window.longest) == (3.0, 4.0) and window.p95 == pytest.approx(3.9)
    assert window.host_wait == 0.0
    assert devices.steps == [1, 2, 3]
    assert devices.times.window() is None


def test_waiting_for_the_host_counts_and_pauses_do_not(devices):
    devices.dispatch(1, 100.0)
    devices.finish(1, 110.0)
    # Devices idle for 3 s.
    devices.dispatch(2, 113.0)
    devices.finish(2, 118.0)
    devices.times.pause()
    assert devices.times.window() == (1, 8.0, 8.0, 8.0, 3.0)
    # An evaluation of 1,000 s, and 1 s for the next batch.
    devices.now = 1118.0
    devices.times.resume()
    devices.now = 1119.0
    devices.times.add(3, 3, 1119.0)
    devices.finish(3, 1124.0)
    assert devices.times.window() == (1, 6.0, 6.0, 6.0, 1.0)


def test_an_error_of_the_devices_stays_the_loops(devices):
    devices.dispatch(1, 100.0)
    devices.finish(1, 101.0)
    devices.dispatch(2, 101.0)
    devices._ready.put(RuntimeError("lost"))
    assert devices.times.window() is None
    devices.dispatch(3, 101.0)
    devices.finish(3, 103.0)
    assert devices.times.window().longest == 2.0


def test_an_error_of_the_loop_leaves_no_thread_that_it_waits_for():
    devices = Devices()
    with pytest.raises(KeyError), devices.times:
        devices.dispatch(1, 100.0)
        raise KeyError

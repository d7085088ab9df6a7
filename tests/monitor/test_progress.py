"""Rates of this start only, the share of data waits, and what is shown on terminals and elsewhere."""

import io

import pytest

from scaling_dit.monitor.goodput import COMPILE, DATA_WAIT, EVALUATION, STEP
from scaling_dit.monitor.progress import Meter, Progress
from tests.support.fake_clock import Clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(target, clock, steps, seconds=1.0, wait=0.0, mark=None):
    """Steps of so many seconds, some of them waiting; the result of each is known."""
    clock.watch.switch(STEP)
    for step in steps:
        with clock.watch.part(DATA_WAIT):
            clock.now += wait
        clock.now += seconds - wait
        (mark or target.mark)(step)


def test_nothing_is_known_before_the_first_mark():
    meter = Meter(0, 8, Clock().watch)
    assert meter.steps_per_second == 0.0
    assert meter.data_wait == 0.0
    assert meter.eta(10) is None


def test_rates_leave_compilation_out():
    clock = Clock()
    meter = Meter(0, 64, clock.watch)
    with clock.watch.part(COMPILE):
        clock.now += 500.0
    run(meter, clock, [1], seconds=50.0)
    # All there is yet.
    assert meter.steps_per_second == pytest.approx(1 / 50)
    run(meter, clock, range(2, 12), seconds=0.5, wait=0.1)
    rates = meter.rates()
    assert rates["speed/steps_per_second"] == pytest.approx(2.0)
    assert rates["speed/images_per_second"] == pytest.approx(128.0)
    assert rates["speed/data_wait"] == pytest.approx(0.2)
    assert rates["speed/mean_images_per_second"] == pytest.approx(128.0)
    assert meter.eta(30) == pytest.approx(15.0)


def test_a_resumed_run_counts_only_its_own_steps():
    clock = Clock()
    meter = Meter(5000, 8, clock.watch)
    run(meter, clock, [5020, 5040, 5060], seconds=10.0)
    assert meter.steps_per_second == pytest.approx(2.0)
    assert meter.rates()["speed/mean_images_per_second"] == pytest.approx(16.0)


def test_the_current_rate_follows_and_the_mean_does_not():
    clock = Clock()
    meter = Meter(0, 1, clock.watch)
    run(meter, clock, range(1, 102), seconds=1.0, wait=0.5)
    run(meter, clock, range(102, 142), seconds=4.0)
    rates = meter.rates()
    assert rates["speed/steps_per_second"] == pytest.approx(0.25)
    assert rates["speed/data_wait"] == 0.0
    assert rates["speed/mean_images_per_second"] == pytest.approx(140 / 260)
    assert rates["speed/mean_data_wait"] == pytest.approx(50 / 260)
    assert meter.eta(10) == pytest.approx(40.0)


def test_pauses_count_in_no_rate():
    clock = Clock()
    meter = Meter(0, 1, clock.watch)
    for step in range(1, 11):
        run(meter, clock, [step], seconds=1.0, wait=0.25)
        with clock.watch.part(EVALUATION):
            clock.now += 100.0
    assert meter.steps_per_second == pytest.approx(1.0)
    assert meter.data_wait == pytest.approx(0.25)


def test_an_error_while_waiting_still_ends_the_wait():
    clock = Clock()
    meter = Meter(0, 1, clock.watch)
    run(meter, clock, [1])
    with pytest.raises(StopIteration), clock.watch.part(DATA_WAIT):
        clock.now += 1.0
        raise StopIteration
    clock.now += 1.0
    meter.mark(2)
    run(meter, clock, [3], seconds=2.0)
    assert meter.data_wait == pytest.approx(0.25)


def test_a_step_marked_twice_counts_once():
    clock = Clock()
    meter = Meter(0, 1, clock.watch)
    run(meter, clock, [1, 2])
    clock.now += 7.0
    meter.mark(2)
    assert meter.steps_per_second == pytest.approx(1.0)


def progress_on(stream, clock, **options):
    return Progress(total=100, start=20, batch=8, watch=clock.watch, stream=stream, **options)


def test_plain_lines_now_and_then_when_not_a_terminal():
    stream, clock = io.StringIO(), Clock()
    progress = progress_on(stream, clock, every=10.0)
    run(progress, clock, range(21, 61), wait=0.5, mark=lambda step: progress.update(step, loss=1 / step))
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"step {s}/100" for s in (30, 40, 50, 60)]
    assert lines[-1] == ("step 60/100, loss 0.0167, 1 steps/s, 8 images/s, 00:40 to go, data wait 50%")
    progress.close()
    # The last step was printed already.
    assert stream.getvalue().splitlines() == lines


def test_the_last_step_is_printed_at_the_end():
    stream, clock = io.StringIO(), Clock()
    progress = progress_on(stream, clock, every=10.0)
    run(progress, clock, range(21, 26), mark=lambda step: progress.update(step, loss=2.0))
    assert stream.getvalue() == ""
    progress.close()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == ["step 25/100"]


def test_rates_start_anew_where_a_run_goes_back():
    clock = Clock()
    progress = progress_on(io.StringIO(), clock)
    run(progress, clock, range(21, 41), mark=progress.update)
    progress.back_to(30)
    run(progress, clock, range(31, 36), seconds=2.0, mark=progress.update)
    assert progress.rates(35)["speed/mean_images_per_second"] == pytest.approx(4.0)
    assert progress.line().startswith("step 35/100")


def test_the_loss_stays_shown():
    clock = Clock()
    progress = progress_on(io.StringIO(), clock)
    progress.update(21, loss=0.5)
    progress.update(22)
    assert "loss 0.5000" in progress.line()


def test_rates_are_those_of_the_line():
    clock = Clock()
    progress = progress_on(io.StringIO(), clock)
    clock.watch.switch(STEP)
    for step in (40, 60, 80):
        clock.now += 5.0
        rates = progress.rates(step)
        progress.update(step, loss=1.0)
    with clock.watch.part(EVALUATION):
        clock.now += 50.0
    assert rates["speed/steps_per_second"] == pytest.approx(4.0)
    assert "4 steps/s, 32 images/s, 00:05 to go" in progress.line()


def test_a_bar_on_a_terminal():
    stream, clock = Terminal(), Clock()
    progress = progress_on(stream, clock)
    # A resumed run does not begin at nothing.
    assert "20%" in stream.getvalue()
    run(progress, clock, range(21, 101), seconds=0.5, mark=lambda step: progress.update(step, loss=0.25))
    progress.close()
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("100%")
    assert "step 100/100, loss 0.2500, 2 steps/s, 16 images/s, 00:00 to go, data wait 0%" in last


def test_other_processes_show_nothing_but_keep_rates():
    for stream in (Terminal(), io.StringIO()):
        clock = Clock()
        progress = progress_on(stream, clock, every=0.0, enabled=False)
        run(progress, clock, [21, 22, 23], mark=progress.update)
        progress.close()
        assert stream.getvalue() == ""
        assert progress.rates(23)["speed/steps_per_second"] == pytest.approx(1.0)

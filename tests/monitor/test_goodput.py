"""Parts of a run's time: each second in exactly one, over kills, rewinds and pauses."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from scaling_dit.monitor import goodput
from scaling_dit.monitor.goodput import (
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    DOWNTIME,
    EVALUATION,
    LOST,
    OTHER,
    PARTS,
    START_UP,
    STEP,
    Recorder,
    Stopwatch,
    summarise,
)
from tests.support.fake_clock import Clock


def test_every_second_is_in_exactly_one_part():
    clock = Clock()
    watch = clock.watch
    clock.now += 3
    watch.switch(STEP)
    clock.now += 10
    with watch.part(EVALUATION):
        clock.now += 4
        with watch.part(DATA_WAIT):
            clock.now += 1
    with pytest.raises(ZeroDivisionError), watch.part(CHECKPOINT):
        clock.now += 2
        1 / 0  # noqa: B018
    clock.now += 5
    seconds = {part: value for part, value in watch.seconds().items() if value}
    assert seconds == {START_UP: 3, STEP: 15, EVALUATION: 4, DATA_WAIT: 1, CHECKPOINT: 2}


def test_time_before_the_stopwatch_is_start_up():
    watch = Stopwatch(began=990.0, clock=lambda: 5.0, now=lambda: 1000.0)
    assert watch.seconds()[START_UP] == 10.0 and watch.began == 990.0


def test_nested_compilations_count_once():
    clock = Clock()
    clock.watch.switch(STEP)
    clock.now += 2
    # From 1001 to 1002, within the next one.
    clock.watch.compiled(1.0)
    clock.now += 3
    # From 1000.5 to 1005.
    clock.watch.compiled(4.5)
    clock.now += 1
    clock.watch.compiled(0.5)
    seconds = clock.watch.seconds()
    assert seconds[COMPILE] == pytest.approx(5.0) and seconds[STEP] == pytest.approx(1.0)


def test_jax_reports_compilations_to_the_recorder(tmp_path):
    watch = Stopwatch()
    with Recorder(tmp_path, watch):
        watch.switch(STEP)
        jax.jit(lambda x: jnp.sin(x) * 17.25)(jnp.ones(3)).block_until_ready()
        first = watch.seconds()[COMPILE]
        jax.jit(lambda x: jnp.sin(x) * 17.25).lower(jnp.ones(3))
    assert 0 < first <= watch.seconds()[COMPILE] < sum(watch.seconds().values())
    jax.jit(lambda x: jnp.sin(x) * 18.25)(jnp.ones(3))
    assert watch.seconds()[COMPILE] == pytest.approx(goodput.summary(tmp_path)["seconds"][COMPILE], abs=1e-3)


def row(time, step, event="step", began=0.0, /, **seconds):
    return {
        "time": time, "began": began, "step": step, "event": event,
        "seconds": dict.fromkeys(PARTS[:-2], 0.0) | seconds,
    }  # fmt: skip


def test_a_run_killed_twice():
    first = [
        row(10, None, "start", start_up=10),
        row(10, 0, "resumed", start_up=10),
        row(31, 4, "saved", start_up=10, step=15, data_wait=4, checkpoint=2),
        row(46, 7, start_up=10, step=27, data_wait=7, checkpoint=2),
        # On the way to 8 when it was killed.
        row(48, 7, start_up=10, step=29, data_wait=7, checkpoint=2),
    ]
    # Killed before it had restored anything.
    second = [
        row(65, None, "start", 60, start_up=5),
    ]
    third = [
        row(110, None, "start", 100, start_up=10),
        row(110, 4, "resumed", 100, start_up=10),
        row(150, 12, "saved", 100, start_up=10, step=40),
        row(151, 12, "done", 100, start_up=10, step=40, other=1),
    ]
    totals = summarise([first, second, third])
    seconds = totals["seconds"]
    # Steps 5 to 7 with their data, and the one that was not finished.
    assert seconds[LOST] == 12 + 3 + 2
    assert seconds[STEP] == 15 + 40 and seconds[DATA_WAIT] == 4 and seconds[CHECKPOINT] == 2
    assert seconds[START_UP] == 25 and seconds[OTHER] == 1
    assert seconds[DOWNTIME] == (60 - 48) + (100 - 65)
    assert totals["wall"] == sum(seconds.values()) == 151
    assert totals["goodput"] == pytest.approx(55 / 151)
    assert (totals["starts"], totals["step"], totals["lost_steps"]) == (3, 12, 3)


def test_steps_gone_back_to_between_two_rows_split_the_time():
    rows = [
        row(0, 0, "resumed"),
        row(10, 10, step=10),
        row(12, 10, "spike", step=12),
        row(12, 4, "back", step=12),
    ]
    totals = summarise([[*rows, row(20, 12, "done", step=20)]])
    assert totals["lost_steps"] == 6
    assert totals["seconds"][LOST] == pytest.approx(6 + 2)
    assert totals["seconds"][STEP] == pytest.approx(4 + 8)


def test_a_finished_run_has_no_downtime_after_it():
    done = [row(0, 0, "resumed"), row(5, 5, "done", step=5)]
    again = [row(1001, 5, "resumed", 1000, start_up=1), row(1003, 7, "done", 1000, start_up=1, step=2)]
    totals = summarise([done, again])
    assert totals["seconds"][DOWNTIME] == 0 and totals["wall"] == 8 and totals["lost_steps"] == 0


def test_a_checkpoint_newer_than_the_last_row_loses_nothing():
    killed = [row(0, 0, "resumed"), row(4, 4, step=4), row(8, 4, step=8)]
    totals = summarise([killed, [row(20, 8, "resumed", 10, start_up=10)]])
    assert totals["seconds"][LOST] == 0 and totals["seconds"][STEP] == 8 and totals["step"] == 8


def test_nothing_recorded():
    totals = summarise([])
    assert totals["wall"] == 0 and totals["goodput"] == 0 and totals["starts"] == 0
    assert goodput.lines(totals) == ["no record of its time (runs of older versions kept none)"]


def test_rows_grow_slowly_with_the_length_of_a_start(tmp_path):
    clock = Clock()
    with Recorder(tmp_path, clock.watch) as recorder:
        for step in range(1, 20_001):
            clock.now += 1
            recorder.record("step", step)
    rows = (tmp_path / "segment-00001.jsonl").read_text().splitlines()
    assert 200 < len(rows) < 1500
    assert json.loads(rows[-1])["step"] == 20_000 and json.loads(rows[-1])["event"] == "done"


def test_a_blocked_loop_still_records_its_time(tmp_path):
    with Recorder(tmp_path, Stopwatch()) as recorder:
        recorder.record("resumed", 3)
        until = time.monotonic() + 60
        while (printed := goodput.summary(tmp_path))["wall"] <= 0.9 and time.monotonic() < until:
            # As a kill at this moment would leave it; a loaded machine writes late.
            time.sleep(0.1)
    assert printed["wall"] > 0.9 and printed["step"] == 3


def test_only_the_first_process_records(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Recorder(tmp_path, Stopwatch()) as recorder:
        recorder.record("saved", 1)
    assert list(tmp_path.iterdir()) == []


def test_lines_show_seconds_and_shares():
    printed = goodput.lines(summarise([[row(0, 0, "resumed"), row(100, 50, "done", step=75, evaluation=25)]]))
    assert ["step", "75.0", "75.0%"] in [line.split() for line in printed]
    assert ["wall", "time", "100.0", "100.0%"] in [line.split() for line in printed]
    assert printed[-1] == "goodput 75.0% over 1 start, step 50, 0 steps lost"


@pytest.mark.parametrize("back", [5.0, 3600.0, 1e9])
def test_a_clock_set_back_between_starts_gives_no_negative_time(back):
    first = [row(10, None, "start", 0.0, start_up=10), row(30, 4, "stopped", 0.0, start_up=10, step=20)]
    second = [row(30 - back, None, "start", 30 - back), row(40 - back, 8, "done", 30 - back, step=10)]
    found = summarise([first, second])
    assert found["seconds"][DOWNTIME] == 0 and min(found["seconds"].values()) >= 0
    assert found["wall"] == sum(found["seconds"].values()) == 40
    assert found["clock"] == [f"the clock was set back by {back:,.0f} s or more before start 2"]
    assert goodput.lines(found)[-1] == found["clock"][0]


@pytest.mark.parametrize("shift", [-7200.0, -30.0, 3600.0])
def test_a_clock_set_while_a_run_trains_is_taken_out_of_the_downtime(shift):
    first = [row(10, None, "start", 0.0, start_up=10), row(30, 4, "stopped", 0.0, start_up=10, step=20)]
    first[-1]["shift"] = shift
    # Twelve seconds later, by the clock as it is now.
    second = [row(42 + shift, None, "start", 42 + shift)]
    found = summarise([first, second])
    assert found["seconds"][DOWNTIME] == pytest.approx(12)
    way = "ahead" if shift > 0 else "back"
    assert found["clock"] == [f"the clock was set {way} by {abs(shift):,.0f} s during start 1"]


def test_a_stopwatch_notices_that_the_clock_was_set():
    clock = Clock()
    day = [0.0]
    watch = Stopwatch(clock=clock, now=lambda: clock.now + day[0])
    clock.now += 5
    assert watch.shift() == 0
    day[0] = -3600.0
    clock.now += 5
    assert watch.shift() == -3600 and sum(watch.seconds().values()) == 10


@pytest.mark.parametrize("reported", [-3600.0, 3600.0, 1e9])
def test_a_compilation_measured_by_a_clock_that_was_set(reported):
    clock = Clock()
    clock.watch.switch(STEP)
    clock.now += 4
    clock.watch.compiled(reported)
    seconds = clock.watch.seconds()
    assert min(seconds.values()) >= 0 and sum(seconds.values()) == 4


def test_accounting_that_the_disk_refuses_ends_nothing_and_is_written_later(tmp_path, monkeypatch):
    with Recorder(tmp_path, Stopwatch()) as recorder:
        flush = recorder._rows._flush
        monkeypatch.setattr(recorder._rows, "_flush", lambda: (_ for _ in ()).throw(OSError(28, "full")))
        recorder.record("saved", 3)
        monkeypatch.setattr(recorder._rows, "_flush", flush)
    steps = [line["step"] for line in map(json.loads, recorder._rows.segment.read_text().splitlines())]
    assert 3 in steps


def test_a_row_in_the_middle_of_a_compilation_is_put_right_by_the_next_look(tmp_path):
    clock = [0.0]
    watch = Stopwatch(began=0.0, clock=lambda: clock[0], now=lambda: 0.0)
    with Recorder(tmp_path, watch) as recorder:
        recorder.record("resumed", 0)
        watch.switch(STEP)
        clock[0] = 8.0
        # As the thread does that writes one now and then.
        recorder._write("step")
        clock[0] = 10.0
        watch.compiled(9.0)
        recorder._step = 1
        found = recorder.so_far()
        assert (found["seconds"]["compile"], found["seconds"]["step"]) == (9.0, 1.0)
        assert found["goodput"] == 0.1 and found["step"] == 1

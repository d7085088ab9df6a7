"""The screen of a run, from heartbeats and metrics alone."""

import pytest
from scaling_dit.tpu import screen

from scaling_dit.errors import UserError

NOW = 10_000.0


def beat(process, processes=2, state="training", age=4.0, quiet=2.0, step=250, **more):
    return {"process": process, "processes": processes, "host": f"w-{process}", "pid": 7, "state": state, "step": step,
            "steps": 1000, "began": 0.0, "time": NOW - age, "progress_time": NOW - quiet} | more  # fmt: skip


ROWS = [
    {"step": 100, "train/loss": 0.5, "speed/steps_per_second": 9.0, "speed/mfu": 0.9},
    {"step": 200, "validation/loss": 0.375},
    {
        "step": 250, "train/loss": 0.25, "speed/steps_per_second": 0.5, "speed/images_per_second": 128.0,
        "speed/tokens_per_s": 32768.0, "speed/model_tflops_per_chip": 198.25, "speed/mfu": 0.432,
        "speed/data_wait": 0.02, "speed/goodput": 0.915, "speed/step_seconds_p50": 2.0, "speed/step_seconds_p95": 2.5,
        "speed/step_seconds_max": 4.125, "speed/slowest_process": 1, "speed/slowest_host_wait": 0.25,
    },
]  # fmt: skip


def test_a_run_at_work():
    beats = [beat(0, memory={"0": [2**30, 3 * 2**30]}), beat(1, memory={"4": [2**31, 2**31]}, host_wait=0.25)]
    assert screen.render("gs://bucket/run", beats, ROWS, NOW) == [
        "gs://bucket/run: training, step 250 of 1,000 (25%), 25 min to go",
        "2 of 2 hosts answer; last step finished 2 s ago",
        "loss    0.25 (step 250), validation 0.375 (step 200)",
        "speed   0.5 steps/s, 128 images/s, 32,768 tokens/s, MFU 43.2%, 198.2 model TFLOP/s per chip, "
        "2% waiting for data, goodput 91.5%",
        "steps   p50 2 s, p95 2.5 s, longest 4.12 s, slowest host: w-1, process 1, devices wait 0.25 s a step for it",
        "memory  2.00 GiB in use, peak 3.00 GiB, the most of 2 devices",
        "process  host  state     step  heartbeat  host wait",
        "1        w-1   training  250   4 s ago    0.25 s",
        "0        w-0   training  250   4 s ago",
    ]


def test_hosts_in_trouble_are_named_and_come_first():
    beats = [beat(process, 12) for process in range(10)] + [beat(10, 12, age=400)]
    lines = screen.render("run", beats, [], NOW)
    assert (
        lines[1]
        == "10 of 12 hosts answer; no heartbeat from w-10 (7 min), 1 others; last step finished 2 s ago"
    )
    assert lines[3].split()[:2] == ["10", "w-10"] and lines[-1] == "and 3 more"
    assert max(map(len, lines)) < 130


def test_a_run_that_hangs_and_one_that_ended():
    stuck = screen.render("run", [beat(0, 1, quiet=4000)], [], NOW)
    assert "67 min ago" in stuck[1] and "or it hangs" in stuck[2]
    done = screen.render("run", [beat(0, 1, state="done", step=1000, age=7200)], ROWS, NOW)
    assert done[:2] == ["run: done, step 1,000 of 1,000 (100%)", "ended 2 h 0 min ago"]


def test_what_is_not_known_is_not_shown():
    assert screen.render("run", [beat(0, 1, state="starting", step=None)], [], NOW) == [
        "run: starting, step 0 of 1,000 (0%)",
        "1 of 1 hosts answer; last step finished 2 s ago",
    ]
    lines = screen.render("run", [], [{"step": 3, "speed/steps_per_second": 2.0}], NOW)
    assert lines == ["run: no heartbeat; last metrics at step 3", "speed   2 steps/s"]


def test_the_screen_of_a_real_run(smoke_run, tmp_path):
    text = screen.read(str(smoke_run))
    assert "done, step 4 of 4 (100%)" in text and "steps/s" in text and "p95" in text
    with pytest.raises(UserError, match="neither heartbeats nor metrics"):
        screen.read(str(tmp_path))

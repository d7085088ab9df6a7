"""Heartbeats: what they say, when, and that nothing about them ends a run."""

import json
import os
import time

import pytest
from etils import epath

from scaling_dit.monitor import heartbeat
from scaling_dit.monitor.heartbeat import Heartbeat
from tests.support import fake_store
from tests.support.fake_clock import Clock


def beating(folder, process=0, processes=1, clock=None, **options):
    facts = {"processes": processes, "steps": 100}
    return Heartbeat(epath.Path(folder), process, facts, now=clock or Clock(), **options)


def test_a_heartbeat_says_who_and_what(tmp_path):
    clock = Clock(1000.0)
    with beating(tmp_path / "run" / "heartbeats", clock=clock, every=1000) as heart:
        (row,) = heartbeat.read(epath.Path(tmp_path / "run" / "heartbeats"))
        assert (row["state"], row["step"], row["pid"], row["steps"]) == ("starting", None, os.getpid(), 100)
        heart.update(state=heartbeat.TRAINING)
        clock.now = 1020.0
        heart.reach(7)
        clock.now = 1030.0
        with heart.during(heartbeat.EVALUATING):
            heart.write()
            (row,) = heartbeat.read(epath.Path(tmp_path / "run" / "heartbeats"))
            assert (row["state"], row["step"], row["time"], row["progress_time"]) == (
                "evaluating",
                7,
                1030,
                1020,
            )
        heart.write()
        assert heartbeat.read(epath.Path(tmp_path / "run" / "heartbeats"))[0]["state"] == "training"
    (row,) = heartbeat.read(epath.Path(tmp_path / "run" / "heartbeats"))
    assert row["state"] == "done" and not list((tmp_path / "run").rglob("*.partial"))


class Stopped(Exception):
    code = 75


@pytest.mark.parametrize(
    "error, state", [(Stopped, "preempted"), (ValueError, "failed"), (KeyboardInterrupt, "failed")]
)
def test_the_last_one_says_how_it_ended(tmp_path, error, state):
    with pytest.raises(error), beating(tmp_path):
        raise error
    assert heartbeat.read(epath.Path(tmp_path))[0]["state"] == state


def test_a_thread_writes_while_the_loop_is_blocked(tmp_path):
    with beating(tmp_path, clock=time.time, every=0.02):
        first = heartbeat.read(epath.Path(tmp_path))[0]["time"]
        deadline = time.monotonic() + 30
        while heartbeat.read(epath.Path(tmp_path))[0]["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_those_of_an_earlier_start_with_more_processes_are_left_out(tmp_path):
    for processes in (4, 2):
        for process in range(processes):
            beating(tmp_path, process, processes).write()
    assert [row["process"] for row in heartbeat.read(epath.Path(tmp_path))] == [0, 1]
    # A file that is damaged is one that is missing.
    heartbeat.path_of(epath.Path(tmp_path), 1).write_text('{"process": 1')
    assert [row["process"] for row in heartbeat.read(epath.Path(tmp_path))] == [0]
    assert heartbeat.read(epath.Path(tmp_path) / "nothing") == []


def test_a_store_that_fails_is_told_once(tmp_path, capsys):
    heart = beating(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("")
    heart.write()
    heart.write()
    assert capsys.readouterr().err.count("no heartbeat") == 1


def test_a_bucket_gets_whole_objects(tmp_path, monkeypatch):
    store = fake_store.install(monkeypatch, tmp_path)
    folder = "s3://bucket/run/heartbeats"
    with beating(folder) as heart:
        assert heart._every == heartbeat.REMOTE_EVERY
    assert heartbeat.read(epath.Path(folder))[0]["state"] == "done" and not store.refused
    json.loads((tmp_path / "bucket/run/heartbeats/process-00000.json").read_text())

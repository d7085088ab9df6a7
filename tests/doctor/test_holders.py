"""Processes that hold a device, found and ended; the device is a file here."""

import pathlib
import subprocess
import sys
import time

import pytest

from scaling_dit.cli.doctor import Doctor
from scaling_dit.doctor import holders, report
from scaling_dit.parallel import processes

HOLD = "import signal, sys, time; f = open(sys.argv[1]); {}; print('ready', flush=True); time.sleep(300)"


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "accel0"
    path.touch()
    return path


@pytest.fixture
def hold(device):
    """Starts a process that has the device open."""
    started = []

    def start(body="pass"):
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(body), str(device)], stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


def test_a_holder_is_found_and_named(device, hold):
    assert holders.find([str(device)]) == []
    # This process itself does not count.
    with open(device):
        child = hold()
        (found,) = holders.find([str(device)])
    assert found.pid == child.pid and found.devices == (str(device),)
    assert "HOLD" not in str(found) and f"process {child.pid} ({sys.executable} -c import signal" in str(
        found
    )


def test_a_link_to_a_device_is_the_device(device, hold, tmp_path):
    hold()
    (tmp_path / "link").symlink_to(device)
    assert len(holders.find([str(tmp_path / "link")])) == 1


def test_holders_are_ended(device, hold, monkeypatch):
    monkeypatch.setattr(holders, "TERM_SECONDS", 0.3)
    polite, stubborn = hold(), hold("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    assert holders.end(holders.find([str(device)])) == []
    assert (polite.wait(10), stubborn.wait(10)) == (-15, -9)


def test_another_process_of_the_same_number_is_not_ended(device, hold):
    child = hold()
    (found,) = holders.find([str(device)])
    earlier = holders.dataclasses.replace(found, began=found.began - 1)
    assert holders.end([earlier]) == [] and child.poll() is None


def test_the_check_in_words(device, hold):
    assert report.held_devices(end=False, devices=[str(device)]).passed
    child = hold()
    check = report.held_devices(end=False, devices=[str(device)])
    assert check.passed is False and f"process {child.pid}" in check.words and "--end_stale" in check.words
    check = report.held_devices(end=True, devices=[str(device)])
    assert check.passed and check.words.startswith("ended: process") and child.wait(10) == -15


def test_the_verb_stops_before_jax_asks_for_the_devices(device, hold, monkeypatch, capsys):
    child = hold()
    monkeypatch.setattr(processes, "_TPU_DEVICES", (str(device),))
    assert Doctor.parse(["--json"]).run() == 1
    assert '"healthy": false' in capsys.readouterr().out
    assert Doctor.parse([]).run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith(f"FAULT  held devices  process {child.pid}")
        and lines[1] == "not healthy: held devices"
    )
    assert child.poll() is None


def test_processes_that_end_meanwhile_are_no_fault(tmp_path):
    (tmp_path / "12345").mkdir()
    (tmp_path / "self").mkdir()
    assert holders.find([str(tmp_path)], proc=tmp_path) == []
    assert holders.hidden(tmp_path) == 1
    assert pathlib.Path("/proc/self").exists() and time.time() > 0

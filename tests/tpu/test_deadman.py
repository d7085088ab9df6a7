"""The dead-man switch as real processes: a fake gcloud, clock and metadata server around the real script."""

import http.server
import json
import os
import pathlib
import shutil
import subprocess
import threading

import pytest
from scaling_dit.tpu import deadman

from scaling_dit.errors import UserError
from scaling_dit.monitor.heartbeat import Heartbeat

START = 1_700_000_000
JOB = {"backend": "queued", "resource": "run-1", "zone": "us-east5-a", "project": "my-project",
       "minutes": 15, "setup_minutes": 30, "hours": 10}  # fmt: skip


class Machine:
    """A worker: `at(minute)` looks once at that time, and gives what gcloud was called with."""

    def __init__(self, folder, heartbeats, **changes):
        self.folder, self.heartbeats = folder, heartbeats
        self.script = folder / "deadman.sh"
        self.script.write_text(deadman.script(JOB | {"heartbeats": str(heartbeats)} | changes))
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.calls, self.bucket = folder / "calls", folder / "bucket"
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "SCALING_DIT_DEADMAN_STATE": str(folder / "state"),
            "SCALING_DIT_DEADMAN_PLACE": str(folder / "root" / "deadman.sh"),
            "SCALING_DIT_DEADMAN_UNITS": str(folder / "root" / "units"),
            "GCE_METADATA_HOST": "localhost:9",
        }
        self.gcloud("exit 0")
        self.program("date", 'echo "$NOW"')

    def program(self, name, body):
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def gcloud(self, body):
        """What deletion does; reading a bucket gives the file `bucket`."""
        self.program(
            "gcloud",
            f'if [ "$1 $2" = "storage cat" ]; then echo "$3" > {self.folder}/asked; cat {self.bucket} || '
            "{ echo 'One or more URLs matched no objects.' >&2; exit 1; }; "
            f"exit; fi\nprintf '%s\\0' \"$@\" >> {self.calls}\n{body}",
        )

    def at(self, minute, code=0):
        self.calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(self.script), "check"],
            env=self.environment | {"NOW": str(START + int(60 * minute))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert not done.stderr, done.stderr
        self.said = done.stdout
        return self.calls.read_text().split("\0")[:-1] if self.calls.exists() else []

    def beat(self, minute, process=0):
        self.heartbeats.mkdir(exist_ok=True)
        heart = Heartbeat(self.heartbeats, process, {"processes": 2}, now=lambda: START + 60.0 * minute)
        heart.write()


DELETE = "compute tpus queued-resources delete run-1 --zone=us-east5-a --project=my-project --quiet --force --async"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path / "the run's heartbeats; $(touch bad)")


def test_nothing_happens_while_there_are_heartbeats(machine):
    assert machine.at(0) == machine.at(29) == []
    for minute in range(29, 200, 10):
        machine.beat(minute, process=minute % 2)
        assert machine.at(minute + 9) == []
    assert not (machine.folder / "bad").exists() and not pathlib.Path("bad").exists()


def test_a_run_without_heartbeats_is_deleted(machine):
    assert machine.at(0) == []
    machine.beat(20)
    machine.beat(40, process=1)
    # The newest of all processes counts.
    assert machine.at(54) == []
    assert machine.at(55) == DELETE.split()
    assert "no heartbeat for 15 minutes: deleting run-1" in machine.said


def test_a_run_that_never_begins_is_deleted(machine):
    assert machine.at(0) == machine.at(29) == []
    assert machine.at(30) == DELETE.split()
    assert "no heartbeat within 30 minutes" in machine.said


def test_heartbeats_of_before_a_preemption_leave_time_to_set_up(machine):
    machine.beat(-100)
    assert machine.at(0) == machine.at(29) == []
    assert machine.at(30) == DELETE.split()


def test_the_budget_ends_a_healthy_run(machine):
    machine.at(0)
    machine.beat(599)
    assert machine.at(599) == []
    machine.beat(600)
    assert machine.at(600) == DELETE.split()
    assert "the budget of 10 hours and 0 minutes is over" in machine.said


def test_without_heartbeats_only_the_hours_count(tmp_path):
    machine = Machine(tmp_path, "")
    assert machine.at(0) == machine.at(300) == machine.at(599) == []
    assert machine.at(600) == DELETE.split()
    assert "allowed 36000 seconds" in machine.script.read_text()


def test_deletion_that_fails_is_tried_again(machine):
    machine.at(0)
    machine.gcloud("exit 1")
    assert machine.at(30, code=1) == machine.at(31, code=1) == DELETE.split()
    machine.gcloud("exit 0")
    assert machine.at(32) == DELETE.split()


def test_heartbeats_in_a_bucket(tmp_path):
    machine = Machine(
        tmp_path, "gs://bucket/a run/heartbeats/", backend="compute", resource="group", project=""
    )
    assert machine.at(0) == machine.at(29) == []
    assert (tmp_path / "asked").read_text() == "gs://bucket/a run/heartbeats/*.json\n"
    machine.bucket.write_text(
        "".join(json.dumps({"time": START + t, "progress_time": 9e9}) for t in (0.5, 1800.25))
    )
    assert machine.at(44) == []
    group = ["compute", "instance-groups", "managed", "delete", "group", "--zone=us-east5-a", "--quiet"]
    assert machine.at(45) == group


def test_heartbeats_that_cannot_be_read_get_twice_the_time(tmp_path):
    machine = Machine(tmp_path, "gs://bucket/run/heartbeats")
    machine.bucket.write_text(json.dumps({"time": START}))
    assert machine.at(0) == []
    machine.bucket.write_text(json.dumps({"time": START + 60 * 40}))
    assert machine.at(41) == []
    # Stands before every `gcloud storage cat`.
    machine.program("timeout", "echo 'ERROR: 403 permission' >&2; exit 1")
    assert machine.at(50) == [] and "heartbeats cannot be read: ERROR: 403 permission" in machine.said
    # What was read before is not taken for silence.
    assert machine.at(56) == machine.at(70) == []
    assert machine.at(71) == DELETE.split()
    assert "could not be read for 30 minutes" in machine.said


@pytest.fixture
def metadata():
    """A metadata server; `values` are its attributes."""
    values = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.rpartition("/")[2])
            right = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith(
                "/computeMetadata/v1/instance/"
            )
            self.send_response(200 if value and right else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}", values
    server.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the script asks the metadata server with curl")
def test_the_owner_can_put_it_off_but_not_beyond_the_budget(machine, metadata):
    machine.environment["GCE_METADATA_HOST"], values = metadata
    machine.at(0)
    values["scaling-dit-hold-until"] = str(START + 60 * 700)
    assert machine.at(60) == [] and "deletion is held for 38400 s" in machine.said
    values["scaling-dit-hold-until"] = "rubbish $(touch bad)"
    assert machine.at(61) == DELETE.split()
    values["scaling-dit-hold-until"] = str(START + 60 * 700)
    assert machine.at(600) == DELETE.split()


def test_installing_starts_a_timer(machine):
    machine.program("systemctl", f'echo "$@" >> {machine.folder}/systemctl')
    # As the start-up script of a machine, which has no arguments.
    subprocess.run(["bash", str(machine.script)], env=machine.environment, check=True)
    place = machine.folder / "root" / "deadman.sh"
    assert place.read_text() == machine.script.read_text() and os.access(place, os.X_OK)
    assert (
        machine.folder / "systemctl"
    ).read_text() == "daemon-reload\nenable --now scaling-dit-deadman.timer\n"
    units = machine.folder / "root" / "units"
    assert f"ExecStart=/bin/bash {place} check" in (units / "scaling-dit-deadman.service").read_text()
    if shutil.which("systemd-analyze"):
        paths = [str(units / f"scaling-dit-deadman.{kind}") for kind in ("service", "timer")]
        done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True)
        assert "scaling-dit-deadman" not in done.stderr, done.stderr
    assert subprocess.run(["bash", str(machine.script), "rubbish"], capture_output=True).returncode == 2


ODD = ["a b", "a;b", "$(touch bad)", "`touch bad`", "a'b", 'a"b', "a&b|c", "*", "~", "a\\b", "-n", "é"]


@pytest.mark.parametrize("value", ODD)
def test_values_never_reach_the_shell_unquoted(tmp_path, value):
    job = JOB | {"heartbeats": f"{tmp_path}/{value}", "project": value}
    text = deadman.script(job)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    show = text.partition("\nlog()")[0] + '\nprintf "%s\\0" "$heartbeats" "${delete[@]}"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("\0")[:-1] == [job["heartbeats"], *deadman.delete_command(job)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"zone": ""}, "needs 'zone'"),
        ({"resource": "a;b"}, "no names of the cloud"),
        ({"resource": "--all"}, "no names of the cloud"),
        ({"zone": "us-east5"}, "no names of the cloud"),
        ({"backend": "gke"}, "knows the back-ends queued, compute"),
        ({"hours": float("inf")}, "hours must be a number"),
        ({"minutes": "5"}, "minutes must be a number"),
        ({"minutes": 0}, "needs 'minutes'"),
        ({"heartbeats": "/a\nb"}, "must be printable"),
        ({"heartbeats": "runs/a"}, "an absolute path, not at 'runs/a'"),
    ],
)
def test_a_job_that_cannot_be(change, expected):
    with pytest.raises(UserError, match=expected):
        deadman.script(JOB | {"heartbeats": "/runs/a/heartbeats"} | change)

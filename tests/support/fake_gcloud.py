"""A program `gcloud` for the PATH of a test: the simulated cloud in a folder, with workers that are real processes.

    fake = install(folder)      writes bin/gcloud, bin/scaling-dit and the cloud's state
    fake.plan(path, "preempt")  the running resource is preempted once when `path` exists

Each worker has a home folder of its own. What stands in for a TPU's metadata: variables FAKE_COORDINATOR,
FAKE_PROCESSES and FAKE_PROCESS, which bin/scaling-dit turns into flags of `train`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]


class ProcessWorkers:
    """Workers whose commands are processes of this machine."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def home(self, machine) -> pathlib.Path:
        home = self.folder / "workers" / f"{machine.name}-{machine.id}"
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _environment(self, made, machine, text) -> dict[str, str]:
        index = made.machines.index(machine)
        settings = json.loads((self.folder / "environment.json").read_text())
        return {
            **settings,
            "HOME": str(self.home(machine)),
            "SCALING_DIT_WORKER": f"{machine.name}",
            "FAKE_COORDINATOR": f"localhost:{self._port(made, text)}",
            "FAKE_PROCESSES": str(len(made.machines)),
            "FAKE_PROCESS": str(index),
        }

    def _port(self, made, text) -> int:
        """A free port, the same for all workers of one start on the same machines."""
        ids = "-".join(str(machine.id) for machine in made.machines)
        key = self.folder / "ports" / f"{ids}-{text.partition(chr(10))[0].strip('# ').replace(' ', '_')}"
        if not key.exists():
            with socket.socket() as free:
                free.bind(("localhost", 0))
                key.parent.mkdir(exist_ok=True)
                key.write_text(str(free.getsockname()[1]))
        return int(key.read_text())

    def run_all(self, cloud, made, machines, text):
        started = [
            subprocess.Popen(
                ["sh", "-c", text],
                cwd=self.home(machine),
                env=self._environment(made, machine, text),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for machine in machines
        ]
        outputs = [process.communicate()[0] for process in started]
        return [(process.returncode, out) for process, out in zip(started, outputs, strict=True)]

    def copy(self, cloud, made, machine, local, remote):
        target = self.home(machine) / remote
        if not target.parent.is_dir():
            return 1
        shutil.copyfile(local, target)
        return 0

    def gone(self, machine):
        home = self.home(machine)
        for path in home.glob(".scaling-dit/*/pid"):
            words = path.read_text().split()
            if words:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(words[0]), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


class Fake:
    """An installed fake: its folder, and what a test sets and reads."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin = folder / "bin"

    def locked(self):
        lock = (self.folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def cloud(self):
        return pickle.loads((self.folder / "cloud.pickle").read_bytes())

    def write(self, cloud) -> None:
        partial = self.folder / "cloud.partial"
        partial.write_bytes(pickle.dumps(cloud))
        partial.rename(self.folder / "cloud.pickle")

    def plan(self, path: pathlib.Path, event: str) -> None:
        with (self.folder / "plans").open("a") as file:
            file.write(f"{event} {path}\n")

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def happen(self, cloud) -> None:
        """Does the planned events whose files exist."""
        file = self.folder / "plans"
        plans = file.read_text().splitlines() if file.exists() else []
        for line in plans:
            event, _, path = line.partition(" ")
            running = [one for one in cloud.made.values() if one.state == "ACTIVE"]
            if running and os.path.exists(path):
                getattr(cloud, event)(running[0])
                plans = [other for other in plans if other != line]
                file.write_text("".join(f"{other}\n" for other in plans))
                return


def install(folder: pathlib.Path, environment: dict[str, str]) -> Fake:
    """Writes the fake; `environment` is that of the workers."""
    from tests.support.tpu_cloud import Cloud

    fake = Fake(folder)
    fake.bin.mkdir(parents=True)
    cloud = Cloud(now=time.time(), workers=ProcessWorkers(folder))
    cloud.accept = cloud.suspending = 0.05
    cloud.provision = cloud.boot = cloud.remove = (0.0, 0.05)
    fake.write(cloud)
    (folder / "environment.json").write_text(json.dumps(environment))
    _script(fake.bin / "gcloud", f'exec {sys.executable} -S -E {__file__} {folder} "$@"')
    joined = '--coordinator="$FAKE_COORDINATOR" --processes="$FAKE_PROCESSES" --process="$FAKE_PROCESS"'
    alone = 'if [ "$FAKE_PROCESSES" = 1 ]; then exec "$python" -m scaling_dit "$@"; fi\n'
    _script(
        fake.bin / "scaling-dit",
        f'python={sys.executable}\n{alone}exec "$python" -m scaling_dit "$@" {joined}',
    )
    return fake


def _script(path: pathlib.Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def main(folder: str, command: list[str]) -> int:
    fake = Fake(pathlib.Path(folder))
    with fake.locked():
        with (fake.folder / "calls").open("a") as file:
            file.write(json.dumps(command) + "\n")
        cloud = fake.cloud()
        cloud.calls = []
        cloud.advance(max(0.0, time.time() - cloud.now))
        fake.happen(cloud)
        code, out, err = cloud.run(["gcloud", *command])
        fake.write(cloud)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


if __name__ == "__main__":
    # `tests` has no __init__.py, and site-packages may have a package of that name.
    package = types.ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package
    # The pickle names this module as the tests import it.
    from tests.support import fake_gcloud

    sys.exit(fake_gcloud.main(sys.argv[1], sys.argv[2:]))

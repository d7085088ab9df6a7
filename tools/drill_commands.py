"""The commands of the drill: how they are started, disturbed and ended, and how what they leave is compared.

Most are forks of a process that has imported the package and done nothing else, because half of a short command's time
goes into imports. `fresh` ones are started as a user starts them.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess

STEPS = 24
# Bytes of a full disk: it holds one checkpoint of the drill's run and not two.
SMALL_DISK = 2_600_000
# Seconds after which a command counts as hung.
LIMIT = 400
# What `train` imports, and what the other commands import beside it.
OF_TRAIN = ("scaling_dit.cli.main", "scaling_dit.training.loop")
OF_ALL = (*OF_TRAIN, "scaling_dit.evaluation.run", "scaling_dit.curation.prepare")
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=1"
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code (128 + N after signal N) and what it printed on stderr."""

    code: int
    errors: str

    def fault(self, *codes: int) -> str:
        """What is wrong with it if it should have one of these exit codes; "" if nothing is."""
        last = (self.errors.strip().splitlines() or [""])[-1][:200]
        if "Traceback (most recent call last)" in self.errors:
            return f"a traceback: {last}"
        return "" if self.code in codes else f"exit code {self.code}: {last}"


class Command:
    """A command that runs; its stderr goes to a file, so that no pipe blocks it."""

    def __init__(self, process: subprocess.Popen | BaseProcess, errors: pathlib.Path) -> None:
        self._process, self._errors = process, errors

    def poll(self) -> int | None:
        """Its exit code, negative after a signal; None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def handles_signals(self) -> bool:
        """Whether it has a handler for SIGTERM, as far as the kernel says; where it does not, True."""
        try:
            status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return True
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None and self._process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send(signal.SIGKILL)

    def kill_later(self, seconds: float, number: int = signal.SIGKILL) -> None:
        """Sends a signal after so many seconds, unless it ends before."""
        if self._wait(seconds) is None:
            self.send(number)

    def _wait(self, seconds: float) -> int | None:
        if not isinstance(self._process, subprocess.Popen):
            self._process.join(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return self.poll()

    def end(self) -> Ended:
        """Waits until it ends; one that hangs is killed."""
        code = self._wait(LIMIT)
        if code is None:
            self.kill()
            code = self._wait(LIMIT) or 0
        errors = self._errors.read_text(errors="replace")
        self._errors.unlink()
        return Ended(code if code >= 0 else 128 - code, errors)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Returns once this holds, or the command has ended: a moment of its work, however busy the machine is."""
        while self.poll() is None and not reached():
            time.sleep(0.002)


def _run(arguments: list[str], errors: str, largest: int | None) -> None:
    """A command, in a fork of the process that has imported the package."""
    limit_files(largest)
    for stream, path in ((1, os.devnull), (2, errors)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, stream)
        os.close(handle)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["scaling-dit", *arguments]
    from scaling_dit.__main__ import run

    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)


def limit_files(largest: int | None) -> None:
    """Makes every file of this process that would be longer one that cannot be written."""
    if largest is not None:
        # Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


@contextlib.contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Drill:
    """The commands of a drill, and how an undisturbed one ends.

    Args:
      root: an empty folder.
      seed: of the random moments.
      imported: modules that most commands do not import again.
    """

    def __init__(self, root: pathlib.Path, seed: int, imported: tuple[str, ...] = OF_ALL) -> None:
        self.root, self.random, self.seconds = root, random.Random(seed), 0.0
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": _FLAGS,
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(root / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._started = 0
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(list(imported))
        with changed_environment(self.environment):
            multiprocessing.forkserver.ensure_running()

    def train(self, workdir: pathlib.Path, **changes: object) -> list[str]:
        """The command that trains."""
        fields = {
            "steps": STEPS, "eval.every": 0, "checkpoint.every": 6, "log.every": 1, "log.tensorboard": False,
            "checkpoint.retry": 0.0,
        }  # fmt: skip
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["train", "--config=shapes:smoke", f"--workdir={workdir}", *flags]

    def start(self, arguments: list[str], *, fresh: bool = False, largest: int | None = None) -> Command:
        """Starts a command.

        Args:
          fresh: as a user does it, and not as a fork of a process that has imported the package.
          largest: bytes of the largest file that it can write.
        """
        self._started += 1
        errors = self.root / f"errors{self._started}"
        errors.touch()
        if not fresh:
            process = self._forks.Process(target=_run, args=(arguments, str(errors), largest))
            process.start()
            return Command(process, errors)
        with errors.open("a") as stream:
            return Command(
                subprocess.Popen(
                    [sys.executable, "-m", "scaling_dit", *arguments],
                    env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=stream,
                    preexec_fn=functools.partial(limit_files, largest),
                ),
                errors,
            )  # fmt: skip

    def run(self, arguments: list[str]) -> Ended:
        """A command, undisturbed."""
        return self.start(arguments).end()

    @functools.cached_property
    def trained(self) -> pathlib.Path:
        """The workdir of a run that nothing disturbed; `seconds` is what it took."""
        workdir, began = self.root / "trained", time.monotonic()
        ended = self.run(self.train(workdir))
        if fault := ended.fault(0):
            raise SystemExit(f"the undisturbed run failed: {fault}\n{ended.errors}")
        self.seconds = time.monotonic() - began
        return workdir

    def same_run(self, workdir: pathlib.Path) -> str:
        """How a finished run differs from the undisturbed one."""
        for what, of in (("the last checkpoint", checkpoint_of), ("the losses", losses_of)):
            if of(workdir) != of(self.trained):
                return f"{what} differs"
        return ""

    def resumed(self, workdir: pathlib.Path, **changes: object) -> str:
        """Gives `train` again until the end; returns what is wrong with it or with what it leaves, "" if nothing is."""
        return self.run(self.train(workdir, **changes)).fault(0) or self.same_run(workdir)


def logged(workdir: pathlib.Path) -> int:
    """The rows of metrics of a run."""
    return sum(path.read_bytes().count(b'"scalars"') for path in (workdir / "metrics").glob("*.jsonl"))


def checkpoint_of(workdir: pathlib.Path) -> object:
    """The checksums of all arrays of the newest checkpoint."""
    newest = max(
        (p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
    return newest.name, json.loads((newest / "extra" / "metadata").read_text())["arrays"]


def losses_of(workdir: pathlib.Path) -> object:
    """The loss of every step, as the metrics show them."""
    from scaling_dit.checkpoints.workdir import read_metrics

    return [(row["step"], row["train/loss"]) for row in read_metrics(workdir) if "train/loss" in row]


def files_of(folder: pathlib.Path) -> dict[str, str]:
    """The contents of all files below a folder, in which its own path counts as the same everywhere.

    Each `evaluate` adds its rows to `results.jsonl`, of which readers take equal ones once; so does this.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
            if path.name == "results.jsonl":
                data = b"\n".join(sorted(set(data.split(b"\n"))))
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def written(folder: pathlib.Path) -> int:
    """How many files a folder holds, unfinished ones too."""
    return sum(len(names) for _, _, names in os.walk(folder))

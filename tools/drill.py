"""The drill: kills, signals, damage and full disks over real commands, and the table of what they cost.

    python -m tools.drill                  # writes the table in docs/errors_and_exit_codes.md; takes its time
    python -m tools.drill --small --page=out.md

Every try disturbs one command, then gives the same command again, undisturbed. A try is lost if that does not end with
exit code 0 and the same bits as a run that nothing disturbed, if an exit code is another than documented, or if a line
of a traceback was printed. Full disks are small ramdisks where this process may mount them (as root, on Linux);
elsewhere the size of files is limited.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "errors_and_exit_codes.md"
BEGIN, END = "<!-- drill: written by tools/drill.py -->", "<!-- /drill -->"
STEPS = 24
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}
# Bytes of a full disk: it holds one checkpoint of the drill's run and not two.
SMALL_DISK = 2_600_000
# Seconds after which a command counts as hung.
LIMIT = 400


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often each thing is tried: kills of each verb, signals, pairs of writers, disks, bits, cuts."""

    kills: int = 6
    signals: int = 4
    writers: int = 3
    disks: int = 3
    bits: int = 16
    cuts: int = 8


SMALL = Counts(kills=1, signals=1, writers=1, disks=1, bits=2, cuts=2)


@dataclasses.dataclass
class Row:
    """One line of the table."""

    what: str
    where: str
    tries: int = 0
    lost: int = 0
    codes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    why: list[str] = dataclasses.field(default_factory=list)

    def count(self, code: int, fault: str = "") -> None:
        """Adds a try with the exit code of the disturbed command, and what was wrong with it."""
        self.tries += 1
        self.codes[code] += 1
        if fault:
            self.lost += 1
            self.why.append(fault)
            print(f"LOST: {self.what} of {self.where}: {fault}", file=sys.stderr)

    def line(self) -> str:
        """As a row of Markdown."""
        codes = ", ".join(f"{code} ({count})" for code, count in sorted(self.codes.items()))
        return f"| {self.what} | {self.where} | {self.tries} | {self.lost} | {codes} |"


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


class Drill:
    """The commands of the drill, each with a folder of its own, and how an undisturbed one ends.

    Args:
      root: an empty folder.
      counts: how often each thing is tried.
      seed: of the random moments.
    """

    def __init__(self, root: pathlib.Path, counts: Counts, seed: int) -> None:
        self.root, self.counts, self.random = root, counts, random.Random(seed)
        flags = (
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
            "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=1"
        )
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(root / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.images = self._images()

    def _images(self) -> pathlib.Path:
        import numpy as np
        from PIL import Image

        folder = self.root / "images"
        folder.mkdir()
        lines = []
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a red circle, {number}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    def train(self, workdir: pathlib.Path, **changes: object) -> list[str]:
        """The command that trains."""
        fields = {
            "steps": STEPS, "eval.every": 0, "checkpoint.every": 6, "log.every": 1, "log.tensorboard": False,
            "checkpoint.retry": 0.0,
        }  # fmt: skip
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["train", "--config=shapes:smoke", f"--workdir={workdir}", *flags]

    def start(self, arguments: list[str], **options: object) -> subprocess.Popen:
        """A command that runs; stderr goes to a file, so that no pipe blocks it."""
        errors = tempfile.TemporaryFile("w+", dir=self.root)  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "scaling_dit", *arguments],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=errors, **options,
        )  # fmt: skip
        process.errors = errors
        return process

    def end(self, process: subprocess.Popen) -> Ended:
        """Waits for a command."""
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.errors.seek(0)
        errors = process.errors.read()
        process.errors.close()
        return Ended(code if code >= 0 else 128 - code, errors)

    def run(self, arguments: list[str]) -> Ended:
        """A command, undisturbed."""
        return self.end(self.start(arguments))

    @functools.cached_property
    def trained(self) -> pathlib.Path:
        """The workdir of a run that nothing disturbed."""
        workdir = self.root / "trained"
        began = time.monotonic()
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

    def again(self, row: Row, ended: Ended, codes: tuple[int, ...], workdir: pathlib.Path) -> None:
        """Counts a disturbed command of a run: `train` is given again until the end, and compared."""
        fault = ended.fault(*codes) or self.run(self.train(workdir)).fault(0) or self.same_run(workdir)
        row.count(ended.code, fault)


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


def files_of(folder: pathlib.Path, *but: str) -> object:
    """The contents of all files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def kill_later(process: subprocess.Popen, seconds: float, number: int = signal.SIGKILL) -> bool:
    """Sends a signal after so many seconds; False if the process has ended before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return False
    process.send_signal(number)
    return True


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Returns once a run has logged so many steps, or has ended: moments of training, however busy the machine is."""
    while process.poll() is None:
        rows = sum(path.read_bytes().count(b'"scalars"') for path in (workdir / "metrics").glob("*.jsonl"))
        if rows >= step:
            return
        time.sleep(0.002)


def kills_of_runs(drill: Drill) -> Iterator[Row]:
    """Kills at random moments of a start, and while a checkpoint is being written."""
    trained, seconds = drill.trained, drill.seconds
    del trained
    anywhere, saving = (
        Row("SIGKILL, random moments and steps", "train"),
        Row("SIGKILL, within a save", "train"),
    )
    for number in range(drill.counts.kills):
        workdir = drill.root / f"killed{number}"
        process = drill.start(drill.train(workdir))
        if number % 2:
            kill_later(process, drill.random.uniform(0.05, seconds))
        else:
            wait_for_step(process, workdir, drill.random.randrange(1, STEPS))
            process.kill()
        drill.again(anywhere, drill.end(process), (0, 137), workdir)
    for number in range(drill.counts.kills):
        workdir = drill.root / f"saving{number}"
        process = drill.start(drill.train(workdir, checkpoint__every=2))
        wanted = drill.random.randrange(1, 6)
        seen: set[str] = set()
        while process.poll() is None and len(seen) < wanted:
            folder = workdir / "checkpoints"
            seen |= (
                {path.name for path in folder.iterdir() if "tmp" in path.name} if folder.exists() else set()
            )
        time.sleep(drill.random.uniform(0, 0.02))
        process.kill()
        drill.again(saving, drill.end(process), (0, 137), workdir)
    yield from (anywhere, saving)


def kills_of_others(drill: Drill) -> Iterator[Row]:
    """Kills of the verbs that resume what they wrote."""
    images = [f"--workdir={drill.trained}", "--steps=4", "--batch=2"]
    prompts = [f"a red circle, {number}" for number in range(12)]
    commands: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "sample": (["sample", *images, *prompts], ()),
        # The command's own folder stands in it.
        "evaluate": (["evaluate", *images, "--items=12"], ()),
        "prepare": (
            ["prepare", "--config=shapes:smoke", f"--config.source.name=folder:{drill.images}",
             "--config.source.image_size=16", "--config.eval.metrics=()", "--config.codec.name=dct", "--batch=2"], (),
        ),
    }  # fmt: skip
    for verb, (command, but) in commands.items():
        row = Row("SIGKILL, random moments", verb)
        whole = drill.root / f"{verb}-whole"
        began = time.monotonic()
        if fault := drill.run([*command, f"--out={whole}"]).fault(0):
            row.count(1, f"undisturbed: {fault}")
            yield row
            continue
        seconds = time.monotonic() - began
        for number in range(drill.counts.kills):
            out = drill.root / f"{verb}-{number}"
            process = drill.start([*command, f"--out={out}"])
            kill_later(process, drill.random.uniform(0.5, 1.0) * seconds)
            ended = drill.end(process)
            fault = ended.fault(0, 137) or drill.run([*command, f"--out={out}"]).fault(0)
            if not fault and files_of(out, *but) != files_of(whole, *but):
                fault = "other files"
            row.count(ended.code, fault)
        yield row


def signals_of_runs(drill: Drill) -> Iterator[Row]:
    """The three signals: before jax is there, at random steps, and five in a row."""
    for number, code in CODES.items():
        row = Row(f"{number.name}, in the first second", "train")
        for _ in range(drill.counts.signals):
            process = drill.start(drill.train(drill.root / "never"))
            # Python itself takes some hundredths of a second to begin.
            kill_later(process, drill.random.uniform(0.2, 1.0), number)
            ended = drill.end(process)
            row.count(ended.code, ended.fault(code))
        yield row
        row = Row(f"{number.name}, random steps", "train")
        for attempt in range(drill.counts.signals):
            workdir = drill.root / f"{number.name}{attempt}"
            process = drill.start(drill.train(workdir))
            wait_for_step(process, workdir, drill.random.randrange(1, STEPS - 1))
            process.send_signal(number)
            drill.again(row, drill.end(process), (0, code), workdir)
        yield row
    row = Row("five SIGTERM in a row", "train")
    for attempt in range(drill.counts.signals):
        workdir = drill.root / f"five{attempt}"
        process = drill.start(drill.train(workdir))
        wait_for_step(process, workdir, drill.random.randrange(1, STEPS // 2))
        for _ in range(5):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        drill.again(row, drill.end(process), (0, 75), workdir)
    yield row


def two_writers(drill: Drill) -> Iterator[Row]:
    """Two commands with one new workdir at once: the same run, and two experiments."""
    rows = Row("two starts at once", "train"), Row("two experiments in one new folder", "train")
    for row, changes in zip(rows, ({}, {"optim__learning_rate": 0.5}), strict=True):
        for attempt in range(drill.counts.writers):
            workdir = drill.root / f"two{len(changes)}{attempt}"
            first = drill.start(drill.train(workdir))
            time.sleep(drill.random.uniform(0, 1.0))
            second = drill.start(drill.train(workdir, **changes))
            ended = [drill.end(first), drill.end(second)]
            fault = next(filter(None, (each.fault(0, 2) for each in ended)), "")
            if not fault and 0 not in (ended[0].code, ended[1].code):
                fault = "neither finished"
            # Without changes, one that comes late finds a finished run.
            if changes and not fault and ended[0].code == ended[1].code:
                fault = "both finished"
            if not fault and ended[0].code == 0:
                fault = drill.same_run(workdir)
            row.count(max(each.code for each in ended), fault)
        yield row


def disks(drill: Drill) -> Iterator[Row]:
    """A disk that is full while a run saves, one that turns read-only, and a folder that vanishes."""
    full = Row("disk full", "train")
    for attempt in range(drill.counts.disks):
        workdir = drill.root / f"full{attempt}" / "run"
        with small_disk(workdir.parent) as (options, free):
            ended = drill.end(drill.start(drill.train(workdir), **options))
            free()
            drill.again(full, ended, (74,), workdir)
    yield full
    gone = Row("folder gone", "train")
    for attempt in range(drill.counts.disks):
        workdir, moved = drill.root / f"gone{attempt}", drill.root / f"moved{attempt}"
        process = drill.start(drill.train(workdir))
        while process.poll() is None and not (workdir / "checkpoints" / "6").exists():
            time.sleep(0.01)
        workdir.rename(moved)
        ended = drill.end(process)
        if workdir.exists():
            gone.count(ended.code, "files were written where the folder had been")
            continue
        moved.rename(workdir)
        drill.again(gone, ended, (74,), workdir)
    yield gone
    if may_mount():
        readonly = Row("file system turned read-only", "train")
        for attempt in range(drill.counts.disks):
            workdir = drill.root / f"readonly{attempt}"
            process = drill.start(drill.train(workdir))
            while process.poll() is None and not (workdir / "checkpoints" / "6").exists():
                time.sleep(0.01)
            with read_only(workdir / "checkpoints"):
                ended = drill.end(process)
            drill.again(readonly, ended, (74,), workdir)
        yield readonly


def may_mount() -> bool:
    """Whether this process can mount a ramdisk."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True)
        if done.returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
    """Mounts a folder on itself, so that it can be read only: a disk with open files does not let itself be turned."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def small_disk(
    folder: pathlib.Path, size: int = SMALL_DISK
) -> Iterator[tuple[dict[str, object], Callable[[], None]]]:
    """(options of a process, function that makes room) of a folder that holds so many bytes."""
    folder.mkdir(parents=True)
    if not may_mount():
        limit = size // 8
        yield {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}, lambda: None
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield {}, lambda: subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def damage(drill: Drill) -> Iterator[Row]:
    """Flipped bits and cut files of the newest checkpoint, which `train` then resumes from or sets aside."""
    for name, kinds in (("bit flipped", ("flip",)), ("file cut or removed", ("cut", "empty", "remove"))):
        row = Row(f"{name} in the newest checkpoint", "train")
        for attempt in range(drill.counts.bits if kinds == ("flip",) else drill.counts.cuts):
            workdir = pathlib.Path(shutil.copytree(drill.trained, drill.root / f"{kinds[0]}{attempt}"))
            newest = workdir / "checkpoints" / str(STEPS)
            path = drill.random.choice(
                [p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
            )
            harm(path, kinds[attempt % len(kinds)], drill.random)
            ended = drill.run(drill.train(workdir))
            row.count(ended.code, ended.fault(0) or drill.same_run(workdir))
            shutil.rmtree(workdir)
        yield row


def harm(path: pathlib.Path, kind: str, draw: random.Random) -> None:
    """Damages a file."""
    data = bytearray(path.read_bytes())
    if kind == "flip":
        bit = draw.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "empty":
        data = bytearray()
    path.unlink() if kind == "remove" else path.write_bytes(data)


def run(counts: Counts, seed: int) -> Iterator[Row]:
    """The rows of the table, as they are complete."""
    with tempfile.TemporaryDirectory(prefix="drill") as folder:
        drill = Drill(pathlib.Path(folder), counts, seed)
        for part in (signals_of_runs, two_writers, disks, damage, kills_of_runs, kills_of_others):
            for row in part(drill):
                print(row.line(), flush=True)
                yield row


def table(rows: list[Row], seed: int) -> str:
    """The section of the page, with its markers."""
    day = datetime.datetime.now(datetime.UTC).date()
    about = f"{day}, Python {platform.python_version()}, {platform.system()}, seed {seed}"
    head = ["| what | of | tries | lost | exit codes (how often) |", "|---|---|---|---|---|"]
    total = f"{sum(row.tries for row in rows)} tries, {sum(row.lost for row in rows)} lost ({about})."
    return "\n".join([BEGIN, total, "", *head, *(row.line() for row in rows), END])


def write(page: pathlib.Path, text: str) -> None:
    """Puts the table between the markers of a page, or makes a page of it."""
    if not page.exists():
        page.write_text(text + "\n")
        return
    before, found, rest = page.read_text().partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(before + text + rest.partition(END)[2])


def main(arguments: list[str] | None = None) -> int:
    """Runs the drill; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one or two tries of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    for field in dataclasses.fields(Counts):
        parser.add_argument(f"--{field.name}", type=int)
    given = parser.parse_args(arguments)
    counts = SMALL if given.small else Counts()
    set_by_hand = {field.name: getattr(given, field.name) for field in dataclasses.fields(Counts)}
    counts = dataclasses.replace(counts, **{name: n for name, n in set_by_hand.items() if n is not None})
    rows: list[Row] = []
    for row in run(counts, given.seed):
        rows.append(row)
        # At once: a drill that is stopped leaves what it has found.
        write(given.page, table(rows, given.seed))
    return int(any(row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""The drill: kills, signals, damage and full disks over real commands, and the table of what they cost.

    python -m tools.drill                             # the table in docs/errors_and_exit_codes.md; takes its time
    python -m tools.drill --kept=rows.json --only=signals,disks       # some of it; it resumes where it was stopped
    python -m tools.drill --small --page=out.md       # one run that meets one fault of most kinds

Every try disturbs one command, and the same command is then given again, undisturbed; up to five kills come in a row
before. A try is lost if that does not end with exit code 0 and the same bits as a run that nothing disturbed, if an
exit code is another than documented, or if a line of a traceback was printed. Full disks are small ramdisks where this
process may mount them (as root, on Linux); elsewhere the size of files is limited.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tools import marked
from tools.drill_commands import (
    OF_ALL,
    OF_TRAIN,
    SMALL_DISK,
    STEPS,
    Command,
    Drill,
    files_of,
    logged,
    written,
)

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "errors_and_exit_codes.md"
BEGIN, END = "<!-- drill: written by tools/drill.py -->", "<!-- /drill -->"
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}
# Kills in a row, before the command is given undisturbed.
CHAIN = 5


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often each thing is tried: kills of each verb, signals, pairs of writers, disks, bits, cuts."""

    kills: int = 20
    signals: int = 3
    writers: int = 3
    disks: int = 3
    bits: int = 16
    cuts: int = 8


@dataclasses.dataclass
class Row:
    """One line of the table."""

    what: str
    where: str
    tries: int = 0
    lost: int = 0
    codes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def count(self, code: int, fault: str = "") -> None:
        """Adds a try with the exit code of the disturbed command, and what was wrong with it."""
        self.tries += 1
        self.codes[code] += 1
        if fault:
            self.lose(fault)

    def lose(self, fault: str) -> None:
        """The last try is lost: what came after it shows this fault."""
        self.lost += 1
        print(f"LOST: {self.what} of {self.where}: {fault}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """As a row of Markdown."""
        codes = ", ".join(f"{code} ({count})" for code, count in sorted(self.codes.items()))
        return f"| {self.what} | {self.where} | {self.tries} | {self.lost} | {codes} |"


class Table:
    """The rows of a drill. With a file it is made in pieces, and resumes where it was stopped.

    Args:
      kept: the file, or None.
      page: that the table is written to.
      seed: of the drill, for the page.
    """

    def __init__(self, kept: pathlib.Path | None, page: pathlib.Path, seed: int) -> None:
        self._kept, self._page, self._seed = kept, page, seed
        self.rows: list[Row] = []
        if kept is not None and kept.exists():
            for one in json.loads(kept.read_text()):
                codes = collections.Counter({int(code): count for code, count in one.pop("codes").items()})
                self.rows.append(Row(**one, codes=codes))

    def row(self, what: str, where: str) -> Row:
        """The row of this name, as far as it has come."""
        for one in self.rows:
            if (one.what, one.where) == (what, where):
                return one
        self.rows.append(Row(what, where))
        return self.rows[-1]

    def save(self) -> None:
        """Called after each try and its end: a drill that is stopped leaves what it has found."""
        if self._kept is not None:
            rows = [vars(one) | {"codes": dict(one.codes)} for one in self.rows]
            self._kept.write_text(json.dumps(rows, indent=1) + "\n")
        marked.write(self._page, as_text([row for row in self.rows if row.tries], self._seed), BEGIN, END)

    def add(self, row: Row, code: int, fault: str = "") -> None:
        """Counts a try, see `Row.count`, and saves the table."""
        row.count(code, fault)
        self.save()


Disturb = Callable[[Drill, Command, pathlib.Path], None]


def chains(
    drill: Drill,
    table: Table,
    row: Row,
    kills: int,
    arguments: Callable[[pathlib.Path], list[str]],
    disturb: Disturb,
    finish: Callable[[pathlib.Path], str],
) -> None:
    """Counts so many kills of a command, up to `CHAIN` of them in a row in one folder.

    Args:
      arguments: of the command that works in a folder.
      disturb: kills it at some moment, unless it ends before.
      finish: gives the command undisturbed and returns what is wrong then, "" if nothing is.
    """
    while row.codes[137] < kills and row.tries < 3 * kills:
        folder = pathlib.Path(tempfile.mkdtemp(dir=drill.root)) / "it"
        faulty = False
        for _ in range(CHAIN):
            # One of some is started as a user starts it.
            command = drill.start(arguments(folder), fresh=row.tries % 8 == 7)
            disturb(drill, command, folder)
            ended = command.end()
            row.count(ended.code, fault := ended.fault(0, 137))
            faulty |= bool(fault)
            if ended.code == 0 or row.codes[137] >= kills:
                break
        # A try is lost once, whatever comes of it.
        if (fault := finish(folder)) and not faulty:
            row.lose(fault)
        table.save()
        shutil.rmtree(folder.parent)
    if row.codes[137] < kills:
        print(
            f"drill: {row.codes[137]} of {kills} kills in {row.tries} tries: the others ended before",
            file=sys.stderr,
        )


def at_some_step(drill: Drill, command: Command, workdir: pathlib.Path) -> None:
    """Kills a run one to some steps after where it is, or at a moment of its start."""
    if drill.random.random() < 0.5:
        command.kill_later(drill.random.uniform(0.05, drill.seconds))
        return
    wanted = drill.random.randrange(1, 6) + logged(workdir)
    command.wait_for(lambda: logged(workdir) >= wanted)
    command.kill()


def within_a_save(drill: Drill, command: Command, workdir: pathlib.Path, most: int = 3) -> None:
    """Kills a run while one of the next `most` checkpoints is being written."""
    wanted, seen, folder = drill.random.randint(1, most), set(), workdir / "checkpoints"

    def reached() -> bool:
        if folder.exists():
            seen.update(path.name for path in folder.iterdir() if "tmp" in path.name)
        return len(seen) >= wanted

    command.wait_for(reached)
    time.sleep(drill.random.uniform(0, 0.02))
    command.kill()


def kills_of_runs(drill: Drill, counts: Counts, table: Table) -> None:
    """Kills at random moments of a start, and while a checkpoint is being written."""
    assert drill.trained
    row = table.row("SIGKILL, random moments and steps", "train")
    chains(drill, table, row, counts.kills, drill.train, at_some_step, drill.resumed)
    row = table.row("SIGKILL, within a save", "train")

    def saves_often(workdir: pathlib.Path) -> list[str]:
        return drill.train(workdir, checkpoint__every=2)

    chains(drill, table, row, counts.kills, saves_often, within_a_save, drill.resumed)


def kills_of_others(drill: Drill, counts: Counts, table: Table) -> None:
    """Kills of the verbs that resume what they wrote."""
    images = [f"--workdir={drill.trained}", "--steps=4", "--batch=2"]
    prompts = [f"a red circle, {number}" for number in range(16)]
    commands = {
        "sample": ["sample", *images, *prompts],
        "evaluate": ["evaluate", *images, "--items=12"],
        "prepare": [
            "prepare", "--config=shapes:smoke", f"--config.source.name=folder:{images_of(drill.root)}",
            "--config.source.image_size=16", "--config.eval.metrics=()", "--config.codec.name=dct", "--batch=2",
        ],
    }  # fmt: skip
    for verb, command in commands.items():
        row = table.row("SIGKILL, random moments", verb)
        if row.codes[137] >= counts.kills:
            continue
        whole, began = drill.root / f"{verb}-whole", time.monotonic()
        if fault := drill.run([*command, f"--out={whole}"]).fault(0):
            raise SystemExit(f"{verb}, undisturbed: {fault}")
        seconds = time.monotonic() - began
        wanted = files_of(whole)

        def disturb(drill: Drill, command: Command, out: pathlib.Path, seconds: float = seconds) -> None:
            if drill.random.random() < 0.4:
                command.kill_later(drill.random.uniform(0.3, 1.0) * seconds)
                return
            # In the middle of its work, however long its start takes.
            more = written(out) + drill.random.randrange(1, 4)
            command.wait_for(lambda: written(out) >= more)
            command.kill_later(drill.random.uniform(0, 0.2))

        def finish(out: pathlib.Path, command: list[str] = command, wanted: dict[str, str] = wanted) -> str:
            if fault := drill.run([*command, f"--out={out}"]).fault(0):
                return fault
            found = files_of(out)
            other = [
                name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)
            ]
            return f"other files: {', '.join(other)}" if other else ""

        def arguments(out: pathlib.Path, command: list[str] = command) -> list[str]:
            return [*command, f"--out={out}"]

        chains(drill, table, row, counts.kills, arguments, disturb, finish)


def kills_of_studies(drill: Drill, counts: Counts, table: Table) -> None:
    """Kills of a study of two members and two seeds, whose tables must come out byte for byte."""
    row = table.row("SIGKILL, random moments", "study")
    if row.codes[137] >= counts.kills:
        return
    command, whole = ["study", "--config=shapes_core:smoke"], drill.root / "study-whole"
    began = time.monotonic()
    if fault := drill.run([*command, f"--workdir={whole}"]).fault(0):
        raise SystemExit(f"study, undisturbed: {fault}")
    seconds, tables = time.monotonic() - began, ("table.parquet", "scores.parquet")

    def disturb(drill: Drill, command: Command, workdir: pathlib.Path) -> None:
        # Of a fifth of the study: a chain of kills meets all of it.
        command.kill_later(drill.random.uniform(0.1, 1.0) * seconds / CHAIN)

    def finish(workdir: pathlib.Path) -> str:
        if fault := drill.run([*command, f"--workdir={workdir}"]).fault(0):
            return fault
        other = [name for name in tables if (workdir / name).read_bytes() != (whole / name).read_bytes()]
        return f"other tables: {', '.join(other)}" if other else ""

    chains(
        drill, table, row, counts.kills, lambda workdir: [*command, f"--workdir={workdir}"], disturb, finish
    )


def images_of(root: pathlib.Path) -> pathlib.Path:
    """A folder of small images with captions."""
    import numpy as np
    from PIL import Image

    folder = root / "images"
    folder.mkdir()
    lines = []
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a red circle, {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def again(
    drill: Drill, table: Table, row: Row, command: Command, codes: tuple[int, ...], workdir: pathlib.Path
) -> None:
    """Counts a disturbed command of a run: `train` is given again until the end, and compared."""
    ended = command.end()
    table.add(row, ended.code, ended.fault(*codes) or drill.resumed(workdir))


def signals(drill: Drill, counts: Counts, table: Table) -> None:
    """The three signals: before jax is there, at random steps, and five in a row."""
    for number, code in CODES.items():
        row = table.row(f"{number.name}, in the first second", "train")
        for _ in range(row.tries, counts.signals):
            command = drill.start(drill.train(drill.root / "never"), fresh=True)
            # Python itself takes some hundredths of a second to begin, and longer on a busy machine.
            command.wait_for(command.handles_signals)
            command.kill_later(drill.random.uniform(0.0, 0.8), number)
            ended = command.end()
            table.add(row, ended.code, ended.fault(code))
        row = table.row(f"{number.name}, random steps", "train")
        for attempt in range(row.tries, counts.signals):
            workdir = drill.root / f"{number.name}{attempt}"
            command, wanted = drill.start(drill.train(workdir)), drill.random.randrange(1, STEPS - 1)
            command.wait_for(lambda: logged(workdir) >= wanted)  # noqa: B023
            command.send(number)
            again(drill, table, row, command, (0, code), workdir)
    row = table.row("five SIGTERM in a row", "train")
    for attempt in range(row.tries, counts.signals):
        workdir = drill.root / f"five{attempt}"
        command, wanted = drill.start(drill.train(workdir)), drill.random.randrange(1, STEPS // 2)
        command.wait_for(lambda: logged(workdir) >= wanted)  # noqa: B023
        for _ in range(5):
            command.send(signal.SIGTERM)
            time.sleep(0.05)
        again(drill, table, row, command, (0, 75), workdir)


def writers(drill: Drill, counts: Counts, table: Table) -> None:
    """Two commands with one new workdir at once: the same run, and two experiments."""
    rows = (
        table.row("two starts at once", "train"),
        table.row("two experiments in one new folder", "train"),
    )
    for row, changes in zip(rows, ({}, {"optim__learning_rate": 0.5}), strict=True):
        for attempt in range(row.tries, counts.writers):
            workdir = drill.root / f"two{len(changes)}{attempt}"
            first = drill.start(drill.train(workdir))
            time.sleep(drill.random.uniform(0, 1.0))
            second = drill.start(drill.train(workdir, **changes))
            ended = [first.end(), second.end()]
            fault = next(filter(None, (each.fault(0, 2) for each in ended)), "")
            if not fault and 0 not in (ended[0].code, ended[1].code):
                fault = "neither finished"
            # Without changes, one that comes late finds a finished run.
            if changes and not fault and ended[0].code == ended[1].code:
                fault = "both finished"
            if not fault and ended[0].code == 0:
                fault = drill.same_run(workdir)
            table.add(row, max(each.code for each in ended), fault)


def has_saved(workdir: pathlib.Path) -> bool:
    """Whether a run has its first checkpoint."""
    return (workdir / "checkpoints" / "6").exists()


def disks(drill: Drill, counts: Counts, table: Table) -> None:
    """A disk that is full while a run saves, one that turns read-only, and a folder that vanishes."""
    full = table.row("disk full", "train")
    for attempt in range(full.tries, counts.disks):
        workdir = drill.root / f"full{attempt}" / "run"
        with small_disk(workdir.parent) as (largest, free):
            ended = drill.start(drill.train(workdir), largest=largest).end()
            free()
            table.add(full, ended.code, ended.fault(74) or drill.resumed(workdir))
    gone = table.row("folder gone", "train")
    for attempt in range(gone.tries, counts.disks):
        workdir, moved = drill.root / f"gone{attempt}", drill.root / f"moved{attempt}"
        command = drill.start(drill.train(workdir))
        command.wait_for(lambda: has_saved(workdir))  # noqa: B023
        workdir.rename(moved)
        ended = command.end()
        if workdir.exists():
            table.add(gone, ended.code, "files were written where the folder had been")
            continue
        moved.rename(workdir)
        table.add(gone, ended.code, ended.fault(74) or drill.resumed(workdir))
    if may_mount():
        readonly = table.row("file system turned read-only", "train")
        for attempt in range(readonly.tries, counts.disks):
            workdir = drill.root / f"readonly{attempt}"
            command = drill.start(drill.train(workdir))
            command.wait_for(lambda: has_saved(workdir))  # noqa: B023
            with read_only(workdir / "checkpoints"):
                ended = command.end()
            table.add(readonly, ended.code, ended.fault(74) or drill.resumed(workdir))


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
) -> Iterator[tuple[int | None, Callable[[], object]]]:
    """(bytes of the largest file, if that is the limit; function that makes room) of a folder of so many bytes."""
    folder.mkdir(parents=True)
    if not may_mount():
        yield size // 8, lambda: None
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield None, lambda: subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def damage(drill: Drill, counts: Counts, table: Table) -> None:
    """Flipped bits and cut files of the newest checkpoint, which `train` then resumes from or sets aside."""
    kinds = {
        "bit flipped": (counts.bits, ("flip",)),
        "file cut or removed": (counts.cuts, ("cut", "empty", "remove")),
    }
    for name, (times, ways) in kinds.items():
        row = table.row(f"{name} in the newest checkpoint", "train")
        for attempt in range(row.tries, times):
            workdir = pathlib.Path(shutil.copytree(drill.trained, drill.root / f"{ways[0]}{attempt}"))
            harm_newest(workdir, ways[attempt % len(ways)], drill.random)
            ended = drill.run(drill.train(workdir))
            table.add(row, ended.code, ended.fault(0) or drill.same_run(workdir))
            shutil.rmtree(workdir)


def harm_newest(workdir: pathlib.Path, kind: str, draw: random.Random) -> None:
    """Damages a file of the newest checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = workdir / "checkpoints" / str(max(steps))
    harm(draw.choice([p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]), kind, draw)


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


def small(drill: Drill, counts: Counts, table: Table) -> None:
    """One run that meets a signal, a second start, a kill within a save and a flipped bit, one after the other."""
    assert drill.trained and counts
    workdir = drill.root / "small"
    row = table.row("SIGTERM, a random step", "train")
    command, wanted = drill.start(drill.train(workdir)), drill.random.randrange(8, 14)
    command.wait_for(lambda: logged(workdir) >= wanted)
    command.send(signal.SIGTERM)
    ended = command.end()
    table.add(row, ended.code, ended.fault(75))
    killed = table.row("SIGKILL, within a save", "train")
    second = table.row("a second start meanwhile", "train")
    before = logged(workdir)
    command = drill.start(drill.train(workdir, checkpoint__every=2))
    command.wait_for((workdir / "lease.json").exists)
    ended = drill.run(drill.train(workdir))
    table.add(second, ended.code, ended.fault(2))
    command.wait_for(lambda: logged(workdir) > before)
    within_a_save(drill, command, workdir, 1)
    ended = command.end()
    table.add(killed, ended.code, ended.fault(0, 137))
    row = table.row("bit flipped in the newest checkpoint", "train")
    harm_newest(workdir, "flip", drill.random)
    ended = drill.run(drill.train(workdir))
    table.add(row, ended.code, ended.fault(0) or drill.same_run(workdir))


PARTS = {
    part.__name__: part
    for part in (signals, writers, disks, damage, kills_of_runs, kills_of_others, kills_of_studies)
}


def run(parts: list[str], counts: Counts, seed: int, table: Table) -> None:
    """Makes the tries of some parts that the table lacks."""
    if not parts:
        return
    with tempfile.TemporaryDirectory(prefix="drill") as folder:
        # A drill that resumes meets other moments.
        moments = seed + sum(row.tries for row in table.rows)
        drill = Drill(pathlib.Path(folder), moments, OF_TRAIN if parts == ["small"] else OF_ALL)
        for name in parts:
            (PARTS | {"small": small})[name](drill, counts, table)


def as_text(rows: list[Row], seed: int) -> str:
    """The section of the page, with its markers."""
    day = datetime.datetime.now(datetime.UTC).date()
    about = f"{day}, Python {platform.python_version()}, {platform.system()}, seed {seed}"
    head = ["| what | of | tries | lost | exit codes (how often) |", "|---|---|---|---|---|"]
    total = f"{sum(row.tries for row in rows)} tries, {sum(row.lost for row in rows)} lost ({about})."
    return "\n".join([BEGIN, total, "", *head, *(row.line() for row in rows), END])


def main(arguments: list[str] | None = None) -> int:
    """Runs the drill; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one run, one fault of each kind")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts, with commas; none writes what is kept"
    )
    parser.add_argument("--kept", type=pathlib.Path, help="file that keeps the rows of other parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    for field in dataclasses.fields(Counts):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    given = parser.parse_args(arguments)
    parts = ["small"] if given.small else [part for part in given.only.split(",") if part]
    if unknown := [part for part in parts if part not in (*PARTS, "small")]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    counts = Counts(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Counts)})
    made = Table(given.kept, given.page, given.seed)
    run(parts, counts, given.seed, made)
    made.save()
    for row in made.rows:
        print(row.line())
    return int(any(row.lost for row in made.rows))


if __name__ == "__main__":
    sys.exit(main())

"""Runs a study: trains and evaluates its members one after another, resumes after a kill, and keeps its table.

A study is a folder (`folder.py`). Its spec is written there before the first run, with the claims, so that a reader
sees which claims came before the results. The same command resumes a killed study; a spec with more members, seeds or
claims extends it. All seeds of a member run in one process and share its compiled programs.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from scaling_dit import files, signals
from scaling_dit.checkpoints.frozen_base import absolute
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.errors import UserError
from scaling_dit.evaluation import run as evaluation
from scaling_dit.parallel import processes
from scaling_dit.scaling import ladder, machine, table
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import tensorboard as curves
from scaling_dit.scaling.folder import StudyFolder, scores_folder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec
from scaling_dit.scaling.table import DONE, STOPPED, WAITING, Row
from scaling_dit.training import loop
from scaling_dit.training.base import Start


@dataclasses.dataclass(frozen=True)
class Study:
    """A study with the results so far.

    Attributes:
      spec: question, members, seeds, metrics, claims.
      folder: where it lies.
      rows: one for each run and point, see `table.run_rows`.
      measured: one for each run: wall time, speed, memory, goodput.
      scores: one for each score, see `table.run_scores`.
      registered: claim -> how many runs had finished when it was registered; 0 for those made beforehand.
    """

    spec: StudySpec
    folder: StudyFolder
    rows: list[Row]
    measured: list[Row]
    scores: list[Row]
    registered: dict[str, int]

    @property
    def runs(self) -> int:
        """Runs that the spec asks for."""
        return len(self.spec.members) * len(self.spec.seeds)


def study(spec: StudySpec | str, workdir: str | epath.Path) -> Study:
    """Runs a study to its end, from wherever it is, and returns it.

    Args:
      spec: of the study, or the place of its file as `spec.load` takes it.
      workdir: folder of the study, local or gs://. One that holds the study is resumed; a spec that has more members,
        seeds, claims or scores extends it.

    Raises:
      UserError: a mistake in the spec, a folder of another study, or a member that cannot run.
      Stopped: SIGTERM arrived; the same call resumes.
    """
    spec = spec_lib.load(spec) if isinstance(spec, str) else spec
    table.check_installed()
    folder = StudyFolder(workdir)
    runner = _Runner(spec, folder)
    registered = register(spec, folder, runner.finished)
    if jax.process_index() == 0:
        machine.note(folder.machines)
    runner.work()
    return runner.study(registered)


def read_spec(workdir: str | epath.Path) -> StudySpec:
    """The spec of the study in a folder; raises UserError where none is."""
    return spec_lib.from_json(_saved(StudyFolder(workdir)))


def open_study(workdir: str | epath.Path) -> Study:
    """A study as it lies in its folder, also while it runs; raises UserError where none is."""
    folder = StudyFolder(workdir)
    saved = _saved(folder)
    rows, measured, scores = map(table.read_parquet, (folder.table, folder.measured, folder.scores))
    return Study(spec_lib.from_json(saved), folder, rows, measured, scores, saved["registered"])


def _saved(folder: StudyFolder) -> dict[str, Any]:
    saved = _read_saved(folder)
    if saved is None:
        raise UserError(
            f"no study in {folder}: {folder.study.name} is missing; `scaling-dit study` writes it"
        )
    return saved


def register(spec: StudySpec, folder: StudyFolder, finished: Callable[[], int]) -> dict[str, int]:
    """Writes the spec to the folder, or adds to the one there; returns claim -> runs finished when it was registered.

    Args:
      finished: counts the runs that have finished; asked where claims are new.

    Raises:
      UserError: the folder's study has a member of that name with another config, or a claim that differs or is gone;
        or what every run is evaluated with differs.
    """
    saved, now = _read_saved(folder), spec_lib.to_json(spec)
    registered: dict[str, int] = {}
    if saved is not None:
        _check_extends(saved, now, folder)
        registered = dict(saved["registered"])
    if new := [claim.name for claim in spec.claims if claim.name not in registered]:
        done = finished() if saved is not None else 0
        registered |= dict.fromkeys(new, done)
    folder.folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder.study, files.to_json(now | {"registered": registered}).encode())
    return registered


def _check_extends(saved: dict[str, Any], now: dict[str, Any], folder: StudyFolder) -> None:
    # Saved configs as this version reads them, for a later one may have more fields.
    before = spec_lib.from_json(saved).members
    there = {member.name: spec_lib.member_hash(member) for member in before}
    here = {one["name"]: one["hash"] for one in now["members"]}
    for name, digest in there.items():
        if name not in here:
            raise UserError(
                f"the study in {folder} has member {name!r}, which the spec lacks; give another --workdir"
            )
        if digest != here[name]:
            raise UserError(
                f"member {name!r} had another config in {folder}; rename it, or give another --workdir"
            )
    for key in ("metrics", "items", "points", "generation_seeds", "guidances"):
        if saved[key] != now[key]:
            raise UserError(
                f"{key} is {saved[key]!r} in {folder} and {now[key]!r} here, so its runs would not compare; "
                "give another --workdir"
            )
    if missing := set(saved["seeds"]) - set(now["seeds"]):
        raise UserError(f"the study in {folder} has seeds {sorted(missing)}, which the spec lacks; add them")
    claims = {claim["name"]: claim for claim in now["claims"]}
    for claim in saved["claims"]:
        if claims.get(claim["name"]) != claim:
            raise UserError(
                f"claim {claim['name']!r} was registered in {folder} and is "
                f"{'another' if claim['name'] in claims else 'gone'} now; a registered claim stays as it was"
            )


def _read_saved(folder: StudyFolder) -> dict[str, Any] | None:
    if not folder.study.exists():
        return None
    remedy = "put it back, or give another --workdir"
    saved: dict[str, Any] = files.read_json(folder.study, dict, remedy)
    if not isinstance(saved.get("registered"), dict):
        raise UserError(f"{folder.study} is damaged: its claims are missing; {remedy}")
    return saved


class _Runner:
    """The work of one start: which runs are left, doing them, and keeping the tables."""

    def __init__(self, spec: StudySpec, folder: StudyFolder) -> None:
        self._spec, self._folder = spec, folder
        # Asked once: nobody else works in the folder, and a remote store answers slowly.
        self._status = {
            (member.name, seed): table.status_of(spec, folder, member, seed)
            for member in spec.members
            for seed in spec.seeds
        }
        # Rows of runs that are over: they are read once.
        self._over: dict[tuple[str, int], tuple[list[Row], list[Row], list[Row]]] = {}
        self._progress = _Progress(spec, self._is_over)

    def finished(self) -> int:
        """How many runs are over."""
        return sum(status in (DONE, STOPPED) for status in self._status.values())

    def work(self) -> None:
        """Trains and evaluates what is left, and writes the tables after each run."""
        spec, folder = self._spec, self._folder
        for member in spec.members:
            left = [seed for seed in spec.seeds if not self._is_over(member, seed)]
            for seed in left:
                self._progress.begin(member, seed)
                self._train(member, seed)
                self._status[member.name, seed] = table.status_of(spec, folder, member, seed)
                self._progress.end(member)
                self.study({})
            for seed in spec.seeds:
                # A start may have been killed before it wrote them.
                if seed in left or not curves.place(folder, member, seed).exists():
                    curves.write(spec, folder, member, seed)
            if left:
                # Programs of one member are of no use to the next.
                jax.clear_caches()
        self.study({})

    def study(self, registered: dict[str, int]) -> Study:
        """The study with its rows so far; the tables are written."""
        spec, folder = self._spec, self._folder
        parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
        for member in spec.members:
            for seed in spec.seeds:
                for part, found in zip(parts, self._tables(member, seed), strict=True):
                    part += found
        if jax.process_index() == 0:
            for path, part in zip((folder.table, folder.measured, folder.scores), parts, strict=True):
                table.write_parquet(path, part)
        rows, measured, scores = parts
        return Study(spec, folder, rows, measured, scores, registered)

    def _tables(self, member: Member, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
        key = member.name, seed
        if self._status[key] == WAITING:
            return [], [], []
        if key in self._over:
            return self._over[key]
        read = (table.run_rows, table.run_measured, table.run_scores)
        rows, measured, scores = (one(self._spec, self._folder, member, seed) for one in read)
        if self._is_over(member, seed):
            self._over[key] = rows, measured, scores
        return rows, measured, scores

    def _is_over(self, member: Member, seed: int) -> bool:
        return self._status[member.name, seed] in (DONE, STOPPED)

    def _note_stop(self, member: Member, seed: int, code: int, reason: str) -> None:
        """Writes down that a run is over before its last step."""
        path = self._folder.stopped(member.name, seed)
        # A run that never began has no folder.
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, files.to_json({"code": code, "reason": reason}).encode())

    def _train(self, member: Member, seed: int) -> None:
        """Trains one run to its end and evaluates it at every point.

        A run whose loss is not finite, or keeps spiking, is over: it has that status in the table, and the study goes
        on.
        """
        spec, folder = self._spec, self._folder
        run = folder.run(member.name, seed)
        config = spec.run_config(member, seed, str(folder.compile_cache))
        start = None
        # A run that exists has its base's weights. One of adapters reads them at each start, wherever they lie now.
        if member.base and (config.adapter.rank or not run.config.exists()):
            start = Start(absolute(str(folder.run(member.base, seed))))
        if member.base and self._status[member.base, seed] == STOPPED:
            self._note_stop(member, seed, loop.NONFINITE, f"{member.base}, which it begins from, has stopped")
            return
        try:
            loop.train(config, run.folder, start=start)
        except loop.Stopped as stop:
            if stop.code == loop.PREEMPTED:
                raise
            self._note_stop(member, seed, stop.code, str(stop))
            return
        _note_memory(folder.memory(member.name, seed))
        with processes.preemption() as preempted:
            for step in spec_lib.point_steps(config.steps, spec.points):
                wanted = table.results(spec, run, step)
                for (_, generation, scale), path in wanted.items():
                    if path.exists():
                        continue
                    if preempted():
                        raise loop.Stopped(
                            signals.exit_code(), f"{signals.name()}: the same command resumes the study"
                        )
                    _evaluate(spec, run, step, generation, scale)
                    if not path.exists():
                        raise UserError(
                            f"evaluating step {step} of {run} left no {path}; the line above says why a metric was "
                            "skipped: install what it needs and give the same command again"
                        )
        _keep_last(run.checkpoints)


def _evaluate(spec: StudySpec, run: Any, step: int, generation: int, scale: float | None) -> None:
    """Scores one checkpoint by all metrics, as `scaling-dit evaluate` does."""
    out = scores_folder(run, step, generation, spec.items, scale)
    # What it prints is for people who wait; a program reads what this command prints.
    with contextlib.redirect_stdout(sys.stderr):
        evaluation.main(
            str(run),
            str(out),
            metrics=spec.metrics,
            items=spec.items,
            seed=generation,
            step=step,
            changes={} if scale is None else {"guidance": scale},
        )


def _note_memory(path: epath.Path) -> None:
    """Writes what the devices' driver says of the most memory in use; nothing where it does not count."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    counted = [value for value in used if value is not None]
    if counted and jax.process_index() == 0:
        files.write_whole(path, files.to_json({"peak_bytes": max(counted)}).encode())


def _keep_last(folder: epath.Path) -> None:
    """Removes the checkpoints of a run that is evaluated, all but the last: they take most of a study's disk."""
    with Checkpoints(folder) as store:
        for step in store.all_steps()[:-1]:
            store.remove(step)


class _Progress:
    """Prints which run of how many begins, and when the study will end.

    The rest is estimated from the training FLOPs that are left, at the mean rate of this start's runs of each family,
    or of all where a family has none yet.
    """

    def __init__(
        self,
        spec: StudySpec,
        is_over: Callable[[Member, int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._is_over, self._clock = spec, is_over, clock
        self._spent: dict[str, list[float]] = {}
        self._began = clock()

    def begin(self, member: Member, seed: int) -> None:
        """Prints a line before a run."""
        left = [(m, s) for m in self._spec.members for s in self._spec.seeds if not self._is_over(m, s)]
        total = len(self._spec.members) * len(self._spec.seeds)
        self._began = self._clock()
        print(
            f"scaling-dit: study: run {total - len(left) + 1} of {total}: {member.name}, seed {seed}; "
            f"{self.eta_text([m for m, _ in left])}",
            file=sys.stderr,
            flush=True,
        )

    def end(self, member: Member) -> None:
        """Notes how long the run took."""
        family = str(member.config.backbone.name)
        spent = self._spent.setdefault(family, [0.0, 0.0])
        spent[0] += ladder.cost(member.config).train_flops()
        spent[1] += self._clock() - self._began

    def eta_text(self, left: Sequence[Member]) -> str:
        """The time for these runs, in words."""
        seconds = self.eta(left)
        if seconds is None:
            return "time to go is known after the first run"
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"about {hours} h {minutes:02d} min to go" if hours else f"about {max(1, minutes)} min to go"

    def eta(self, left: Sequence[Member]) -> float | None:
        """Seconds for these runs; None before any run has ended."""
        if not self._spent:
            return None
        flops, seconds = map(sum, zip(*self._spent.values(), strict=True))
        rates = {family: each[0] / each[1] for family, each in self._spent.items()}
        return sum(
            ladder.cost(member.config).train_flops()
            / rates.get(str(member.config.backbone.name), flops / seconds)
            for member in left
        )


def merge(folders: Sequence[str | epath.Path]) -> Study:
    """Several studies as one, in memory: their members and rows side by side, for a report over all.

    Members of one name must have one config; a run that two studies have is taken from the first.

    Raises:
      UserError: folders without a study, members that differ, or evaluations that do not compare.
    """
    studies = [open_study(folder) for folder in folders]
    first = studies[0]
    members: dict[str, Member] = {}
    for one in studies:
        for key in ("metrics", "items", "points", "generation_seeds"):
            if getattr(one.spec, key) != getattr(first.spec, key):
                raise UserError(
                    f"{one.folder} and {first.folder} differ in {key}, so their runs do not compare"
                )
        for member in one.spec.members:
            known = members.setdefault(member.name, member)
            if spec_lib.member_hash(known) != spec_lib.member_hash(member):
                raise UserError(
                    f"member {member.name!r} of {one.folder} has another config than in {first.folder}"
                )
    claims = {claim.name: claim for one in studies for claim in one.spec.claims}
    registered: dict[str, int] = {}
    for one in studies:
        for name, done in one.registered.items():
            registered[name] = max(done, registered.get(name, 0))
    spec = dataclasses.replace(
        first.spec,
        question=" / ".join(dict.fromkeys(one.spec.question for one in studies)),
        members=tuple(members.values()),
        seeds=tuple(dict.fromkeys(seed for one in studies for seed in one.spec.seeds)),
        claims=tuple(claims.values()),
        guidances=tuple(dict.fromkeys(scale for one in studies for scale in one.spec.guidances)),
    )
    rows, measured, scores = (
        list(_first_of_each(part))
        for part in zip(*((one.rows, one.measured, one.scores) for one in studies), strict=True)
    )
    return Study(spec, first.folder, rows, measured, scores, registered)


def _first_of_each(parts: Sequence[list[Row]]) -> Iterator[Row]:
    """The rows of all parts; a (member, seed) that an earlier part has is skipped in later ones."""
    seen: set[tuple[str, int]] = set()
    for part in parts:
        yield from (row for row in part if (row["member"], row["seed"]) not in seen)
        seen |= {(row["member"], row["seed"]) for row in part}

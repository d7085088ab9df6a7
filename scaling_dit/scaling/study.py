"""Runs a study: trains and evaluates its members, resumes after a kill, and keeps its table.

A study is a folder (`folder.py`). Its spec is written there before the first run, with the claims, so that a reader
sees which claims came before the results. The same command resumes a killed study; a spec with more members, seeds or
claims extends it. All seeds of a member run in one process and share its compiled programs. Members run one after
another, several at once on the cores of one host (`members_at_once.py`), or on several slices that share a queue
(`queue_members.py`). The processes of a slice run one study together: the first one writes, and what it sees in the
folder counts for all.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit import files
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError, nearest, printable
from scaling_dit.parallel import processes
from scaling_dit.scaling import ladder, machine, member_runs, members_at_once, table
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import tensorboard as curves
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.columns import Columns
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import LOSS, StudySpec
from scaling_dit.scaling.table import DONE, STOPPED, WAITING, Row


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
      homes: (member, seed) -> the study's folder with that run, where several studies are merged into one.
    """

    spec: StudySpec
    folder: StudyFolder
    rows: list[Row]
    measured: list[Row]
    scores: list[Row]
    registered: dict[str, int]
    homes: dict[tuple[str, int], StudyFolder] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> int:
        """Runs that the spec asks for; of a merged study, those that one of its studies does."""
        return len(self.homes) or len(self.spec.members) * len(self.spec.seeds)

    @functools.cached_property
    def columns(self) -> Columns:
        """Which columns of the table are scores, and which one each metric is about."""
        return Columns(self.spec, self.rows, self.scores)

    @property
    def over(self) -> int:
        """Runs that have ended, at their last step or early."""
        return sum(row["status"] in (DONE, STOPPED) for row in self.measured)

    @property
    def folders(self) -> tuple[StudyFolder, ...]:
        """The folders with the runs, `folder` first."""
        return tuple(dict.fromkeys((self.folder, *self.homes.values())))

    def seeds(self, member: str) -> tuple[int, ...]:
        """The training seeds of a member."""
        return tuple(seed for seed in self.spec.seeds if not self.homes or (member, seed) in self.homes)

    def run(self, member: str, seed: int) -> Workdir:
        """The workdir of one run, where it lies."""
        return self.homes.get((member, seed), self.folder).run(member, seed)


def study(
    spec: StudySpec | str, workdir: str | epath.Path, *, at_once: int = 1, own_code: bool = False
) -> Study:
    """Runs a study to its end, from wherever it is, and returns it.

    Args:
      spec: of the study, or the place of its file as `spec.load` takes it.
      workdir: folder of the study, local or gs://. One that holds the study is resumed; a spec that has more members,
        seeds, claims or scores extends it.
      at_once: members that are trained at the same time, each in a process with its share of the CPU cores: programs
        of small models gain little from more than one. CPUs only.
      own_code: whether these processes run the code outside of the package that the spec names.

    Raises:
      UserError: a mistake in the spec, a folder of another study, or a member that cannot run or be scored: as far as
        that can be known, before anything is trained.
      Stopped: SIGTERM arrived; the same call resumes.
    """
    spec = spec if isinstance(spec, StudySpec) else spec_lib.load(spec)
    table.check_installed()
    if at_once > 1:
        members_at_once.check(at_once)
    folder = StudyFolder(workdir)
    runner = _Runner(spec, folder)
    runner.check()

    def write() -> None:
        register(spec, folder, runner.finished)

    processes.first_does(write)
    registered = _saved(folder)["registered"]
    if jax.process_index() == 0:
        machine.note(folder)
    if at_once > 1:
        runner.work_at_once(at_once, own_code)
    else:
        runner.work()
    return runner.study(registered)


def member(name: str, workdir: str | epath.Path, *, noted: bool = False) -> int:
    """Trains and evaluates one member of the study in a folder, and leaves the tables to `study`; returns its runs.

    Args:
      noted: whether the study has noted the start and the machine already.

    Raises:
      UserError: no study in the folder, no such member, or it cannot run.
      Stopped: SIGTERM arrived; the same call resumes.
    """
    spec, folder = read_spec(workdir), StudyFolder(workdir)
    if name not in (names := [one.name for one in spec.members]):
        raise UserError(f"the study in {folder} has no member {name!r}; it has {', '.join(names)}")
    chosen = spec.member(name)
    runner = _Runner(spec, folder, (chosen,))
    runner.check()
    if not noted and jax.process_index() == 0:
        machine.note(folder)
    runner.work_on(chosen)
    return len(spec.seeds)


def write_tables(workdir: str | epath.Path) -> Study:
    """Writes the tables of the runs so far of the study in a folder, as `study` would; trains nothing.

    Raises:
      UserError: no study in the folder, no pyarrow, or a run in the tables whose folder is gone: its row would be lost.
    """
    folder, saved = StudyFolder(workdir), _saved(StudyFolder(workdir))
    table.check_installed()
    rows = table.read_parquet(folder.table) if folder.table.exists() else []
    # Each run is looked for once, however many points it has.
    for member, seed in dict.fromkeys((row["member"], row["seed"]) for row in rows):
        if not (run := folder.run(member, seed)).config.exists():
            raise UserError(
                f"{folder.table} has results of {run}, which is gone; the tables stay as they are"
            )
    return _Runner(_spec_of(saved, folder), folder).study(saved["registered"])


def prepare(spec: StudySpec, folder: StudyFolder) -> None:
    """Checks what is left of a study as `study` does, and registers it; trains nothing.

    Raises:
      UserError: as `study`.
    """
    runner = _Runner(spec, folder)
    runner.check()
    register(spec, folder, runner.finished)


def read_spec(workdir: str | epath.Path) -> StudySpec:
    """The spec of the study in a folder; raises UserError where none is."""
    folder = StudyFolder(workdir)
    return _spec_of(_saved(folder), folder)


def open_study(workdir: str | epath.Path) -> Study:
    """A study as it lies in its folder, also while it runs; raises UserError where none is."""
    folder = StudyFolder(workdir)
    saved = _saved(folder)
    rows, measured, scores = map(table.read_parquet, (folder.table, folder.measured, folder.scores))
    return Study(_spec_of(saved, folder), folder, rows, measured, scores, saved["registered"])


def _spec_of(saved: dict[str, Any], folder: StudyFolder) -> StudySpec:
    return spec_lib.from_json(saved, str(folder.study))


def _saved(folder: StudyFolder) -> dict[str, Any]:
    saved = _read_saved(folder)
    if saved is None:
        raise UserError(
            f"no study in {folder}: {folder.study.name} is missing; `scaling-dit study` writes it"
        )
    return saved


def register(spec: StudySpec, folder: StudyFolder, finished: Callable[[], int]) -> dict[str, int]:
    """Writes the spec to the folder, or adds to the one there; returns claim -> runs finished when it was registered.

    A folder that holds a run is refused.

    Args:
      finished: counts the runs that have finished; asked where claims are new.

    Raises:
      UserError: the folder holds a run; or its study has a member of that name with another config, or a claim that
        differs or is gone; or what every run is evaluated with differs; or a new claim is about a score that no run so
        far has.
    """
    folder.check_is_no_run()
    # The spec is the user's, or was checked when it was read.
    config_lib.trust_names(spec.metrics)
    saved, now = _read_saved(folder), spec_lib.to_json(spec)
    registered: dict[str, int] = {}
    if saved is not None:
        _check_extends(saved, now, folder)
        registered = dict(saved["registered"])
    if new := [claim for claim in spec.claims if claim.name not in registered]:
        if saved is not None:
            _check_scores(spec, new, folder)
        done = finished() if saved is not None else 0
        registered |= {claim.name: done for claim in new}
    folder.folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder.study, files.to_json(now | {"registered": registered}).encode())
    return registered


def _check_extends(saved: dict[str, Any], now: dict[str, Any], folder: StudyFolder) -> None:
    # Saved configs as this version reads them, for a later one may have more fields.
    before = _spec_of(saved, folder).members
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


def _check_scores(spec: StudySpec, claims: Sequence[Claim], folder: StudyFolder) -> None:
    """Makes sure that claims are about scores that runs have, as far as the tables show; raises UserError."""
    asked = [claim for claim in claims if spec.metric_of(claim) not in (LOSS, *spec.metrics)]
    if not asked or not (folder.table.exists() and folder.scores.exists()):
        return
    columns = Columns(spec, *map(table.read_parquet, (folder.table, folder.scores)))
    for claim in asked:
        if columns.lacks(metric := spec.metric_of(claim)):
            there = nearest(metric, columns.known)
            raise UserError(f"claim {claim.name!r}: no run in {folder} has a score {metric!r}; {there}")


def _read_saved(folder: StudyFolder) -> dict[str, Any] | None:
    if not folder.study.exists():
        return None
    remedy = "put it back, or give another --workdir"
    saved: dict[str, Any] = files.read_json(folder.study, dict, remedy)
    registered = saved.get("registered")
    if not isinstance(registered, dict) or any(type(done) is not int for done in registered.values()):
        raise UserError(f"{folder.study} is damaged: its claims are missing; {remedy}")
    return saved


class _Runner:
    """The work of one start: which runs are left, doing them, and keeping the tables."""

    def __init__(self, spec: StudySpec, folder: StudyFolder, members: Sequence[Member] | None = None) -> None:
        self._spec, self._folder = spec, folder
        self._members = chosen = spec.members if members is None else members
        asked = {member.name for member in chosen} | {member.base for member in chosen}
        # Asked once, and of a member after its run: a remote store answers slowly.
        runs = [(member, seed) for member in spec.members if member.name in asked for seed in spec.seeds]
        found = _first_sees([table.status_of(spec, folder, member, seed) for member, seed in runs])
        self._status = {(member.name, seed): one for (member, seed), one in zip(runs, found, strict=True)}
        # Rows of runs that are over: they are read once.
        self._over: dict[tuple[str, int], tuple[list[Row], list[Row], list[Row]]] = {}
        # Claims that a line was printed about.
        self._said: set[str] = set()
        self._progress = _Progress(spec, chosen, self._is_over)

    def finished(self) -> int:
        """How many runs are over."""
        return sum(status in (DONE, STOPPED) for status in self._status.values())

    def check(self) -> None:
        """Makes sure that what is left can be trained and scored; raises UserError as `member_runs.check`."""
        member_runs.check(self._spec, (member for member in self._members if self._left(member)))

    def work(self) -> None:
        """Trains and evaluates what is left, and writes the tables after each run."""
        for member in self._spec.members:
            self.work_on(member, lambda: self.study({}))
        self.study({})

    def work_on(self, member: Member, after_each: Callable[[], object] = lambda: None) -> None:
        """Trains and evaluates what is left of a member."""
        spec, folder = self._spec, self._folder
        left = self._left(member)
        for seed in left:
            self._progress.begin(member, seed)
            base_stopped = bool(member.base) and self._status[member.base, seed] == STOPPED
            member_runs.finish(spec, folder, member, seed, base_stopped=base_stopped)
            self._ask(member, seed)
            self._progress.end(member)
            after_each()
        for seed in spec.seeds:
            # A start may have been killed before it wrote them.
            if seed in left or not curves.place(folder, member, seed).exists():
                curves.write(spec, folder, member, seed)
        if left:
            # Programs of one member are of no use to the next.
            jax.clear_caches()

    def work_at_once(self, at_once: int, own_code: bool) -> None:
        """Has what is left trained and evaluated by several processes, and writes the tables after each member."""

        def ended(member: Member, seconds: float) -> None:
            runs = len(self._left(member))
            for seed in self._spec.seeds:
                self._ask(member, seed)
            self._progress.end(member, runs, seconds / at_once)
            self.study({})
            self._progress.ended(member)

        # Beside members with runs left, those of which a killed start left no curves.
        waiting = [
            member
            for member in self._spec.members
            if self._left(member)
            or not all(curves.place(self._folder, member, seed).exists() for seed in self._spec.seeds)
        ]
        members_at_once.run(waiting, self._folder, at_once, ended, own_code=own_code)

    def _left(self, member: Member) -> list[int]:
        """The seeds of which something is left to do."""
        return [seed for seed in self._spec.seeds if not self._is_over(member, seed)]

    def _ask(self, member: Member, seed: int) -> None:
        (now,) = _first_sees([table.status_of(self._spec, self._folder, member, seed)])
        self._status[member.name, seed] = now

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
        made = Study(spec, folder, rows, measured, scores, registered)
        self._say_unknown(made)
        return made

    def _say_unknown(self, made: Study) -> None:
        """Prints a line for each claim about a score that runs turn out not to have, once: it will not be answered."""
        for claim in made.spec.claims:
            metric = made.spec.metric_of(claim)
            if claim.name in self._said or not made.columns.lacks(made.columns.named(metric)):
                continue
            self._said.add(claim.name)
            if jax.process_index() == 0:
                there = nearest(metric, made.columns.known)
                line = f"claim {claim.name!r}: no run has a score {metric!r}; {there}"
                print(f"scaling-dit: study: {printable(line)}", file=sys.stderr, flush=True)

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


def _first_sees(statuses: list[str]) -> list[str]:
    """The statuses of runs that process 0 found, in all processes: it writes, so another may have looked too early."""
    found: list[str] = json.loads(processes.gather_bytes(json.dumps(statuses).encode())[0])
    return found


class _Progress:
    """Prints which run of how many begins, and when all will have ended.

    The rest is estimated from the training FLOPs that are left, at the mean rate of this start's runs of each family,
    or of all where a family has none yet.

    Args:
      members: those that this process works on.
    """

    def __init__(
        self,
        spec: StudySpec,
        members: Sequence[Member],
        is_over: Callable[[Member, int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._members, self._is_over, self._clock = spec, members, is_over, clock
        self._spent: dict[str, list[float]] = {}
        self._flops: dict[str, int] = {}
        self._began = clock()

    @property
    def _left(self) -> list[Member]:
        """The member of each run that is not over."""
        return [m for m in self._members for seed in self._spec.seeds if not self._is_over(m, seed)]

    @property
    def _total(self) -> int:
        return len(self._members) * len(self._spec.seeds)

    def begin(self, member: Member, seed: int) -> None:
        """Prints a line before a run."""
        left = self._left
        self._began = self._clock()
        self._say(f"run {self._total - len(left) + 1} of {self._total}: {member.name}, seed {seed}", left)

    def end(self, member: Member, runs: int = 1, seconds: float | None = None) -> None:
        """Notes how long some runs took; without `seconds`, the one that began last."""
        family = str(member.config.backbone.name)
        spent = self._spent.setdefault(family, [0.0, 0.0])
        spent[0] += runs * self._flops_of(member)
        spent[1] += self._clock() - self._began if seconds is None else seconds

    def ended(self, member: Member) -> None:
        """Prints a line after all runs of a member."""
        left = self._left
        self._say(f"{self._total - len(left)} of {self._total} runs are over, {member.name} is", left)

    def _say(self, what: str, left: Sequence[Member]) -> None:
        if jax.process_index() == 0:
            print(f"scaling-dit: study: {what}; {self.eta_text(left)}", file=sys.stderr, flush=True)

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
            self._flops_of(member) / rates.get(str(member.config.backbone.name), flops / seconds)
            for member in left
        )

    def _flops_of(self, member: Member) -> int:
        """Training FLOPs of a run, looked up once a member: each look writes its config out to find it."""
        if member.name not in self._flops:
            self._flops[member.name] = ladder.cost(member.config).train_flops()
        return self._flops[member.name]

"""The verbs of `scaling-dit tpu`."""

import contextlib
import dataclasses
import getpass
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

from scaling_dit.cli.exit_codes import INTERRUPTED
from scaling_dit.cli.options import flag, group
from scaling_dit.cli.verb import Verb
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import COUNT, FROM_0, POSITIVE
from scaling_dit.parallel import topologies

from . import backends, checks, commands, inventory, launcher, remote, store
from . import job as job_lib
from .commands import shown
from .job import LIST_PRICE, Budget, Job
from .launcher import Launcher
from .observations import Phase
from .rehearse import rehearse
from .state import ENDS, Limits, Stage, State
from .store import Store

# Replaced by tests: they have another gcloud, other times and another planner.
RUN = commands.run
SLEEP = time.sleep
LIMITS = Limits()
PLAN = checks.plan


def startup_script(job: Job) -> str:
    """The script that machines run when they start: the switch that ends them when nobody else does."""
    return ""


class TpuVerb(Verb):
    """A verb of `scaling-dit tpu`."""

    @classmethod
    def name(cls) -> str:
        """Two words."""
        return f"tpu {cls.__name__.lower()}"

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """As every verb's; a flag's name may be typed with hyphens too, such as --dry-run."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        return super().parse([*map(_underscores, arguments[:end]), *arguments[end:]])


def _underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    plain = re.fullmatch(r"--[a-z]+(-[a-z]+)+", name)
    return "--" + name[2:].replace("-", "_") + equals + value if plain else argument


def name_flag() -> Any:
    """The flag of the verbs that work on a known job."""
    return flag("name of the job", required=True)


def dry_flag() -> Any:
    """The flag of the verbs that do something."""
    return flag("print the commands, and do nothing else", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Flags that describe a job's resource and what it may use."""

    topology: str = flag("slice such as v5e:4x8 or v5p:4x4x4", required=True)
    zones: tuple[str, ...] = flag("zones to try, in this order, separated by commas", required=True)
    hours: float = flag(
        "budget: hours of the running slice, all restarts together", None, POSITIVE, required=True
    )
    dollars: float = flag("budget: US dollars, all restarts together; 0 = hours alone", 0.0, FROM_0)
    restarts: int = flag("budget: restarts after preemptions and failures", 20, FROM_0)
    price: float | None = flag(
        "US dollars of a chip-hour; by default a rough list price of 2025", None, POSITIVE
    )
    slices: int = flag("equal slices joined by the data-centre network", 1, COUNT)
    backend: Literal["queued", "compute"] = flag("queued resources, or Compute Engine's groups", "queued")
    capacity: Literal["spot", "on-demand", "reserved", "best-effort", "flex-start"] = flag(
        "how the machines are paid for", "spot"
    )
    reservation: str = flag("name of the reservation, for --capacity=reserved", "")
    project: str = flag("Google Cloud project; gcloud's default without it", "")
    study: str = flag("label: the study that the job belongs to", "")
    owner: str | None = flag("label: whose job it is; your user name without it")
    runtime: str = flag("image of the machines; the generation's own without it", "")
    network: str = flag("network of the machines", "")
    subnetwork: str = flag("subnetwork of the machines", "")
    service_account: str = flag("service account of the machines", "")
    internal: bool = flag("machines have no external addresses", False)
    patience: float = flag("hours to wait for capacity in one zone while there are others", 2.0, POSITIVE)
    source: str = flag("folder that is copied to the workers and installed there, such as .", "")
    setup: str = flag(
        "file with the shell script that prepares a worker; by default it installs scaling-dit", ""
    )
    env: tuple[str, ...] = flag("NAME=VALUE for the job; repeat it", (), repeat=True)
    secret: tuple[str, ...] = flag(
        "NAME of a variable of yours that the job gets, as a file that no log shows; repeat it",
        (),
        repeat=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Starts(TpuVerb):
    """What `launch` and `create` share."""

    ARGUMENTS = "[-- COMMAND ...]"
    OVERRIDES = True

    name_: str = flag("name of the job and of its resource", required=True)
    config: str | None = flag(
        "experiment that is trained: a name, or a path in --source; both take :ARGUMENT"
    )
    workdir: str = flag("folder of the run, on gs:// if there are several workers", "")
    resources: Resources = group(Resources)
    force: bool = flag("launch although the plan, the quota or a region speaks against it", False)
    poll: float = flag("seconds between two looks at the job", 60.0, POSITIVE)
    dry_run: bool = dry_flag()

    def job(self) -> Job:
        """The job of these flags."""
        given = self.resources
        price, source = given.price, "given by --price"
        if price is None:
            chip = topologies.parse(given.topology).chip
            price, source = (chip.price if chip else 0.0), LIST_PRICE
        return Job(
            name=self.name_,
            topology=given.topology,
            zones=given.zones,
            command=self._command(),
            budget=Budget(given.hours, given.dollars, given.restarts),
            slices=given.slices,
            backend=given.backend,
            capacity=given.capacity,
            price=price,
            price_source=source if price else "",
            project=given.project,
            study=given.study,
            owner=_label(getpass.getuser()) if given.owner is None else given.owner,
            reservation=given.reservation,
            runtime=given.runtime,
            network=given.network,
            subnetwork=given.subnetwork,
            service_account=given.service_account,
            internal=given.internal,
            source=given.source and os.path.abspath(os.path.expanduser(given.source)),
            setup=_read(given.setup),
            environment=dict(map(_pair, given.env)),
            secrets=given.secret,
            workdir=self.workdir,
            patience=given.patience,
        )

    def _command(self) -> tuple[str, ...]:
        if self.arguments:
            if self.config or self.overrides:
                raise UserError(
                    "a command after -- is run as it is: leave out --config and --config.KEY=VALUE"
                )
            return self.arguments
        if not self.config or not self.workdir:
            raise UserError(
                f"{self.name()} needs --config and --workdir, or a command after --; {self.EXAMPLE}"
            )
        slices = (f"--config.mesh.slices={self.resources.slices}",) if self.resources.slices > 1 else ()
        where = (f"--config={self.config}", f"--workdir={self.workdir}")
        return ("scaling-dit", "train", *where, *self.overrides, *slices)

    def start(self, until: Stage | None) -> int:
        """Checks the job, takes it over, and watches it until the stage."""
        job = self.job()
        job_lib.check(job)
        backend = backends.get(job)
        if job.workers > 1 and job.workdir and "://" not in job.workdir and not self.force:
            raise UserError(
                f"--workdir={job.workdir}: the {job.workers} workers have separate disks, which end with the slice; "
                "give a folder on gs://, or --force for one that all of them share"
            )
        if self.dry_run:
            rehearse(job, backend, startup_script(job), print)
            return 0
        kept = Store(job.name)
        Launcher(job, kept, RUN, _say).secrets()
        state = kept.read_state()
        if state is None or state.stage in ENDS:
            self._check(job)
        with _alone(kept):
            launcher.begin(job, kept, say=_say)
            if job.source and (state is None or state.stage in ENDS or not kept.source.exists()):
                store.pack(job.source, kept.source)
            return _watch(job, kept, until, self.poll)

    def _check(self, job: Job) -> None:
        """Refuses, unless forced, what would end badly."""
        wrong = checks.regions(job, RUN)
        short, unknown = checks.quota(job, RUN)
        for line in unknown:
            _say(line)
        wrong += short if len(short) == len(job.zones) else []
        for line in short if len(short) < len(job.zones) else []:
            _say(line)
        if self.config and not self.arguments:
            slices = [f"--config.mesh.slices={job.slices}"] if job.slices > 1 else []
            fits, memory = PLAN(self.config, [*self.overrides, *slices], job)
            _say(f"plan of {job.topology}: {memory}")
            if not fits:
                wrong.append(f"the run does not fit {job.topology}: {memory}")
        for line in wrong:
            if not self.force:
                raise UserError(f"{line}; --force launches nevertheless")
            _say(f"--force: {line}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch(_Starts):
    """Asks for a slice, prepares it, trains on it, resumes after preemptions, deletes it."""

    EXAMPLE = (
        "scaling-dit tpu launch --name=first --config=shapes --workdir=gs://bucket/first --topology=v5e:4x4 "
        "--zones=us-west4-a --hours=2 --source=."
    )

    def run(self) -> int:
        """Watches the job to its end; 0 when it is done."""
        return self.start(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Create(_Starts):
    """Asks for a slice and waits until its machines run; they cost until you delete them."""

    EXAMPLE = (
        "scaling-dit tpu create --name=first --config=shapes --workdir=gs://bucket/first --topology=v5e:4x4 "
        "--zones=us-west4-a --hours=2 --source=."
    )

    def run(self) -> int:
        """Ends when the machines run."""
        return self.start(Stage.SETUP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known(TpuVerb):
    """What the verbs share that work on a job of this machine."""

    name_: str = name_flag()
    dry_run: bool = dry_flag()

    def open(self) -> tuple[Job, Store]:
        """The job and its folder."""
        return open_job(self.name_)

    def look(self) -> tuple[Launcher, Job]:
        """A launcher that has looked at the job's resource once, and changes nothing."""
        job, kept = self.open()
        runner = launcher.dry_runner(print) if self.dry_run else RUN
        one = Launcher(job, kept, runner, _say)
        one.state = kept.read_state() or State()
        if not self.dry_run:
            one.resource = backends.get(job).observe(job, one.zone, RUN)
            if one.resource.phase not in (Phase.READY, Phase.SICK):
                raise UserError(
                    f"{job.name} in {one.zone}: {one.resource.phase.value}; there are no workers to reach"
                )
        else:
            one.resource = dataclasses.replace(one.resource, nodes=node_names(job))
        return one, job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(_Known):
    """Prepares the workers of a created slice."""

    EXAMPLE = "scaling-dit tpu setup --name=first"

    def run(self) -> int:
        """Runs the set-up on all workers."""
        one, job = self.look()
        for several in one.preparation(one.zone, one.stamp() if not self.dry_run else "STAMP"):
            for result in commands.run_all(one._runner, several):
                sys.stdout.write(result.out)
                if result.code:
                    raise UserError(f"the set-up of {job.name} failed: {result.reason}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Known):
    """Starts the job on prepared workers and leaves it alone; `babysit` watches it."""

    EXAMPLE = "scaling-dit tpu run --name=first"

    def run(self) -> int:
        """Starts the job."""
        one, job = self.look()
        attempt = one.state.attempt + 1
        if not self.dry_run:
            changed = {"stage": Stage.RUN, "attempt": attempt, "machines": one.resource.machines, "out": True}
            one.store.write_state(dataclasses.replace(one.state, **changes(changed)))
        results = one.on_workers(remote.start(job, attempt), 120.0)
        bad = [result for result in results if result.code]
        if bad:
            raise UserError(f"{job.name} could not be started on all workers: {bad[0].reason}")
        if not self.dry_run:
            _say(one.what_runs())
        return 0


def changes(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of mixed types."""
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babysit(_Known):
    """Watches a job that was launched, created or left: resumes it and deletes its slice."""

    EXAMPLE = "scaling-dit tpu babysit --name=first"

    poll: float = flag("seconds between two looks at the job", 60.0, POSITIVE)

    def run(self) -> int:
        """Watches the job to its end; 0 when it is done."""
        job, kept = self.open()
        if self.dry_run:
            rehearse(job, backends.get(job), startup_script(job), print)
            return 0
        state = kept.read_state()
        if state is not None and state.stage in ENDS:
            raise UserError(f"{job.name} has ended: {state.verdict}; launch it again to go on")
        with _alone(kept):
            return _watch(job, kept, None, self.poll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(_Known):
    """Shows a job in one screen: its resource, its workers, what it used."""

    EXAMPLE = "scaling-dit tpu status --name=first"

    def run(self) -> int:
        """Prints it."""
        job, kept = self.open()
        runner = launcher.dry_runner(print) if self.dry_run else RUN
        one = Launcher(job, kept, runner, print)
        one.state = state = kept.read_state() or State()
        backend = backends.get(job)
        if self.dry_run:
            print(shown(backend.describe(job, one.zone)))
            for command in backend.on_workers(job, one.zone, node_names(job), remote.status(job)):
                print(shown(command))
            return 0
        one.resource = resource = backend.observe(job, one.zone, RUN)
        detail = f" ({resource.detail})" if resource.detail else ""
        slices = f"{job.slices} x " if job.slices > 1 else ""
        print(f"{job.name}: {state.stage.value}" + (f"; {state.verdict}" if state.verdict else ""))
        print(f"  slice     {slices}{job.topology}, {job.workers} workers, {job.capacity}, {job.backend}")
        print(f"  resource  {one.zone}: {resource.phase.value}{detail}")
        budget = f"{job.hours:g} h, {job.budget.restarts} restarts"
        print(f"  used      {job.cost(state.used)} of {budget}; restarts {state.restarts}")
        if resource.phase in (Phase.READY, Phase.SICK):
            results = one.on_workers(remote.status(job), 120.0)
            workers = remote.read_status("\n".join(result.out for result in results))
            for worker in workers:
                code = f", exit code {worker.code}" if worker.code is not None else ""
                step = f", step {worker.step}" if worker.step >= 0 else ""
                print(f"  worker    {worker.name}: attempt {worker.attempt}: {worker.work.value}{code}{step}")
            if len(workers) < job.workers:
                print(f"  worker    {job.workers - len(workers)} of {job.workers} did not answer")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs(_Known):
    """Prints the job's output on one worker."""

    EXAMPLE = "scaling-dit tpu logs --name=first --follow"

    worker: int = flag("worker, counted over all slices", 0, FROM_0)
    lines: int = flag("lines from the end", 100, COUNT)
    follow: bool = flag("go on as the job writes", False)

    def run(self) -> int:
        """Prints them; with --follow it becomes the command, until Ctrl-C."""
        one, job = self.look()
        worker = _worker(job, self.worker)
        text = remote.logs(job, self.lines, self.follow)
        command = backends.get(job).on_worker(job, one.zone, one.resource.nodes, worker, text)
        return _show(command, self.dry_run, stay=self.follow)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensorboard(_Known):
    """Serves TensorBoard of the job on this machine, from the bucket or through a tunnel."""

    EXAMPLE = "scaling-dit tpu tensorboard --name=first"

    port: int = flag("port on this machine and, through a tunnel, on the worker", 6006, COUNT)

    def run(self) -> int:
        """Becomes the command, until Ctrl-C."""
        job, _ = self.open()
        if not job.workdir:
            raise UserError(f"{job.name} was launched with a command of its own and without --workdir")
        if "://" in job.workdir:
            local = ("tensorboard", f"--logdir={job.workdir}", f"--port={self.port}")
            return _show(local, self.dry_run, stay=True)
        one, job = self.look()
        tunnel = (f"-L {self.port}:localhost:{self.port}",)
        text = remote.tensorboard(job, self.port)
        command = backends.get(job).on_worker(job, one.zone, one.resource.nodes, 0, text, tunnel)
        return _show(command, self.dry_run, stay=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delete(_Known):
    """Ends a job: has it save, deletes its slice, and waits until it is gone."""

    EXAMPLE = "scaling-dit tpu delete --name=first"

    poll: float = flag("seconds between two looks at the resource", 15.0, POSITIVE)

    def run(self) -> int:
        """0 when nothing runs any more."""
        job, kept = self.open()
        state = kept.read_state() or State()
        if self.dry_run:
            for command in backends.get(job).delete(job, job.zones[state.zone], state.resources):
                print(shown(command))
            return 0
        kept.ask_to_stop()
        with kept.locked() as alone:
            if not alone:
                return self._wait(job, kept)
            if state.stage in ENDS:
                # A suspended resource, or one that was made since.
                kept.write_state(dataclasses.replace(state, stage=Stage.FIND, out=False))
            return INTERRUPTED if _watch(job, kept, None, self.poll) == INTERRUPTED else 0

    def _wait(self, job: Job, kept: Store) -> int:
        """Waits while another launcher ends the job."""
        _say(f"{job.name}: its launcher was asked to end it")
        while True:
            state = kept.read_state()
            if state is not None and state.stage in ENDS:
                return 0
            SLEEP(self.poll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drill(_Known):
    """Takes a worker away on purpose, to see the job recover."""

    EXAMPLE = "scaling-dit tpu drill --name=first --event=kill --worker=1"

    event: Literal["maintenance", "kill"] = flag(
        "a maintenance event, or the job's process killed", "maintenance"
    )
    worker: int = flag("worker, counted over all slices", 0, FROM_0)

    def run(self) -> int:
        """Does it."""
        one, job = self.look()
        worker, backend, nodes = _worker(job, self.worker), backends.get(job), one.resource.nodes
        if self.event == "maintenance":
            command = backend.maintain(job, one.zone, nodes, worker)
        else:
            command = backend.on_worker(job, one.zone, nodes, worker, remote.kill(job))
        return _show(command, self.dry_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(TpuVerb):
    """Lists everything of ours in some zones: state, age, cost so far, owner, study."""

    EXAMPLE = "scaling-dit tpu list --zones=us-east5-a,us-west4-a"

    zones: tuple[str, ...] | None = flag(
        "zones, separated by commas; by default those of the jobs known here"
    )
    project: str = flag("Google Cloud project; gcloud's default without it", "")
    price: float | None = flag(
        "US dollars of a chip-hour; by default a rough list price of 2025", None, POSITIVE
    )
    dry_run: bool = dry_flag()

    def run(self) -> int:
        """Prints the table; 1 if a zone could not be asked."""
        zones = _zones(self.zones)
        if self.dry_run:
            for _, _, command in inventory.commands(self.project, zones):
                print(shown(command))
            return 0
        found, failed = inventory.rows(self.project, zones, RUN)
        print(inventory.table(found, self.price))
        for line in failed:
            _say(f"could not be asked: {line}")
        return 1 if failed else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(TpuVerb):
    """Deletes leftovers that hold quota, or whose time is over; without --yes it shows them."""

    EXAMPLE = "scaling-dit tpu sweep --zones=us-east5-a --yes"

    zones: tuple[str, ...] | None = flag(
        "zones, separated by commas; by default those of the jobs known here"
    )
    project: str = flag("Google Cloud project; gcloud's default without it", "")
    owner: str | None = flag("only of this owner; your user name without it")
    all: bool = flag("of all owners", False)
    yes: bool = flag("delete them", False)
    dry_run: bool = dry_flag()

    def run(self) -> int:
        """Prints what is deleted, or would be; 1 if something could not be asked or deleted."""
        zones = _zones(self.zones)
        if self.dry_run:
            for _, _, command in inventory.commands(self.project, zones):
                print(shown(command))
            print("# and for each leftover that they list, its deletion")
            return 0
        owner = _label(getpass.getuser()) if self.owner is None else self.owner
        found, failed = inventory.rows(self.project, zones, RUN)
        now = time.time()
        for row in found:
            why = inventory.leftover(row, now)
            if not why or not (self.all or row.labels.get(job_lib.OWNER, "") == owner):
                continue
            print(f"{row.name} in {row.zone}: {why}")
            for command in backends.BACKENDS[row.backend].delete_row(row, self.project):
                print(f"  {shown(command)}")
                result = RUN(command) if self.yes else commands.Result(0)
                if result.code:
                    failed.append(f"{row.name} in {row.zone}: {result.reason}")
        for line in failed:
            _say(f"failed: {line}")
        return 1 if failed else 0


_TABLE: tuple[type[TpuVerb], ...] = (
    Launch, Create, Status, Setup, Run, Logs, Tensorboard, Babysit, Delete, List, Sweep, Drill,
)  # fmt: skip
VERBS: dict[str, type[Verb]] = {verb.__name__.lower(): verb for verb in _TABLE}


def open_job(name: str) -> tuple[Job, Store]:
    """A job that was launched from this machine.

    Raises:
      UserError: there is none of that name.
    """
    kept = Store(name)
    job = kept.read_job() if re.fullmatch(r"[a-z][-a-z0-9]*", name) else None
    if job is None:
        known = store.names()
        hint = nearest(name, known) if known else "none was launched from here"
        raise UserError(
            f"--name={name}: no such job on this machine; {hint} (tpu list shows those of other machines)"
        )
    return job, kept


def node_names(job: Job) -> tuple[str, ...]:
    """Names of nodes for commands that are only shown: a group's VMs get theirs when they are made."""
    if job.backend == "compute":
        return tuple(f"{job.name}-VM{index}" for index in range(job.hosts))
    return (job.name,) if job.slices == 1 else tuple(f"{job.name}-{index}" for index in range(job.slices))


@contextlib.contextmanager
def _alone(kept: Store) -> Iterator[None]:
    with kept.locked() as alone:
        if not alone:
            raise UserError(f"{kept.folder.name} is watched by another launcher on this machine")
        yield


def _watch(job: Job, kept: Store, until: Stage | None, poll: float) -> int:
    """Watches a job; Ctrl-C says what still runs."""
    one = Launcher(job, kept, RUN, _say, dataclasses.replace(LIMITS, poll=poll), startup=startup_script)
    try:
        one.watch(SLEEP, until)
    except KeyboardInterrupt:
        _say(f"interrupted. {one.what_runs()}")
        return INTERRUPTED
    except BaseException:
        _say(one.what_runs())
        raise
    if one.state.stage in ENDS:
        return launcher.exit_code(one.state)
    _say(one.what_runs())
    return 0


def _say(line: str) -> None:
    print(f"scaling-dit: {line}", file=sys.stderr, flush=True)


def _show(command: commands.Command, dry_run: bool, *, stay: bool = False) -> int:
    """Prints a command, becomes it, or runs it and prints what it says."""
    if dry_run:
        print(shown(command))
        return 0
    if stay:
        commands.replace_process(command)
    result = RUN(command)
    sys.stdout.write(result.out)
    if result.code:
        raise UserError(f"{shown(command)}: {result.reason}")
    return 0


def _worker(job: Job, worker: int) -> int:
    if worker >= job.workers:
        raise UserError(f"--worker={worker}: {job.name} has workers 0 to {job.workers - 1}")
    return worker


def _zones(given: tuple[str, ...] | None) -> tuple[str, ...]:
    if given:
        return given
    jobs = filter(None, (Store(name).read_job() for name in store.names()))
    zones = tuple(dict.fromkeys(zone for job in jobs for zone in job.zones))
    if not zones:
        raise UserError(
            "--zones missing: no job was launched from here; give zones such as us-east5-a,us-west4-a"
        )
    return zones


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--env={text}: give NAME=VALUE; or --secret={text} for one of your own variables")
    return name, value


def _read(path: str) -> str:
    if not path:
        return ""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--setup={path}: no such file; give a file with a shell script")
    return file.read_text()


def _label(name: str) -> str:
    """A user's name as a label may have it."""
    return re.sub(r"[^a-z0-9_-]", "-", name.lower())[:63]

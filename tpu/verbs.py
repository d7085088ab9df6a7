"""The verbs of `scaling-dit tpu`."""

import dataclasses
import getpass
import re
import sys
import time
from typing import Literal

from scaling_dit.cli.exit_codes import INTERRUPTED
from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import COUNT, FROM_0, POSITIVE

from . import backends, commands, inventory, launcher, outside, remote, store
from . import job as job_lib
from .commands import shown
from .job import Job
from .launcher import Launcher
from .observations import Answer, Phase, Work
from .queue_verb import Queue
from .rehearse import node_names, rehearse
from .starting import Create, Launch, TpuVerb, dry_flag, name_flag
from .state import ENDS, Stage, State
from .store import Store


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
        runner = launcher.dry_runner(print) if self.dry_run else outside.RUN
        one = Launcher(job, kept, runner, outside.say)
        one.state = kept.read_state() or State()
        if not self.dry_run:
            one.resource = backends.get(job).observe(job, one.zone, outside.RUN)
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
        if self.dry_run:
            for several in one.preparation(one.zone, "STAMP"):
                commands.run_all(one.runner, several)
            return 0
        answered, reason = one.set_up(one.zone)
        if answered is not Answer.OK:
            raise UserError(f"the set-up of {job.name} failed: {reason}")
        outside.say(f"{job.name}: all {job.workers} workers are prepared")
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
            machines = one.resource.machines
            one.store.write_state(
                dataclasses.replace(one.state, stage=Stage.RUN, attempt=attempt, machines=machines, out=True)
            )
        results = one.on_workers(remote.start(job, attempt), 120.0)
        if self.dry_run:
            return 0
        bad = [result for result in results if result.code]
        one.state = dataclasses.replace(one.state, attempt=attempt, out=True, billed=True)
        work = one.ask_workers().work
        if bad or work in (Work.SILENT, Work.NONE):
            raise UserError(
                f"{job.name} was not started on all workers: {bad[0].reason if bad else work.value}; "
                f"`tpu babysit --name={job.name}` starts it again, `tpu delete` ends it"
            )
        outside.say(one.what_runs())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babysit(_Known):
    """Watches a job that was launched, created or left: resumes it and deletes its slice."""

    EXAMPLE = "scaling-dit tpu babysit --name=first"

    poll: float = flag("seconds between two looks at the job", 60.0, POSITIVE)

    def run(self) -> int:
        """Watches the job to its end; 0 when it is done."""
        job, kept = self.open()
        if self.dry_run:
            rehearse(job, backends.get(job), outside.STARTUP(job, job.zones[0]), print)
            return 0
        state = kept.read_state()
        if state is not None and state.stage in ENDS:
            raise UserError(f"{job.name} has ended: {state.verdict}; launch it again to resume")
        with outside.alone(kept):
            return outside.watch(job, kept, None, self.poll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(_Known):
    """Shows a job in one screen: its resource, its workers, what it used."""

    EXAMPLE = "scaling-dit tpu status --name=first"

    def run(self) -> int:
        """Prints it."""
        job, kept = self.open()
        runner = launcher.dry_runner(print) if self.dry_run else outside.RUN
        one = Launcher(job, kept, runner, print)
        one.state = state = kept.read_state() or State()
        backend = backends.get(job)
        if self.dry_run:
            print(shown(backend.describe(job, one.zone)))
            for command in backend.on_workers(job, one.zone, node_names(job), remote.status(job)):
                print(shown(command))
            return 0
        one.resource = resource = backend.observe(job, one.zone, outside.RUN)
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
        if "://" in job.workdir:
            # Other workdirs lie on the workers' disks. Only now, since the package's paths load slowly.
            from . import screen

            try:
                print(screen.read(job.workdir))
            except UserError as error:
                print(error)
            except Exception as error:
                # Whatever a store raises: the screen above stands without it.
                print(f"{job.workdir} cannot be read from here: {str(error).strip().partition(chr(10))[0]}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs(_Known):
    """Prints the job's output on one worker."""

    EXAMPLE = "scaling-dit tpu logs --name=first --follow"

    worker: int = flag("worker, counted over all slices", 0, FROM_0)
    lines: int = flag("lines from the end", 100, COUNT)
    follow: bool = flag("continue to print as the job writes", False)

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
            return INTERRUPTED if outside.watch(job, kept, None, self.poll) == INTERRUPTED else 0

    def _wait(self, job: Job, kept: Store) -> int:
        """Waits while another launcher ends the job."""
        outside.say(f"{job.name}: its launcher was asked to end it")
        while True:
            state = kept.read_state()
            if state is not None and state.stage in ENDS:
                return 0
            outside.SLEEP(self.poll)


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
        found, failed = inventory.rows(self.project, zones, outside.RUN)
        print(inventory.table(found, self.price))
        for line in failed:
            outside.say(f"could not be asked: {line}")
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
        owner = outside.label(getpass.getuser()) if self.owner is None else self.owner
        found, failed = inventory.rows(self.project, zones, outside.RUN)
        now = time.time()
        for row in found:
            why = inventory.leftover(row, now)
            if not why or not (self.all or row.labels.get(job_lib.OWNER, "") == owner):
                continue
            print(f"{row.name} in {row.zone}: {why}")
            for command in backends.BACKENDS[row.backend].delete_row(row, self.project):
                print(f"  {shown(command)}")
                result = outside.RUN(command) if self.yes else commands.Result(0)
                if result.code:
                    failed.append(f"{row.name} in {row.zone}: {result.reason}")
        for line in failed:
            outside.say(f"failed: {line}")
        return 1 if failed else 0


_TABLE: tuple[type[TpuVerb], ...] = (
    Launch, Create, Status, Setup, Run, Logs, Tensorboard, Babysit, Delete, List, Sweep, Queue,
    Drill,
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


def _show(command: commands.Command, dry_run: bool, *, stay: bool = False) -> int:
    """Prints a command, becomes it, or runs it and prints what it says."""
    if dry_run:
        print(shown(command))
        return 0
    if stay:
        commands.replace_process(command)
    result = outside.RUN(command)
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

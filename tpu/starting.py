"""The verbs that begin a job, `launch` and `create`, and the flags that describe one."""

import dataclasses
import getpass
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal, Self

from scaling_dit import files
from scaling_dit.cli.options import flag, group
from scaling_dit.cli.verb import Verb
from scaling_dit.errors import UserError
from scaling_dit.fields import COUNT, FROM_0, POSITIVE
from scaling_dit.parallel import topologies

from . import backends, checks, launcher, outside, store
from . import job as job_lib
from .commands import redact
from .job import LIST_PRICE, Budget, Job
from .launcher import Launcher
from .rehearse import rehearse
from .state import ENDS, Stage
from .store import Store


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
        after = tuple(arguments[end + 1 :])
        verb = super().parse([*map(_underscores, arguments[:end])])
        runs_command = cls.ARGUMENTS.startswith("[--")
        if verb.arguments and runs_command:
            raise UserError(
                f"{cls.name()}: {verb.arguments[0]!r} is no flag; a command for the workers follows --"
            )
        if after and not runs_command:
            raise UserError(f"{cls.name()} takes no command after --; see scaling-dit {cls.name()} --help")
        if not runs_command:
            return verb
        # Everything after -- is the user's own, also what looks like a flag of this verb.
        return dataclasses.replace(verb, arguments=after)


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
    quiet_minutes: float = flag(
        "minutes without a heartbeat after which the machines delete themselves", 30.0, POSITIVE
    )
    source: str = flag("folder that is copied to the workers and installed there, such as .", "", path=True)
    setup: str = flag(
        "file with the shell script that prepares a worker; by default it installs scaling-dit", "", path=True
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
            owner=outside.label(getpass.getuser()) if given.owner is None else given.owner,
            reservation=given.reservation,
            runtime=given.runtime,
            network=given.network,
            subnetwork=given.subnetwork,
            service_account=given.service_account,
            internal=given.internal,
            source=given.source and os.path.abspath(given.source),
            setup=_read(given.setup),
            environment=dict(map(_pair, given.env)),
            secrets=given.secret,
            workdir=self.workdir,
            patience=given.patience,
            quiet_minutes=given.quiet_minutes,
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
        files.check_known(job.workdir, "--workdir=")
        if job.workers > 1 and job.workdir and "://" not in job.workdir and not self.force:
            raise UserError(
                f"--workdir={job.workdir}: the {job.workers} workers have separate disks, which end with the slice; "
                "give a folder on gs://, or --force for one that all of them share"
            )
        if self.dry_run:
            values = [os.environ.get(name, "") for name in job.secrets]
            rehearse(
                job, backend, outside.STARTUP(job, job.zones[0]), lambda line: print(redact(line, values))
            )
            return 0
        kept = Store(job.name)
        Launcher(job, kept, outside.RUN, outside.say).secrets()
        state = kept.read_state()
        if state is None or state.stage in ENDS:
            self._check(job)
        with outside.alone(kept):
            launcher.begin(job, kept, say=outside.say)
            if job.source and (state is None or state.stage in ENDS or not kept.source.exists()):
                store.pack(job.source, kept.source)
            return outside.watch(job, kept, until, self.poll)

    def _check(self, job: Job) -> None:
        """Refuses, unless forced, what would end badly."""
        wrong = checks.regions(job, outside.RUN)
        short, unknown = checks.quota(job, outside.RUN)
        for line in unknown:
            outside.say(line)
        wrong += short if len(short) == len(job.zones) else []
        for line in short if len(short) < len(job.zones) else []:
            outside.say(line)
        if self.config and not self.arguments:
            slices = [f"--config.mesh.slices={job.slices}"] if job.slices > 1 else []
            fits, memory = outside.PLAN(self.config, [*self.overrides, *slices], job)
            outside.say(f"plan of {job.topology}: {memory}")
            if not fits:
                wrong.append(f"the run does not fit {job.topology}: {memory}")
        for line in wrong:
            if not self.force:
                raise UserError(f"{line}; --force launches nevertheless")
            outside.say(f"--force: {line}")


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


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--env={text}: give NAME=VALUE; or --secret={text} for one of your own variables")
    return name, value


def _read(path: str) -> str:
    if not path:
        return ""
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--setup={path}: no such file; give a file with a shell script")
    try:
        return file.read_text(encoding="utf-8")
    except ValueError:
        raise UserError(f"--setup={path}: not UTF-8, and must be a shell script") from None

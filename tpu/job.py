"""A job: the slice it runs on, where, for how much, and what its workers do."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from scaling_dit import files
from scaling_dit.errors import UserError, nearest
from scaling_dit.parallel import topologies
from scaling_dit.parallel.topologies import Topology

BACKEND_NAMES = ("queued", "compute")
CAPACITIES = ("spot", "on-demand", "reserved", "best-effort", "flex-start")
# What costs rest on where the user gives no price; see `parallel/topologies.py`.
LIST_PRICE = "a rough on-demand list price of 2025 that nobody verified (--price gives yours)"
# Labels of everything that belongs to a job; `list` and `sweep` find them by the first.
JOB, STUDY, OWNER, EXPIRES = (f"scaling-dit-{word}" for word in ("job", "study", "owner", "expires"))
# Names of templates and policies add up to 22 characters, and Google Cloud takes 63.
_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|PRIVATE", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a job may use, over all resources that it is given.

    Attributes:
      hours: of a running slice.
      dollars: at the price of `Job.price`; 0 = no limit.
      restarts: after preemptions and failures.
    """

    hours: float
    dollars: float = 0.0
    restarts: int = 20


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as the user asked for it.

    Attributes:
      name: of the job and of its resource.
      topology: such as "v5e:4x8".
      slices: equal slices joined by the data-centre network.
      zones: tried in this order.
      backend: "queued" (queued resources) or "compute" (Compute Engine).
      capacity: how the machines are paid for.
      command: what every worker runs, word by word.
      budget: see `Budget`.
      price: US dollars of a chip-hour; 0 = not known.
      price_source: where the price comes from, in words.
      project: of Google Cloud; "" = gcloud's default.
      study, owner: labels.
      reservation: its name, for capacity "reserved".
      runtime: image of the machines; "" = the generation's own.
      network, subnetwork, service_account: of the machines; "" = Google Cloud's defaults.
      internal: machines have no external addresses, and are reached inside the network.
      source: local folder that is copied to the workers; "" = none.
      setup: shell text that prepares a worker.
      environment: variables of the command.
      secrets: names of variables that are read from this machine's environment and copied to the workers as a file.
      workdir: of the run, for TensorBoard.
      patience: hours to wait for capacity in one zone while there are others.
      quiet_minutes: without a heartbeat of the run, after which its machines delete themselves.
    """

    name: str
    topology: str
    zones: tuple[str, ...]
    command: tuple[str, ...]
    budget: Budget
    slices: int = 1
    backend: str = "queued"
    capacity: str = "spot"
    price: float = 0.0
    price_source: str = ""
    project: str = ""
    study: str = ""
    owner: str = ""
    reservation: str = ""
    runtime: str = ""
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    internal: bool = False
    source: str = ""
    setup: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    workdir: str = ""
    patience: float = 2.0
    quiet_minutes: float = 30.0

    @property
    def shape(self) -> Topology:
        """The slice, or slices."""
        return topologies.parse(self.topology, self.slices)

    @property
    def generation(self) -> str:
        """Such as "v5e"."""
        return self.topology.partition(":")[0]

    @property
    def size(self) -> str:
        """The shape of one slice, such as "4x8"."""
        return self.topology.partition(":")[2]

    @property
    def hosts(self) -> int:
        """Workers of one slice."""
        # Cloud TPU gives 2x4 of these as one host with eight chips; Compute Engine as two with four.
        if self.backend == "queued" and self.generation in ("v5e", "v6e") and self.size == "2x4":
            return 1
        return self.shape.hosts // self.slices

    @property
    def workers(self) -> int:
        """Workers of all slices."""
        return self.hosts * self.slices

    @property
    def hourly(self) -> float:
        """US dollars an hour of the running slices; 0 if no price is known."""
        return self.shape.chips * self.price

    def cost(self, seconds: float) -> str:
        """What so many seconds of the running slices cost, in words, and what the figure rests on."""
        if not self.hourly:
            return f"{seconds / 3600:.2f} h of {self.shape.chips} chips (no price is known; give --price)"
        dollars = self.hourly * seconds / 3600
        return f"${dollars:,.2f} ({seconds / 3600:.2f} h x {self.shape.chips} chips at {self.rate})"

    @property
    def rate(self) -> str:
        """The price of a chip-hour, in words, and where it comes from."""
        return f"${self.price:.2f} a chip-hour, {self.price_source}" if self.price else "an unknown price"

    @property
    def hours(self) -> float:
        """Hours that the budget allows: the smaller of its hours and of what its dollars buy."""
        if self.budget.dollars and self.hourly:
            return min(self.budget.hours, self.budget.dollars / self.hourly)
        return self.budget.hours

    def labels(self, expires: int) -> dict[str, str]:
        """Labels of the job's resources; `expires` is in seconds since the epoch."""
        labels = {JOB: self.name, STUDY: self.study, OWNER: self.owner, EXPIRES: str(expires)}
        return {key: value for key, value in labels.items() if value}

    def to_json(self) -> str:
        """The job as text; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """Eight digits that differ for jobs whose machines or commands differ."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]


def from_json(text: str | bytes) -> Job:
    """The job that `Job.to_json` wrote.

    Raises:
      UserError: the text is damaged, or of another version.
    """
    try:
        values: dict[str, Any] = files.parse_json(text)
        values["budget"] = Budget(**values["budget"])
        for name in ("zones", "command", "secrets"):
            values[name] = tuple(values[name])
        return Job(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the job's file cannot be read ({error}); launch it again with all its flags"
        ) from error


def region(zone: str) -> str:
    """The region of a zone: "us-east5" of "us-east5-a"."""
    return zone.rpartition("-")[0]


def check(job: Job) -> None:
    """Raises UserError for a job that Google Cloud would refuse, or that would not be what the user meant."""
    if job.topology == topologies.LOCAL:
        raise UserError("--topology=local: a job needs a slice, such as v5e:4x8")
    # Raises for what is no slice.
    shape = job.shape
    if shape.chip is None or shape.hosts % job.slices:
        raise UserError(
            f"--topology={job.topology}: a job needs whole hosts of a TPU generation, such as v5e:4x8"
        )
    if not _NAME.fullmatch(job.name):
        raise UserError(
            f"--name={job.name}: it must begin with a letter and have up to 40 small letters, digits and hyphens"
        )
    if not job.zones:
        raise UserError("--zones missing: the zones to try, in order, such as us-east5-a,us-east5-b")
    for zone in job.zones:
        if not _ZONE.fullmatch(zone):
            raise UserError(f"--zones: {zone!r} is not a zone; give names such as us-east5-a")
    if len(set(job.zones)) < len(job.zones):
        raise UserError("--zones: a zone stands there twice")
    _check_choice("backend", job.backend, BACKEND_NAMES)
    _check_choice("capacity", job.capacity, CAPACITIES)
    if job.capacity == "reserved" and job.backend == "compute" and not job.reservation:
        raise UserError(
            "--capacity=reserved needs --reservation, the name of the reservation, on Compute Engine"
        )
    if job.reservation and job.capacity != "reserved":
        raise UserError("--reservation goes together with --capacity=reserved")
    if not 0 < job.budget.hours < 24 * 366:
        raise UserError("--hours: it must be more than 0 and less than a year's")
    if job.budget.dollars and not job.hourly:
        raise UserError(
            f"--dollars needs a price: give --price, US dollars for a chip-hour of {job.generation}"
        )
    for key in ("study", "owner"):
        value = getattr(job, key)
        if not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
            raise UserError(
                f"--{key}={value}: a label has up to 63 small letters, digits, hyphens and underscores"
            )
    _check_environment(job)


def _check_choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"--{flag}={value}: {nearest(value, known)}")


def _check_environment(job: Job) -> None:
    for name in (*job.environment, *job.secrets):
        if not _ENV.fullmatch(name):
            raise UserError(f"{name!r} cannot be the name of an environment variable; give --env=NAME=VALUE")
    for name in job.environment:
        if _SECRET.search(name):
            raise UserError(
                f"--env={name}: commands are logged, so a secret is given by --secret={name}: its value is read "
                "from your environment and copied to the workers as a file"
            )

"""Compute Engine: an instance template, a workload policy, and a managed instance group with both.

The way that Google names for v5p, v6e and TPU7x. All hosts of a slice are made together by one group, or none is. The
group is set not to repair: machines that were taken away stay away until the launcher deletes the group and asks
again. A group that repairs nevertheless is noticed by the new ids of its machines.
"""

import re
from collections.abc import Sequence
from typing import Any

from scaling_dit.errors import UserError, nearest

from ..commands import Command, Runner
from ..job import JOB, OWNER, Job, region
from ..observations import Phase, Resource
from .contract import Request, Row, counted, duration, gcloud, is_absent, mapping, parsed, seconds_of

_GROUPS = ("compute", "instance-groups", "managed")
_TEMPLATES = ("compute", "instance-templates")
_POLICIES = ("compute", "resource-policies")
# Our generation -> (machine type with four chips, image family, image project). The families are as far as known from
# Google's pages on operating systems for TPUs, and were not tried: --runtime=FAMILY gives another.
GENERATIONS = {
    "v5p": (
        "ct5p-hightpu-4t",
        "ubuntu-accelerator-2204-amd64-tpu-v5e-v5p-v6e",
        "ubuntu-os-accelerator-images",
    ),
    "v6e": (
        "ct6e-standard-4t",
        "ubuntu-accelerator-2204-amd64-tpu-v5e-v5p-v6e",
        "ubuntu-os-accelerator-images",
    ),
    "tpu7x": ("tpu7x-standard-4t", "ubuntu-accelerator-2404-amd64-tpu-tpu7x", "ubuntu-os-accelerator-images"),
}
_OURS = {machine: generation for generation, (machine, _, _) in GENERATIONS.items()}
# Flags of an instance template for each capacity. Spot machines stop when they are taken away, so that one sees it.
_CAPACITY = {
    "on-demand": ("--provisioning-model=STANDARD",),
    "spot": ("--provisioning-model=SPOT", "--instance-termination-action=STOP"),
    "flex-start": (
        "--provisioning-model=FLEX_START",
        "--instance-termination-action=DELETE",
        "--reservation-affinity=none",
    ),
    "reserved": (
        "--provisioning-model=RESERVATION_BOUND",
        "--instance-termination-action=DELETE",
        "--reservation-affinity=specific",
    ),
}
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"

# What the group does to an instance -> phase; NONE depends on the instance.
ACTIONS: dict[str, Phase] = {
    "CREATING": Phase.WAITING,
    "CREATING_WITHOUT_RETRIES": Phase.WAITING,
    "RECREATING": Phase.STARTING,
    "RESTARTING": Phase.STARTING,
    "REFRESHING": Phase.STARTING,
    "VERIFYING": Phase.STARTING,
    "RESUMING": Phase.STARTING,
    "STARTING": Phase.STARTING,
    "STOPPING": Phase.STARTING,
    "SUSPENDING": Phase.STARTING,
    "DELETING": Phase.DELETING,
    "ABANDONING": Phase.DELETING,
}
# State of an instance with which the group does nothing -> phase; the worst of all instances counts.
INSTANCES: dict[str, Phase] = {
    "PROVISIONING": Phase.STARTING,
    "STAGING": Phase.STARTING,
    "PENDING": Phase.WAITING,
    "RUNNING": Phase.READY,
    "REPAIRING": Phase.STARTING,
    "STOPPING": Phase.PREEMPTED,
    "STOPPED": Phase.PREEMPTED,
    "TERMINATED": Phase.PREEMPTED,
    "SUSPENDING": Phase.STARTING,
    "SUSPENDED": Phase.PAUSED,
    "DEPROVISIONING": Phase.PREEMPTED,
}
_WORST = (
    Phase.DELETING,
    Phase.PREEMPTED,
    Phase.PAUSED,
    Phase.UNKNOWN,
    Phase.STARTING,
    Phase.WAITING,
    Phase.READY,
)


class ComputeEngine:
    """See the top of this file, and `contract.Backend`."""

    STATES = (
        ("there is no such group", Phase.ABSENT),
        ("its description names another job or owner, or none", Phase.FOREIGN),
        (
            "its `targetStoppedSize` or `targetSuspendedSize` is not 0: a user stopped its machines",
            Phase.PAUSED,
        ),
        ("all its instances run `DELETING`", Phase.DELETING),
        ("it has fewer instances than its size, and some run", Phase.PREEMPTED),
        ("it has no instance yet", Phase.WAITING),
        *((f"an instance's `currentAction` is `{action}`", phase) for action, phase in ACTIONS.items()),
        *((f"an instance is left alone and `{state}`", phase) for state, phase in INSTANCES.items()),
        ("any other answer of gcloud", Phase.UNKNOWN),
    )

    def check(self, job: Job) -> None:
        """Raises UserError for what Compute Engine does not have, or groups cannot do."""
        if job.generation not in GENERATIONS:
            raise UserError(
                f"Compute Engine knows no {job.generation}; {nearest(job.generation, GENERATIONS)}"
            )
        if job.slices > 1:
            raise UserError(
                f"--slices={job.slices}: several groups do not find each other by themselves; "
                "use --backend=queued for several slices"
            )
        if job.capacity not in _CAPACITY:
            raise UserError(f"--capacity={job.capacity}: Compute Engine has {', '.join(_CAPACITY)}")
        if job.capacity == "flex-start" and job.budget.hours > 168:
            raise UserError(f"--hours={job.budget.hours:g}: flex-start runs for 168 hours at most")

    def create(self, job: Job, request: Request) -> list[Command]:
        """Policy, template and group. A template left by another request of this number is deleted first."""
        template, policy, where = _template(job.name, request.number), _policy(job), region(request.zone)
        machine, family, images = GENERATIONS[job.generation]
        flags = [
            f"--machine-type={machine}",
            "--maintenance-policy=TERMINATE",
            *_CAPACITY[job.capacity],
            f"--image-family={job.runtime or family}",
            f"--image-project={images}",
            f"--labels={mapping(job.labels(request.expires))}",
            f"--scopes={_SCOPE}",
        ]
        if job.capacity == "flex-start":
            flags.append(f"--max-run-duration={duration(request.seconds)}")
        for flag, value in (
            ("reservation", job.reservation),
            ("network", job.network),
            ("subnet", job.subnetwork),
            ("service-account", job.service_account),
        ):
            flags += [f"--{flag}={value}"] if value else []
        flags += [f"--region={where}"] if job.subnetwork else []
        flags += ["--no-address"] if job.internal else []
        if request.startup:
            flags.append(f"--metadata-from-file={mapping({'startup-script': request.startup})}")
        topology = f"--accelerator-topology={job.size}"
        policy_words = (*_POLICIES, "create", "workload-policy", policy, "--type=HIGH_THROUGHPUT", topology)
        group = [
            *_GROUPS,
            "create",
            job.name,
            f"--template={template}",
            f"--size={job.hosts}",
            f"--base-instance-name={job.name}",
            f"--description={_description(job, request.expires)}",
            "--default-action-on-vm-failure=do-nothing",
        ]
        if job.hosts > 1:
            group += ["--target-size-policy-mode=bulk", f"--workload-policy={policy_url(job, request.zone)}"]
        first = [_command(job, *policy_words, f"--region={where}", "--quiet")] if job.hosts > 1 else []
        return [
            *first,
            _command(job, *_TEMPLATES, "delete", template, "--quiet"),
            _command(job, *_TEMPLATES, "create", template, *flags, "--quiet"),
            _command(job, *group, "--quiet", zone=request.zone),
        ]

    def delete(self, job: Job, zone: str, number: int) -> list[Command]:
        """The group, which bills, and then its template and policy, which do not."""
        last = []
        if job.hosts > 1:
            where = f"--region={region(zone)}"
            last = [_command(job, *_POLICIES, "delete", _policy(job), where, "--quiet")]
        return [
            _command(job, *_GROUPS, "delete", job.name, "--quiet", zone=zone),
            _command(job, *_TEMPLATES, "delete", _template(job.name, number), "--quiet"),
            *last,
        ]

    def describe(self, job: Job, zone: str) -> Command:
        """The group, without its instances."""
        return _command(job, *_GROUPS, "describe", job.name, "--format=json", zone=zone)

    def observe(self, job: Job, zone: str, runner: Runner) -> Resource:
        """Asks for the group and its instances."""
        result = runner(self.describe(job, zone))
        if is_absent(result):
            return Resource(Phase.ABSENT)
        group = parsed(result)
        if result.code or not isinstance(group, dict):
            return Resource(Phase.UNKNOWN, result.reason)
        labels = labels_of(str(group.get("description", "")))
        if labels.get(JOB) != job.name or labels.get(OWNER, "") != job.owner:
            return Resource(Phase.FOREIGN, "its description is not this job's")
        created = seconds_of(str(group.get("creationTimestamp", "")))
        for key in ("targetStoppedSize", "targetSuspendedSize"):
            if int(group.get(key, 0)):
                return Resource(Phase.PAUSED, f"{key} is {group[key]}", created=created)
        answer = runner(_command(job, *_GROUPS, "list-instances", job.name, "--format=json", zone=zone))
        if is_absent(answer):
            return Resource(Phase.ABSENT)
        instances = parsed(answer)
        if answer.code or not isinstance(instances, list):
            return Resource(Phase.UNKNOWN, answer.reason, created=created)
        phase, detail = _phase(instances, job.hosts)
        names = sorted(str(one.get("instance", "")).rpartition("/")[2] for one in instances)
        machines = ",".join(sorted(str(one.get("id", "")) for one in instances))
        partly = any(one.get("instanceStatus") == "RUNNING" for one in instances)
        return Resource(phase, detail, machines, tuple(names), created, partly)

    def on_workers(self, job: Job, zone: str, nodes: Sequence[str], text: str) -> list[Command]:
        """One command for each VM."""
        return [self._ssh(job, zone, node, text) for node in nodes]

    def on_worker(
        self, job: Job, zone: str, nodes: Sequence[str], worker: int, text: str, flags: Sequence[str] = ()
    ) -> Command:
        """The VM of this number in the order of their names."""
        return self._ssh(job, zone, nodes[worker], text, flags)

    def _ssh(self, job: Job, zone: str, node: str, text: str, flags: Sequence[str] = ()) -> Command:
        words = ("compute", "ssh", node, f"--command={text}", *(f"--ssh-flag={flag}" for flag in flags))
        return _command(job, *words, *_reach(job), "--quiet", zone=zone)

    def copy(self, job: Job, zone: str, nodes: Sequence[str], local: str, remote: str) -> list[Command]:
        """One command for each VM."""
        words = ("compute", "scp", local)
        return [
            _command(job, *words, f"{node}:{remote}", *_reach(job), "--quiet", zone=zone) for node in nodes
        ]

    def maintain(self, job: Job, zone: str, nodes: Sequence[str], worker: int) -> Command:
        """The maintenance event of any VM."""
        words = ("compute", "instances", "simulate-maintenance-event", nodes[worker], "--async")
        return _command(job, *words, zone=zone)

    def listing(self, project: str, zone: str) -> Command:
        """All groups of a zone."""
        return gcloud(*_GROUPS, "list", f"--zones={zone}", "--format=json", project=project)

    def rows(self, zone: str, found: Any) -> list[Row]:
        """Those whose description names a job."""
        rows = []
        for one in found if isinstance(found, list) else []:
            labels = labels_of(str(one.get("description", "")))
            if JOB in labels:
                shape = labels.pop("shape", "")
                paused = int(one.get("targetStoppedSize", 0)) or int(one.get("targetSuspendedSize", 0))
                stable = one.get("status", {}).get("isStable")
                state = "stopped" if paused else "stable" if stable else "changing"
                phase = Phase.PAUSED if paused else Phase.READY if stable else Phase.STARTING
                created = seconds_of(str(one.get("creationTimestamp", "")))
                rows.append(Row("compute", str(one["name"]), zone, labels, state, phase, created, shape))
        return rows

    def delete_row(self, row: Row, project: str) -> list[Command]:
        """The group alone: what it leaves costs nothing."""
        return [gcloud(*_GROUPS, "delete", row.name, "--quiet", project=project, zone=row.zone)]


def _command(job: Job, *words: str, zone: str = "") -> Command:
    return gcloud(*words, project=job.project, zone=zone)


def _reach(job: Job) -> list[str]:
    return ["--internal-ip"] if job.internal else []


def _template(name: str, number: int) -> str:
    return f"{name}-t{number}"


def _policy(job: Job) -> str:
    return f"{job.name}-{job.size}"


def policy_url(job: Job, zone: str) -> str:
    """The policy as a group names it; it is of the zone's region."""
    project = f"projects/{job.project}/" if job.project else ""
    return f"{project}regions/{region(zone)}/resourcePolicies/{_policy(job)}"


def _description(job: Job, expires: int) -> str:
    """Groups have no labels, so their description holds them."""
    return " ".join(f"{key}={value}" for key, value in {**job.labels(expires), "shape": job.topology}.items())


def labels_of(description: str) -> dict[str, str]:
    """The labels that a group's description holds."""
    return dict(re.findall(r"(scaling-dit-\w+|shape)=(\S+)", description))


def _phase(instances: list[dict[str, Any]], size: int) -> tuple[Phase, str]:
    """(the phase of a group with these instances, in their own words)."""
    if not instances:
        return Phase.WAITING, "no instances yet"
    phases, words = [], []
    for one in instances:
        action, state = str(one.get("currentAction", "NONE")), str(one.get("instanceStatus", ""))
        alone = action in ("NONE", "")
        phases.append(INSTANCES.get(state, Phase.UNKNOWN) if alone else ACTIONS.get(action, Phase.UNKNOWN))
        words.append(state if alone else action)
    detail = counted(words)
    kinds = set(phases)
    if kinds == {Phase.DELETING}:
        return Phase.DELETING, detail
    if len(instances) < size and kinds <= {Phase.READY, Phase.DELETING}:
        return Phase.PREEMPTED, f"{len(instances)} of {size} instances; {detail}"
    if Phase.DELETING in kinds:
        return Phase.PREEMPTED, detail
    # Some run already, so they cost money.
    if Phase.WAITING in kinds and kinds & {Phase.READY, Phase.STARTING}:
        return Phase.STARTING, detail
    return min(phases, key=_WORST.index), detail

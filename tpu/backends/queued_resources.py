"""Queued resources of the Cloud TPU API: v4, v5e, v5p, v6e.

Google calls this API legacy: fixes only, and no generation after v6e. Flags as in gcloud 578 (August 2026); the group
exists in the tracks GA and alpha, not in beta. A request uses alpha only if it needs one of alpha's flags.
"""

import re
from collections.abc import Sequence
from typing import Any

from scaling_dit.errors import UserError, nearest

from ..commands import Command, Runner
from ..job import JOB, OWNER, Job
from ..observations import Phase, Resource
from .contract import Request, Row, counted, duration, gcloud, is_absent, mapping, parsed, seconds_of

_GROUP = ("compute", "tpus", "queued-resources")
_NODES = ("compute", "tpus", "tpu-vm")
# Our generation -> (`--type`, runtime image).
GENERATIONS = {
    "v4": ("v4", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
}
_OURS = {kind: generation for generation, (kind, _) in GENERATIONS.items()}
# Requests that only alpha knows.
_ALPHA = ("best-effort", "flex-start")
# A request that was not filled after this ends by itself.
_QUEUE_SECONDS = 24 * 3600
_WEEK = 7 * 24 * 3600
# More connections than this at once are prone to fail.
_AT_ONCE = 100

# (state, who caused it: USER, SERVICE or "" for anyone) -> phase; ACTIVE depends on the nodes.
QUEUED_STATES: dict[tuple[str, str], Phase] = {
    ("CREATING", ""): Phase.WAITING,
    ("ACCEPTED", ""): Phase.WAITING,
    ("WAITING_FOR_RESOURCES", ""): Phase.WAITING,
    ("PROVISIONING", ""): Phase.STARTING,
    # While a user's suspension is under way machines still run.
    ("SUSPENDING", "USER"): Phase.STARTING,
    ("SUSPENDED", "USER"): Phase.PAUSED,
    ("SUSPENDING", ""): Phase.PREEMPTED,
    ("SUSPENDED", ""): Phase.PREEMPTED,
    ("FAILED", ""): Phase.FAILED,
    ("DELETING", ""): Phase.DELETING,
}
# State of a node of an ACTIVE queued resource -> phase; the worst of all nodes counts. A node that is gone, or goes,
# was taken away: not every preemption shows as PREEMPTED.
NODE_STATES: dict[str, Phase] = {
    "PREEMPTED": Phase.PREEMPTED,
    "TERMINATED": Phase.PREEMPTED,
    "DELETING": Phase.PREEMPTED,
    "STOPPED": Phase.PAUSED,
    "STOPPING": Phase.STARTING,
    "CREATING": Phase.STARTING,
    "STARTING": Phase.STARTING,
    "RESTARTING": Phase.STARTING,
    "REIMAGING": Phase.STARTING,
    "REPAIRING": Phase.STARTING,
    "HIDING": Phase.STARTING,
    "HIDDEN": Phase.STARTING,
    "UNHIDING": Phase.STARTING,
    "READY": Phase.READY,
    "UNKNOWN": Phase.UNKNOWN,
}
_HEALTHY = ("", "HEALTH_UNSPECIFIED", "HEALTHY")
_WORST = (Phase.PREEMPTED, Phase.PAUSED, Phase.UNKNOWN, Phase.STARTING, Phase.SICK, Phase.READY)


class QueuedResources:
    """See the top of this file, and `contract.Backend`."""

    STATES = (
        ("there is no such queued resource", Phase.ABSENT),
        ("its labels name another job or owner, or none", Phase.FOREIGN),
        *(
            (f"`{state}`{f', state_initiator `{who}`' if who else ''}", phase)
            for (state, who), phase in QUEUED_STATES.items()
        ),
        ("`ACTIVE`, and a node is not found", Phase.PREEMPTED),
        *((f"`ACTIVE`, and a node is `{state}`", phase) for state, phase in NODE_STATES.items()),
        ("`ACTIVE`, and a node's health is not `HEALTHY`", Phase.SICK),
        ("any other answer of gcloud", Phase.UNKNOWN),
    )

    def check(self, job: Job) -> None:
        """Raises UserError for a generation that the API does not have."""
        if job.generation not in GENERATIONS:
            raise UserError(
                f"queued resources know no {job.generation}; {nearest(job.generation, GENERATIONS)} "
                "(--backend=compute has v5p, v6e and newer)"
            )
        if job.capacity == "flex-start" and 3600 * job.budget.hours > _WEEK:
            raise UserError(f"--hours={job.budget.hours:g}: flex-start runs for 168 hours at most")

    def create(self, job: Job, request: Request) -> list[Command]:
        """One command."""
        kind, image = GENERATIONS[job.generation]
        alpha = job.capacity in _ALPHA or bool(job.reservation)
        nodes = [f"--node-id={job.name}"]
        if job.slices > 1:
            nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
        flags = [
            *nodes,
            f"--type={kind}",
            f"--topology={job.size}",
            f"--runtime-version={job.runtime or image}",
            *_capacity(job, request),
            f"--valid-until-duration={duration(_QUEUE_SECONDS)}",
            f"--labels={mapping(job.labels(request.expires))}",
        ]
        for flag, value in (
            ("network", job.network),
            ("subnetwork", job.subnetwork),
            ("service-account", job.service_account),
        ):
            flags += [f"--{flag}={value}"] if value else []
        flags += ["--internal-ips"] if job.internal else []
        if request.startup:
            flags.append(f"--metadata-from-file={mapping({'startup-script': request.startup})}")
        words = (*_GROUP, "create", job.name, *flags, "--async", "--quiet")
        return [_command(job, request.zone, *words, track="alpha" if alpha else "")]

    def delete(self, job: Job, zone: str, number: int) -> list[Command]:
        """One command, which also deletes the nodes."""
        return [_command(job, zone, *_GROUP, "delete", job.name, "--force", "--async", "--quiet")]

    def describe(self, job: Job, zone: str) -> Command:
        """The queued resource, without its nodes."""
        return _command(job, zone, *_GROUP, "describe", job.name, "--format=json")

    def observe(self, job: Job, zone: str, runner: Runner) -> Resource:
        """Asks for the queued resource and, if it is ACTIVE, for its nodes."""
        result = runner(self.describe(job, zone))
        if is_absent(result):
            return Resource(Phase.ABSENT)
        found = parsed(result)
        if result.code or not isinstance(found, dict):
            return Resource(Phase.UNKNOWN, result.reason)
        if not _is_ours(job, found):
            return Resource(Phase.FOREIGN, "its labels are not this job's")
        state, phase, detail = _state(found)
        nodes, created = _node_names(found), seconds_of(str(found.get("createTime", "")))
        if state != "ACTIVE":
            return Resource(phase, detail, nodes=nodes, created=created, partly=state == "SUSPENDING")
        machines, phases, details = [], [], []
        for node in nodes:
            answer = runner(_command(job, zone, *_NODES, "describe", node, "--format=json"))
            described = parsed(answer)
            if is_absent(answer):
                phases.append(Phase.PREEMPTED)
                details.append("a node is gone")
            elif answer.code or not isinstance(described, dict):
                return Resource(Phase.UNKNOWN, answer.reason, nodes=nodes, created=created)
            else:
                phase, detail = _node(described)
                phases.append(phase)
                details.append(detail)
                machines.append(str(described.get("id", "")))
        worst = min(phases, key=_WORST.index, default=Phase.UNKNOWN)
        # The nodes of an ACTIVE resource cost money as long as one is left.
        return Resource(worst, counted(details), ",".join(machines), nodes, created, partly=bool(machines))

    def on_workers(self, job: Job, zone: str, nodes: Sequence[str], text: str) -> list[Command]:
        """One command for all nodes and workers."""
        words = (*_GROUP, "ssh", job.name, "--node=all", "--worker=all", f"--command={text}")
        batch = [f"--batch-size={_AT_ONCE}"] if job.workers > _AT_ONCE else []
        return [_command(job, zone, *words, *batch, *_reach(job))]

    def on_worker(
        self, job: Job, zone: str, nodes: Sequence[str], worker: int, text: str, flags: Sequence[str] = ()
    ) -> Command:
        """Worker `worker % hosts` of node `worker // hosts`."""
        node, inside = divmod(worker, job.hosts)
        words = (*_GROUP, "ssh", job.name, f"--node={node}", f"--worker={inside}", f"--command={text}")
        return _command(job, zone, *words, *(f"--ssh-flag={flag}" for flag in flags), *_reach(job))

    def copy(self, job: Job, zone: str, nodes: Sequence[str], local: str, remote: str) -> list[Command]:
        """One command for all nodes and workers."""
        words = (*_GROUP, "scp", local, f"{job.name}:{remote}", "--node=all", "--worker=all")
        return [_command(job, zone, *words, *_reach(job))]

    def maintain(self, job: Job, zone: str, nodes: Sequence[str], worker: int) -> Command:
        """Alpha only."""
        node, inside = divmod(worker, job.hosts)
        words = (*_NODES, "simulate-maintenance-event", nodes[node], f"--workers={inside}")
        return _command(job, zone, *words, track="alpha")

    def listing(self, project: str, zone: str) -> Command:
        """All queued resources of a zone."""
        return gcloud(*_GROUP, "list", "--format=json", project=project, zone=zone)

    def rows(self, zone: str, found: Any) -> list[Row]:
        """Those with the label of a job."""
        rows = []
        for one in found if isinstance(found, list) else []:
            labels = _labels(one)
            if JOB in labels:
                state, phase, _ = _state(one)
                node = (_specs(one) or [{}])[0].get("node", {}).get("acceleratorConfig", {})
                kind, size = _OURS.get(str(node.get("type", "")).lower(), ""), node.get("topology", "")
                name = str(one.get("name", "")).rpartition("/")[2]
                created = seconds_of(str(one.get("createTime", "")))
                shape = f"{kind}:{size}" if kind and size else ""
                slices = max(1, len(_node_names(one)))
                rows.append(Row("queued", name, zone, labels, state, phase, created, shape, slices))
        return rows

    def delete_row(self, row: Row, project: str) -> list[Command]:
        """As `delete`."""
        words = (*_GROUP, "delete", row.name, "--force", "--async", "--quiet")
        return [gcloud(*words, project=project, zone=row.zone)]


def _command(job: Job, zone: str, *words: str, track: str = "") -> Command:
    return gcloud(*words, track=track, project=job.project, zone=zone)


def _reach(job: Job) -> list[str]:
    return ["--internal-ip"] if job.internal else []


def _capacity(job: Job, request: Request) -> list[str]:
    """The flags that say how the machines are paid for; on demand is the default."""
    if job.capacity == "flex-start":
        return [
            "--provisioning-model=flex-start",
            f"--max-run-duration={duration(min(request.seconds, _WEEK))}",
        ]
    if job.capacity == "reserved" and job.reservation:
        return ["--reserved", f"--reservation={job.reservation}"]
    return {"spot": ["--spot"], "reserved": ["--reserved"], "best-effort": ["--best-effort"]}.get(
        job.capacity, []
    )


def _specs(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec for spec in found.get("tpu", {}).get("nodeSpec", []) if isinstance(spec, dict)]


def _labels(found: dict[str, Any]) -> dict[str, str]:
    specs = _specs(found)
    return dict(specs[0].get("node", {}).get("labels", {})) if specs else {}


def _is_ours(job: Job, found: dict[str, Any]) -> bool:
    labels = _labels(found)
    return labels.get(JOB) == job.name and labels.get(OWNER, "") == job.owner


def _node_names(found: dict[str, Any]) -> tuple[str, ...]:
    """Names of the nodes; those of several slices follow from their prefix until they are listed."""
    names = []
    for spec in _specs(found):
        several = spec.get("multisliceParams") or spec.get("multiNodeParams")
        if spec.get("nodeId"):
            names.append(str(spec["nodeId"]))
        elif several:
            count, prefix = int(several.get("nodeCount", 0)), several.get("nodeIdPrefix", "")
            names += [f"{prefix}-{index}" for index in range(count)]
    return tuple(sorted(names, key=_by_number))


def _by_number(name: str) -> tuple[str, int]:
    stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return stem, int(number or 0)


def _state(found: dict[str, Any]) -> tuple[str, Phase, str]:
    """(state, phase, details for the user); the phase of ACTIVE is STARTING until its nodes are asked."""
    described = found.get("state", {})
    described = {"state": described} if isinstance(described, str) else described
    state, who = str(described.get("state", "")), str(described.get("stateInitiator", ""))
    error = described.get("failedData", {}).get("error", {}).get("message", "")
    detail = ": ".join(filter(None, (state, error))) + (f", by {who}" if who else "")
    if state == "ACTIVE":
        return state, Phase.STARTING, detail
    return state, QUEUED_STATES.get((state, who), QUEUED_STATES.get((state, ""), Phase.UNKNOWN)), detail


def _node(described: dict[str, Any]) -> tuple[Phase, str]:
    state, health = str(described.get("state", "")), str(described.get("health", ""))
    phase = NODE_STATES.get(state, Phase.UNKNOWN)
    if phase is Phase.READY and health not in _HEALTHY:
        return Phase.SICK, f"{state}, {health}"
    return phase, state

"""`--dry-run`: the commands of a whole job, in the order in which a launcher runs them when nothing goes wrong."""

import time
from collections.abc import Iterable

from . import checks, remote
from .backends import Backend, Request
from .commands import Command, Say, shown
from .job import Job
from .launcher import Launcher, dry_runner
from .observations import Phase, Resource
from .store import Store


def node_names(job: Job) -> tuple[str, ...]:
    """Names of nodes for commands that are only shown: a group's VMs get theirs when they are made."""
    if job.backend == "compute":
        return tuple(f"{job.name}-VM{index}" for index in range(job.hosts))
    return (job.name,) if job.slices == 1 else tuple(f"{job.name}-{index}" for index in range(job.slices))


def rehearse(job: Job, backend: Backend, startup: str, say: Say) -> None:
    """Shows the commands; runs none, and writes nothing."""
    zone, kept = job.zones[0], Store(job.name)
    nodes = node_names(job)

    def show(title: str, commands: Iterable[Command]) -> None:
        say(f"# {title}")
        for command in commands:
            say(shown(command))

    asked = [checks.bucket_command(job, bucket) for bucket in checks.buckets(job)]
    show("checks", [*asked, *([checks.quota_command(job)] if job.project else [])])
    seconds = 3600 * job.hours
    path = str(kept.startup) if startup else ""
    request = Request(zone, 1, seconds, int(time.time() + seconds), path)
    others = f", then {', '.join(job.zones[1:])}" if len(job.zones) > 1 else ""
    show(f"the resource, in {zone}{others}", backend.create(job, request))
    show("its state, again and again", [backend.describe(job, zone)])
    if job.backend == "compute":
        say(f"# {job.name}-VM0, ... stand for the names that the group gives its VMs")
    one = Launcher(job, kept, dry_runner(say), say)
    one.resource = Resource(Phase.READY, nodes=nodes)
    say("# files and set-up")
    for commands in one.preparation(zone, "STAMP"):
        for command in commands:
            say(shown(command))
    show("the job", backend.on_workers(job, zone, nodes, remote.start(job, 1)))
    show("how it is, again and again", backend.on_workers(job, zone, nodes, remote.status(job)))
    show("the end", backend.delete(job, zone, 1))

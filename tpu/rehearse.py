"""`--dry-run`: the commands of a whole job, in the order in which a launcher runs them when nothing goes wrong."""

import time
from collections.abc import Iterable

from . import checks, remote
from .backends import Backend, Request
from .commands import Command, Say, shown
from .job import Job
from .store import Store


def rehearse(job: Job, backend: Backend, startup: str, say: Say) -> None:
    """Shows the commands; runs none, and writes nothing."""
    zone, kept = job.zones[0], Store(job.name)
    nodes = (
        tuple(f"{job.name}-VM{index}" for index in range(job.hosts))
        if job.backend == "compute"
        else (job.name,)
    )

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
    home = f"{remote.FOLDER}/{job.name}/"
    copies = [(str(kept.source), f"{home}source.tgz")] if job.source else []
    copies += [(str(kept.env), f"{home}env")] if job.secrets else []
    if copies:
        show("files", backend.on_workers(job, zone, nodes, remote.make_folder(job)))
        for local, target in copies:
            for command in backend.copy(job, zone, nodes, local, target):
                say(shown(command))
    show("set-up", backend.on_workers(job, zone, nodes, remote.setup(job, "STAMP")))
    show("the job", backend.on_workers(job, zone, nodes, remote.start(job, 1)))
    show("how it is, again and again", backend.on_workers(job, zone, nodes, remote.status(job)))
    show("the end", backend.delete(job, zone, 1))

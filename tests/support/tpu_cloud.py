"""A simulated Google Cloud that takes gcloud commands: queued resources with their nodes, and managed instance groups.

Both life cycles, driven by `advance(seconds)`. It is strict about flags (`gcloud_flags.py`), speaks the JSON of the
real APIs, and keeps a ledger of when machines of each job ran. What happens on workers is somebody else's: `workers`.
"""

import dataclasses
import json
import pathlib
import random
import time

from tests.support.gcloud_flags import FlagError, Parsed, parse


@dataclasses.dataclass
class Machine:
    """One worker: of a node, or a VM of a group."""

    id: int
    name: str
    status: str = "RUNNING"
    action: str = "NONE"


@dataclasses.dataclass
class Made:
    """A queued resource or a group. `state` is a queued resource's; a group has WAITING, ACTIVE, DELETING."""

    kind: str
    name: str
    zone: str
    request: Parsed
    labels: dict[str, str]
    hosts: int
    slices: int
    created: float
    state: str
    until: float
    initiator: str = "SERVICE"
    error: str = ""
    nodes: dict[str, dict] = dataclasses.field(default_factory=dict)
    machines: list[Machine] = dataclasses.field(default_factory=list)
    stopped: int = 0
    ends: float = float("inf")
    started: float | None = None

    def key(self):
        return self.kind, self.zone, self.name


class NoWorkers:
    """Workers on which every command succeeds silently."""

    def run(self, cloud, made, machine, text):
        return 0, ""

    def copy(self, cloud, made, machine, local, remote):
        return 0

    def gone(self, machine):
        pass


# Hosts of a slice by its number of chips, as the launcher may not assume them.
def hosts_of(kind: str, topology: str, queued: bool) -> int:
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    if queued and kind in ("v5litepod", "v6e") and topology == "2x4":
        return 1
    return max(1, chips // 4)


class Cloud:
    """See the top of the file.

    Attributes:
      provision, boot, remove: (least, most) seconds of waiting for capacity, of starting, and of deleting.
      repairs: whether groups make their machines again by themselves.
      deny: answers of the next requests: "capacity" or "permission".
      lose: "before" or "after": the next request's answer is lost, before or after it is made.
      accept, suspending: seconds until a request is in the queue, and of a suspension.
      deaf: how many of the next questions fail.
      ledger: (job, start, end) of machines that ran.
    """

    def __init__(self, seed=0, now=1_800_000_000.0, workers=None):
        self.rng, self.now = random.Random(seed), now
        self.workers = workers or NoWorkers()
        self.made: dict[tuple[str, str, str], Made] = {}
        self.templates: dict[str, Parsed] = {}
        self.policies: dict[tuple[str, str], Parsed] = {}
        self.buckets: dict[str, str] = {}
        self.quotas: list[dict] = []
        self.accept, self.suspending = 5.0, 20.0
        self.provision, self.boot, self.remove = (0.0, 600.0), (30.0, 200.0), (10.0, 120.0)
        self.repairs, self.deny, self.lose, self.deaf = False, [], "", 0
        self.ledger: list[tuple[str, float, float]] = []
        self.calls: list[tuple[str, ...]] = []
        self.created = 0
        self.next_id = 1000

    # Time.

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = [one for one in self.made.values() if min(one.until, one.ends) <= end]
            if not due:
                break
            one = min(due, key=lambda made: min(made.until, made.ends))
            self.now = max(self.now, min(one.until, one.ends))
            if one.ends <= one.until and one.state not in ("DELETING",):
                # The switch on the machines.
                self._begin_delete(one)
                one.ends = float("inf")
            else:
                self._proceed(one)
        self.now = end

    def _later(self, span) -> float:
        return self.now + self.rng.uniform(*span)

    def _proceed(self, one: Made) -> None:
        one.until = float("inf")
        if one.state == "CREATING":
            one.state, one.until = "WAITING_FOR_RESOURCES", self._later(self.provision)
        elif one.state in ("WAITING_FOR_RESOURCES", "WAITING"):
            one.state, one.until = "PROVISIONING", self._later(self.boot)
        elif one.state == "PROVISIONING":
            self._machines(one)
        elif one.state == "SUSPENDING":
            self._stop(one)
            one.state = "SUSPENDED"
        elif one.state == "DELETING":
            self._stop(one)
            del self.made[one.key()]
        elif one.state == "REPAIRING":
            self._stop(one)
            self._machines(one)

    def _machines(self, one: Made) -> None:
        """Machines begin to run, and to cost."""
        one.state, one.started = "ACTIVE", self.now
        one.ends = min(one.ends, self.now + float(one.request.get("allowed", "inf")))
        if one.kind == "queued":
            names = (
                [one.name]
                if one.slices == 1
                else [f"{one.request.get('node-prefix')}-{i}" for i in range(one.slices)]
            )
            one.nodes = {name: {"state": "READY", "health": "HEALTHY", "id": self._id()} for name in names}
        owners = list(one.nodes) or [one.name]
        one.machines = [
            Machine(self._id(), f"{owner}-{index:04d}") for owner in owners for index in range(one.hosts)
        ]

    def _id(self) -> int:
        self.next_id += 1
        return self.next_id

    def _stop(self, one: Made) -> None:
        """Machines run no longer."""
        if one.started is not None:
            self.ledger.append((one.labels["scaling-dit-job"], one.started, self.now))
            one.started = None
        for machine in one.machines:
            self.workers.gone(machine)
        one.machines = []

    def _begin_delete(self, one: Made) -> None:
        one.state, one.until, one.initiator = "DELETING", self._later(self.remove), "USER"

    def billed(self, job: str) -> float:
        """Seconds that machines of a job ran, so far."""
        done = sum(end - start for name, start, end in self.ledger if name == job)
        return done + sum(self.now - one.started for one in self.running(job))

    def running(self, job: str) -> list[Made]:
        return [
            one
            for one in self.made.values()
            if one.labels.get("scaling-dit-job") == job and one.started is not None
        ]

    def wanted(self, job: str) -> list[Made]:
        """Resources of a job that nobody deletes."""
        return [
            one
            for one in self.made.values()
            if one.labels.get("scaling-dit-job") == job and one.state != "DELETING"
        ]

    # What happens to a resource.

    def preempt(self, one: Made) -> None:
        """The service takes the machines away; in a group one or all of them."""
        if one.kind == "queued":
            one.state, one.initiator, one.until = "SUSPENDING", "SERVICE", self.now + self.suspending
            for node in one.nodes.values():
                node["state"] = "PREEMPTED"
            for machine in one.machines:
                self.workers.gone(machine)
            return
        victims = one.machines if self.rng.random() < 0.5 else [self.rng.choice(one.machines)]
        for machine in victims:
            machine.status = "TERMINATED"
            self.workers.gone(machine)
        if self.repairs:
            for machine in victims:
                machine.action = "RECREATING"
            one.state, one.until = "REPAIRING", self._later(self.boot)
        elif len(victims) == len(one.machines):
            self.ledger.append((one.labels["scaling-dit-job"], one.started, self.now))
            one.started = None

    def suspend(self, one: Made) -> None:
        """A user suspends it."""
        if one.kind == "queued":
            one.state, one.initiator, one.until = "SUSPENDING", "USER", self.now + self.suspending
        else:
            one.stopped = one.hosts
            self._stop(one)

    def fail(self, one: Made, error="no more capacity in the zone") -> None:
        self._stop(one)
        one.state, one.error, one.until = "FAILED", error, float("inf")

    def health(self, one: Made, health: str) -> None:
        for node in one.nodes.values():
            node["health"] = health

    # Commands.

    def __call__(self, command, seconds=0.0):
        """A runner for the launcher: (code, out, err) as `commands.Result`."""
        from scaling_dit.tpu.commands import Result

        code, out, err = self.run(list(command))
        return Result(code, out, err)

    def run(self, command: list[str]) -> tuple[int, str, str]:
        self.calls.append(tuple(command))
        assert command[0] == "gcloud", command
        try:
            parsed = parse(command[1:])
        except FlagError as error:
            return 2, "", f"ERROR: (gcloud) {error}\n"
        name = "_".join(word.replace("-", "_") for word in parsed.words)
        reading = parsed.words[-1] in ("describe", "list", "list-instances", "ssh")
        if self.deaf and reading:
            self.deaf -= 1
            return 1, "", "ERROR: gcloud crashed (ConnectionError): connection reset by peer\n"
        return getattr(self, f"_{name}")(parsed)

    def _absent(self, name):
        return 1, "", f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found\n"

    def _create(self, made: Made) -> tuple[int, str, str]:
        if self.deny:
            words = {
                "capacity": "RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded",
                "permission": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
            }
            return 1, "", f"ERROR: (gcloud) {words[self.deny.pop(0)]}\n"
        lose, self.lose = self.lose, ""
        lost = (1, "", "ERROR: gcloud crashed (ConnectionError): connection reset by peer\n")
        if lose == "before":
            return lost
        if made.key() in self.made:
            return (
                lost
                if lose
                else (1, "", f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{made.name}' already exists\n")
            )
        self.made[made.key()] = made
        self.created += 1
        return lost if lose else (0, "", f"Create request issued for: [{made.name}]\n")

    def _allowed(self, parsed: Parsed) -> None:
        """What the switch in the startup script says, where there is one: `allowed SECONDS`."""
        path = parsed.mapping("metadata-from-file").get("startup-script")
        if path:
            words = pathlib.Path(path).read_text().split()
            if "allowed" in words:
                parsed.flags["--allowed"] = [words[words.index("allowed") + 1]]

    def _compute_tpus_queued_resources_create(self, parsed):
        self._allowed(parsed)
        slices = int(parsed.get("node-count", "1"))
        made = Made(
            "queued", parsed.arguments[0], parsed.get("zone"), parsed, parsed.mapping("labels"),
            hosts_of(parsed.get("type"), parsed.get("topology"), True), slices, self.now,
            "CREATING", self.now + self.accept,
        )  # fmt: skip
        return self._create(made)

    def _look(self, kind, parsed) -> Made | None:
        return self.made.get((kind, parsed.get("zone"), parsed.arguments[0].rpartition("@")[2]))

    def _compute_tpus_queued_resources_describe(self, parsed):
        one = self._look("queued", parsed)
        return (0, json.dumps(self._queued(one)), "") if one else self._absent(parsed.arguments[0])

    def _queued(self, one: Made) -> dict:
        node = {
            "labels": one.labels,
            "acceleratorConfig": {
                "type": one.request.get("type").upper(),
                "topology": one.request.get("topology"),
            },
        }
        if one.slices == 1:
            specs = [{"nodeId": one.request.get("node-id"), "node": node}]
        elif one.nodes:
            specs = [{"nodeId": name, "node": node} for name in one.nodes]
        else:
            several = {"nodeCount": one.slices, "nodeIdPrefix": one.request.get("node-prefix")}
            specs = [{"multisliceParams": several, "node": node}]
        state = {"state": one.state, "stateInitiator": one.initiator}
        if one.state == "FAILED":
            state["failedData"] = {"error": {"code": 8, "message": one.error}}
        return {
            "name": f"projects/p/locations/{one.zone}/queuedResources/{one.name}",
            "createTime": stamp(one.created),
            "state": state,
            "tpu": {"nodeSpec": specs},
        }

    def _compute_tpus_queued_resources_list(self, parsed):
        found = [one for one in self.made.values() if one.kind == "queued" and one.zone == parsed.get("zone")]
        return 0, json.dumps([self._queued(one) for one in found]), ""

    def _compute_tpus_queued_resources_delete(self, parsed):
        one = self._look("queued", parsed)
        if one is None:
            return self._absent(parsed.arguments[0])
        if one.nodes and not parsed.has("force"):
            return 1, "", "ERROR: (gcloud) FAILED_PRECONDITION: it has nodes\n"
        if one.state != "DELETING":
            self._begin_delete(one)
        return 0, "", ""

    def _compute_tpus_tpu_vm_describe(self, parsed):
        for one in self.made.values():
            if one.zone == parsed.get("zone") and parsed.arguments[0] in one.nodes:
                return 0, json.dumps({"name": parsed.arguments[0], **one.nodes[parsed.arguments[0]]}), ""
        return self._absent(parsed.arguments[0])

    def _compute_tpus_queued_resources_ssh(self, parsed):
        one = self._look("queued", parsed)
        if one is None or one.state != "ACTIVE":
            return self._absent(parsed.arguments[0])
        return self._remote(one, self._chosen(one, parsed), parsed)

    def _compute_tpus_queued_resources_scp(self, parsed):
        local, _, remote = parsed.arguments[0], *parsed.arguments[1].partition(":")[1:]
        one = self.made.get(("queued", parsed.get("zone"), parsed.arguments[1].partition(":")[0]))
        if one is None or one.state != "ACTIVE":
            return self._absent(parsed.arguments[1])
        codes = [
            self.workers.copy(self, one, machine, local, remote) for machine in self._chosen(one, parsed)
        ]
        return max(codes, default=0), "", ""

    def _chosen(self, one: Made, parsed) -> list[Machine]:
        """The machines of --node and --worker, each a number or "all"."""
        node, worker = parsed.get("node", "0"), parsed.get("worker", "0")
        return [
            machine
            for index, machine in enumerate(one.machines)
            if node in ("all", str(index // one.hosts)) and worker in ("all", str(index % one.hosts))
        ]

    def _remote(self, one, machines, parsed):
        # gcloud splits the command at single spaces, and what is between two of them may not survive.
        text = " ".join(part for part in parsed.get("command").split(" ") if part)
        running = [machine for machine in machines if machine.status == "RUNNING"]
        results = self.workers.run_all(self, one, running, text) if hasattr(self.workers, "run_all") else [
            self.workers.run(self, one, machine, text) for machine in running
        ]  # fmt: skip
        bad = [code for code, _ in results if code]
        if bad:
            return bad[0], "".join(out for _, out in results), f"ERROR: (gcloud) exit code {bad[0]}\n"
        # Workers that cannot be reached are left out, and the command ends well nevertheless.
        return 0, "".join(out for _, out in results), ""

    def _compute_tpus_tpu_vm_simulate_maintenance_event(self, parsed):
        for one in self.made.values():
            if one.zone == parsed.get("zone") and parsed.arguments[0] in one.nodes:
                one.nodes[parsed.arguments[0]]["health"] = "UNHEALTHY_MAINTENANCE"
                return 0, "", ""
        return self._absent(parsed.arguments[0])

    def _storage_buckets_describe(self, parsed):
        name = parsed.arguments[0].removeprefix("gs://")
        if name not in self.buckets:
            return self._absent(name)
        return 0, json.dumps({"name": name, "location": self.buckets[name], "location_type": "region"}), ""

    def _quotas_info_list(self, parsed):
        return 0, json.dumps(self.quotas), ""

    # Compute Engine.

    def _compute_resource_policies_create_workload_policy(self, parsed):
        key = (parsed.get("region"), parsed.arguments[0])
        if key in self.policies:
            return 1, "", f"ERROR: (gcloud) The resource '{key[1]}' already exists\n"
        self.policies[key] = parsed
        return 0, "", ""

    def _compute_resource_policies_delete(self, parsed):
        used = any(
            one.request.get("workload-policy").endswith(f"/{parsed.arguments[0]}")
            for one in self.made.values()
        )
        if used or self.policies.pop((parsed.get("region"), parsed.arguments[0]), None) is None:
            return self._absent(parsed.arguments[0])
        return 0, "", ""

    def _compute_instance_templates_create(self, parsed):
        if parsed.arguments[0] in self.templates:
            return 1, "", f"ERROR: (gcloud) The resource '{parsed.arguments[0]}' already exists\n"
        self._allowed(parsed)
        self.templates[parsed.arguments[0]] = parsed
        return 0, "", ""

    def _compute_instance_templates_delete(self, parsed):
        name = parsed.arguments[0]
        if any(one.kind == "compute" and one.request.get("template") == name for one in self.made.values()):
            return 1, "", f"ERROR: (gcloud) The instance_template resource '{name}' is already being used\n"
        return (0, "", "") if self.templates.pop(name, None) else self._absent(name)

    def _compute_instance_groups_managed_create(self, parsed):
        template = self.templates.get(parsed.get("template"))
        if template is None:
            return 1, "", f"ERROR: (gcloud) Invalid value for field 'template': '{parsed.get('template')}'\n"
        policy = parsed.get("workload-policy")
        region = parsed.get("zone").rpartition("-")[0]
        if policy and (region, policy.rpartition("/")[2]) not in self.policies:
            return 1, "", f"ERROR: (gcloud) Invalid value for field 'workload-policy': '{policy}'\n"
        if template.has("allowed"):
            parsed.flags["--allowed"] = template.flags["--allowed"]
        labels = template.mapping("labels")
        made = Made(
            "compute", parsed.arguments[0], parsed.get("zone"), parsed, labels, int(parsed.get("size")), 1, self.now,
            "WAITING", self._later(self.provision),
        )  # fmt: skip
        return self._create(made)

    def _group(self, one: Made) -> dict:
        return {
            "name": one.name,
            "zone": one.zone,
            "description": one.request.get("description"),
            "creationTimestamp": stamp(one.created),
            "instanceTemplate": one.request.get("template"),
            "targetSize": one.hosts,
            "targetStoppedSize": one.stopped,
            "status": {"isStable": one.state == "ACTIVE"},
        }

    def _compute_instance_groups_managed_describe(self, parsed):
        one = self._look("compute", parsed)
        return (0, json.dumps(self._group(one)), "") if one else self._absent(parsed.arguments[0])

    def _compute_instance_groups_managed_list(self, parsed):
        zones = parsed.get("zones").split(",")
        found = [
            self._group(one) for one in self.made.values() if one.kind == "compute" and one.zone in zones
        ]
        return 0, json.dumps(found), ""

    def _compute_instance_groups_managed_list_instances(self, parsed):
        one = self._look("compute", parsed)
        if one is None:
            return self._absent(parsed.arguments[0])
        if not one.machines:
            action = "DELETING" if one.state == "DELETING" else "CREATING"
            status = "PROVISIONING" if one.state == "PROVISIONING" else ""
            found = [
                {
                    "instance": f"zones/z/instances/{one.name}-{i:04d}",
                    "currentAction": action,
                    "instanceStatus": status,
                }
                for i in range(one.hosts)
            ]
            return 0, json.dumps(found), ""
        found = [
            {
                "instance": f"zones/{one.zone}/instances/{machine.name}",
                "id": str(machine.id),
                "currentAction": "DELETING" if one.state == "DELETING" else machine.action,
                "instanceStatus": machine.status,
            }
            for machine in one.machines
        ]
        return 0, json.dumps(found), ""

    def _compute_instance_groups_managed_delete(self, parsed):
        one = self._look("compute", parsed)
        if one is None:
            return self._absent(parsed.arguments[0])
        if one.state != "DELETING":
            self._begin_delete(one)
        # gcloud waits for the end.
        self.advance(max(0.0, one.until - self.now))
        return 0, "", ""

    def _vm(self, name: str, zone: str):
        for one in self.made.values():
            for machine in one.machines if one.kind == "compute" and one.zone == zone else ():
                if machine.name == name:
                    return one, machine
        return None, None

    def _compute_ssh(self, parsed):
        one, machine = self._vm(parsed.arguments[0], parsed.get("zone"))
        if one is None or machine.status != "RUNNING":
            return self._absent(parsed.arguments[0])
        return self._remote(one, [machine], parsed)

    def _compute_scp(self, parsed):
        name, _, remote = parsed.arguments[1].partition(":")
        one, machine = self._vm(name, parsed.get("zone"))
        if one is None:
            return self._absent(name)
        return self.workers.copy(self, one, machine, parsed.arguments[0], remote), "", ""

    def _compute_instances_simulate_maintenance_event(self, parsed):
        one, _ = self._vm(parsed.arguments[0], parsed.get("zone"))
        if one is None:
            return self._absent(parsed.arguments[0])
        self.preempt(one)
        return 0, "", ""


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.123456Z", time.gmtime(seconds))

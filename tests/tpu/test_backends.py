"""Commands of both back-ends against the tables of documented flags; states and fields against Google's own client."""

import itertools
import re

import pytest
from google.cloud import tpu_v2, tpu_v2alpha1
from scaling_dit.tpu import backends
from scaling_dit.tpu.backends import contract, queued_resources
from scaling_dit.tpu.backends.contract import Request, answer, gcloud, mapping, seconds_of
from scaling_dit.tpu.commands import Result
from scaling_dit.tpu.job import CAPACITIES, Job, check, from_json
from scaling_dit.tpu.observations import Answer, Phase

from scaling_dit.errors import UserError
from tests.support import tpu_jobs
from tests.support.gcloud_flags import FlagError, parse

REQUEST = Request("us-east5-a", 2, 7200.0, 1_900_000_000, "/some where/a,b.sh")
OPTIONS = {
    "network": "mine",
    "subnetwork": "sub",
    "service_account": "me@project.iam.gserviceaccount.com",
    "internal": True,
    "project": "project",
    "study": "widths",
}


def jobs(backend):
    shapes = {
        "queued": ["v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"],
        "compute": ["v5p:2x2x2", "v6e:4x4", "v6e:2x2"],
    }
    for shape, capacity, rich in itertools.product(shapes[backend], CAPACITIES, (False, True)):
        for slices in (1, 2) if backend == "queued" else (1,):
            for reservation in ("", "mine") if capacity == "reserved" else ("",):
                one = tpu_jobs.job(
                    backend=backend, topology=shape, capacity=capacity, slices=slices, reservation=reservation,
                    **(OPTIONS if rich else {}),
                )  # fmt: skip
                try:
                    check(one)
                    backends.get(one)
                except UserError:
                    continue
                yield one


@pytest.mark.parametrize("backend", ["queued", "compute"])
def test_every_command_is_documented(backend):
    count = 0
    for one in jobs(backend):
        made, nodes = backends.get(one), tuple(f"n{i}" for i in range(max(one.slices, one.hosts)))
        commands = [
            *made.create(one, REQUEST),
            *made.delete(one, REQUEST.zone, 2),
            made.describe(one, REQUEST.zone),
            *made.on_workers(one, REQUEST.zone, nodes, "echo it"),
            made.on_worker(one, REQUEST.zone, nodes, one.workers - 1, "echo it", ("-L 1:localhost:1",)),
            *made.copy(one, REQUEST.zone, nodes, "/local file", "remote/file"),
            made.maintain(one, REQUEST.zone, nodes, 0),
            made.listing("project", REQUEST.zone),
        ]
        for command in commands:
            assert command[0] == "gcloud"
            assert parse(list(command[1:])).track in ("", "alpha")
            count += 1
    assert count > 150


def created(**changes):
    (command,) = backends.get(tpu_jobs.job(**changes)).create(tpu_jobs.job(**changes), REQUEST)
    return parse(list(command[1:]))


def test_a_request_uses_alpha_only_where_it_must():
    for capacity in CAPACITIES:
        expected = "alpha" if capacity in ("best-effort", "flex-start") else ""
        assert created(capacity=capacity).track == expected
    assert created(capacity="reserved", reservation="mine").track == "alpha"
    assert created(capacity="flex-start").get("max-run-duration") == "7200s"
    assert created(capacity="spot").has("spot") and not created(capacity="on-demand").has("spot")


def test_what_a_request_asks_for():
    one = created(topology="v5e:4x8", slices=3)
    assert (one.get("type"), one.get("topology"), one.get("runtime-version")) == (
        "v5litepod",
        "4x8",
        "v2-alpha-tpuv5-lite",
    )
    assert (one.get("node-count"), one.get("node-prefix")) == ("3", "first")
    assert one.mapping("metadata-from-file") == {"startup-script": "/some where/a,b.sh"}
    assert one.mapping("labels")["scaling-dit-job"] == "first"
    group = tpu_jobs.job(backend="compute", topology="v5p:4x4x4", project="p")
    policy, _, template, managed = (
        parse(list(command[1:])) for command in backends.get(group).create(group, REQUEST)
    )
    assert policy.get("accelerator-topology") == "4x4x4" and policy.get("region") == "us-east5"
    assert template.get("machine-type") == "ct5p-hightpu-4t" and template.arguments == ("first-t2",)
    assert managed.get("size") == "16" and managed.get("target-size-policy-mode") == "bulk"
    assert managed.get("workload-policy") == "projects/p/regions/us-east5/resourcePolicies/first-4x4x4"


CREATE = "compute tpus queued-resources create"


@pytest.mark.parametrize(
    "command",
    [
        "beta compute tpus queued-resources list --zone=z",
        f"{CREATE} a --zone=z --runtime-version=r --node-id=a --type=v6e --topology=2x4 --best-effort",
        f"{CREATE} a --zone=z --runtime-version=r --node-id=a --type=v6e",
        f"{CREATE} a --zone=z --runtime-version=r --type=v6e --topology=2x4",
        f"{CREATE} a --zone=z --runtime-version=r --node-id=a --node-count=2 --type=v6e --topology=2x4",
        f"{CREATE} a --zone=z --runtime-version=r --node-count=1 --type=v6e --topology=2x4",
        f"{CREATE} a --runtime-version=r --node-id=a --type=v6e --topology=2x4",
        f"{CREATE} --zone=z --runtime-version=r --node-id=a --type=v6e --topology=2x4",
        "compute tpus tpu-vm simulate-maintenance-event a --zone=z",
        f"alpha {CREATE} a --zone=z --runtime-version=r --node-id=a --type=v6e --topology=2x4 --spott",
        "compute instance-groups managed create a --template=t --size=2",
        "compute instance-groups managed create a --template=t --size=2 --zone=z --target-size-policy-mode=all",
    ],
)
def test_the_tables_are_strict(command):
    with pytest.raises(FlagError):
        parse(command.split())


# Google's client knows the states, and the fields of what is no flex-start.
TPU = [tpu_v2, tpu_v2alpha1]


@pytest.mark.parametrize("client", TPU)
def test_the_states_are_those_of_google_s_client(client):
    known = {state.name for state in client.QueuedResourceState.State} - {"STATE_UNSPECIFIED"}
    assert len(known) == 9
    assert {state for state, _ in queued_resources.QUEUED_STATES} | {"ACTIVE"} == known
    initiators = {who.name for who in client.QueuedResourceState.StateInitiator}
    assert {who for _, who in queued_resources.QUEUED_STATES if who} < initiators and "SERVICE" in initiators
    nodes = {state.name for state in client.Node.State} - {"STATE_UNSPECIFIED"}
    assert nodes <= set(queued_resources.NODE_STATES)
    health = {health.name for health in client.Node.Health}
    assert set(queued_resources._HEALTHY) - {""} <= health


# Flag -> path of its field in a QueuedResource; two where v2 and v2alpha1 differ, the second for alpha.
FIELDS = {
    "--type": "tpu.node_spec.node.accelerator_config.type_",
    "--topology": "tpu.node_spec.node.accelerator_config.topology",
    "--runtime-version": "tpu.node_spec.node.runtime_version",
    "--node-id": "tpu.node_spec.node_id",
    "--node-count": "tpu.node_spec.multislice_params.node_count tpu.node_spec.multi_node_params.node_count",
    "--node-prefix": "tpu.node_spec.multislice_params.node_id_prefix tpu.node_spec.multi_node_params.node_id_prefix",
    "--labels": "tpu.node_spec.node.labels",
    "--metadata-from-file": "tpu.node_spec.node.metadata",
    "--network": "tpu.node_spec.node.network_config.network",
    "--subnetwork": "tpu.node_spec.node.network_config.subnetwork",
    "--internal-ips": "tpu.node_spec.node.network_config.enable_external_ips",
    "--service-account": "tpu.node_spec.node.service_account.email",
    "--spot": "spot",
    "--best-effort": "- best_effort",
    "--reserved": "tpu.node_spec.node.scheduling_config.reserved guaranteed.reserved",
    "--reservation": "reservation_name",
    "--valid-until-duration": "queueing_policy.valid_until_duration",
}
# Neither version of the client knows flex-start.
UNKNOWN = {"--provisioning-model", "--max-run-duration"}
NO_FIELDS = {"--async", "--quiet", "--zone", "--project"}


def has_field(message, path) -> bool:
    name, _, rest = path.partition(".")
    fields = message.meta.fields
    if name not in fields:
        return False
    return not rest or has_field(fields[name].message, rest)


def test_the_fields_of_requests_are_those_of_google_s_client():
    seen = set()
    for one in jobs("queued"):
        (command,) = backends.get(one).create(one, REQUEST)
        seen |= {word.partition("=")[0] for word in command if word.startswith("--")}
    assert seen - NO_FIELDS - UNKNOWN == set(FIELDS)
    for flag, paths in FIELDS.items():
        for client, path in zip(TPU, (paths.split() * 2)[:2], strict=True):
            # v2 has no best effort.
            assert has_field(client.QueuedResource, path) == (path != "-"), (flag, client.__name__)
    for client in TPU:
        fields = client.QueuedResource.meta.fields
        assert "provisioning_model" not in fields and "run_duration" not in fields


@pytest.mark.parametrize(
    "result, expected",
    [
        (Result(0), Answer.OK),
        (Result(1, "", "ERROR: (gcloud) ALREADY_EXISTS: x"), Answer.OK),
        (Result(1, "", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit exceeded"), Answer.REFUSED),
        (Result(1, "", "ERROR: There is no more capacity in the zone"), Answer.REFUSED),
        (Result(1, "", "ERROR: PERMISSION_DENIED: x"), Answer.WRONG),
        (Result(2, "", "ERROR: (gcloud) unrecognized arguments: --x"), Answer.WRONG),
        (Result(1, "", "ERROR: gcloud crashed (ConnectionError): reset"), Answer.NONE),
        (Result(-1, "", "gcloud did not end within 9 s"), Answer.NONE),
    ],
)
def test_answers_to_a_request(result, expected):
    assert answer(result)[0] is expected


def test_small_parts():
    assert mapping({"a": "1", "b": "2"}) == "a=1,b=2" and mapping({"a": "1,2", "b": "|"}) == "^~^a=1,2~b=|"
    assert seconds_of("1970-01-02T00:00:01.5Z") == 86401 and seconds_of("1970-01-01T01:00:00+01:00") == 0
    assert seconds_of("1969-12-31T20:00:00.000-04:00") == 0 and seconds_of("soon") == 0
    assert gcloud("a", track="alpha", project="p", zone="z") == (
        "gcloud",
        "alpha",
        "a",
        "--project=p",
        "--zone=z",
    )
    assert contract.counted(["A", "B", "A"]) == "A x 2, B" and contract.duration(0.2) == "1s"


def test_phases_of_nodes_and_instances():
    def phase(**node):
        return queued_resources._node(node)[0]

    assert phase(state="READY", health="HEALTHY") is Phase.READY
    assert phase(state="READY", health="UNHEALTHY_MAINTENANCE") is Phase.SICK
    assert phase(state="PREEMPTED", health="HEALTHY") is Phase.PREEMPTED
    assert phase(state="SOMETHING NEW") is Phase.UNKNOWN
    from scaling_dit.tpu.backends.compute_engine import _phase

    def group(*pairs, size=2):
        return _phase([{"currentAction": action, "instanceStatus": state} for action, state in pairs], size)[
            0
        ]

    assert group(("NONE", "RUNNING"), ("NONE", "RUNNING")) is Phase.READY
    assert group(("NONE", "RUNNING")) is Phase.PREEMPTED
    assert group() is Phase.WAITING and group(("CREATING", ""), ("CREATING", "")) is Phase.WAITING
    assert group(("CREATING", ""), ("NONE", "RUNNING")) is Phase.STARTING
    assert group(("NONE", "TERMINATED"), ("NONE", "RUNNING")) is Phase.PREEMPTED
    assert group(("DELETING", "RUNNING"), ("DELETING", "RUNNING")) is Phase.DELETING
    assert group(("NONE", "NEW STATE"), ("NONE", "RUNNING")) is Phase.UNKNOWN


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"name": "First"}, "--name=First: it must begin with a letter"),
        ({"name": "a" * 41}, "it must begin with a letter and have up to 40"),
        ({"name": "a; rm -rf"}, "--name=a; rm -rf"),
        ({"zones": ()}, "--zones missing"),
        ({"zones": ("us-east5",)}, "'us-east5' is not a zone"),
        ({"zones": ("us-east5-a", "us-east5-a")}, "a zone stands there twice"),
        ({"topology": "local"}, "a job needs a slice"),
        ({"topology": "v5e-16"}, "give the shape of the slice"),
        ({"owner": "Me!"}, "--owner=Me!"),
        (
            {"price": 0.0, "budget": tpu_jobs.with_budget(tpu_jobs.job(), dollars=5.0).budget},
            "--dollars needs a price",
        ),
        ({"environment": {"HF_TOKEN": "x"}}, "a secret is given by --secret=HF_TOKEN"),
        ({"environment": {"A B": "x"}}, "cannot be the name"),
        ({"reservation": "x"}, "--reservation goes together"),
        ({"backend": "compute", "topology": "v5e:4x4"}, "Compute Engine knows no v5e"),
        ({"backend": "compute", "slices": 2}, "several groups do not find each other"),
        ({"backend": "compute", "capacity": "best-effort"}, "Compute Engine has on-demand"),
        ({"backend": "compute", "capacity": "reserved"}, "needs --reservation"),
        (
            {"capacity": "flex-start", "budget": tpu_jobs.with_budget(tpu_jobs.job(), hours=169.0).budget},
            "168 hours",
        ),
    ],
)
def test_jobs_that_are_refused(changes, line):
    with pytest.raises(UserError, match=re.escape(line)):
        refuse(tpu_jobs.job(**changes))


def refuse(one):
    check(one)
    backends.get(one)


def test_a_job_survives_its_file():
    one = tpu_jobs.job(environment={"A": "b  c"}, secrets=("HF_TOKEN",), slices=2)
    assert from_json(one.to_json()) == one and isinstance(from_json(one.to_json()), Job)
    assert one.digest != tpu_jobs.job().digest and one.hosts == 2 and one.workers == 4
    assert tpu_jobs.job(topology="v6e:2x4").hosts == 1
    assert tpu_jobs.job(topology="v6e:2x4", backend="compute").hosts == 2
    for text in ("", "{}", one.to_json().replace("topology", "shape")):
        with pytest.raises(UserError, match="cannot be read"):
            from_json(text)

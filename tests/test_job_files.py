"""The job files of docs/tpu_jobs, as text: nothing starts them here."""

import shlex

import pytest
import yaml

from scaling_dit import config as config_lib
from scaling_dit.cli import main as cli
from scaling_dit.parallel import topologies
from tools import job_files

MADE = job_files.files()


def test_the_committed_files_are_the_script_s():
    found = {path.name: path.read_text() for path in job_files.FOLDER.iterdir()}
    assert found == MADE and len(MADE) == 9


@pytest.mark.parametrize(
    "name, expected",
    [("v4:2x2x4", "v4-32"), ("v5e:4x8", "v5litepod-32"), ("v5p:4x4x4", "v5p-128"), ("v6e:16x16", "v6e-256"),
     ("tpu7x:4x4x4", "tpu7x-128")],
)  # fmt: skip
def test_accelerator_types_count_cores_or_chips(name, expected):
    assert job_files.accelerator_type(topologies.parse(name)) == expected
    # Of one slice.
    assert job_files.accelerator_type(topologies.parse(name, slices=2)) == expected


def check_command(text):
    """Each `scaling-dit` command of a line is one that the program takes, with a config that it has."""
    for part in text.split(" && "):
        program, verb, *arguments = shlex.split(part)
        assert program == "scaling-dit"
        command = cli.VERBS[verb].parse(arguments)
        if command.config:
            config_lib.load(command.config, command.overrides)


@pytest.mark.parametrize("generation", job_files.SLICES)
def test_a_jobset_has_a_pod_for_each_host(generation):
    topology = topologies.parse(job_files.SLICES[generation])
    jobset = yaml.safe_load(MADE[f"gke_{generation}.yaml"])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 1 and spec["parallelism"] == spec["completions"] == topology.hosts > 1
    pod = spec["template"]["spec"]
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == job_files.SLICES[generation].partition(":")[2]
    assert selector["cloud.google.com/gke-tpu-accelerator"] in (
        "tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice", "tpu7x"
    )  # fmt: skip
    (container,) = pod["containers"]
    chips = container["resources"]
    assert chips["limits"] == chips["requests"] == {"google.com/tpu": "4"}
    assert topology.hosts * 4 == topology.chips
    check_command(container["command"][-1])


@pytest.mark.parametrize("generation", [name for name in job_files.SLICES if name != "tpu7x"])
def test_a_task_of_skypilot(generation):
    task = yaml.safe_load(MADE[f"skypilot_{generation}.yaml"])
    resources = task["resources"]
    kind, image = resources["accelerators"], resources["accelerator_args"]["runtime_version"]
    assert kind.startswith(f"tpu-{generation.replace('v5e', 'v5litepod')}-") and image
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75] and resources["use_spot"] is True
    assert "skypilot_tpu7x.yaml" not in MADE
    check_command(task["run"])

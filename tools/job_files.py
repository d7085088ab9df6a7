"""Writes the job files of docs/tpu_jobs for SkyPilot and for GKE from the topologies: python -m tools.job_files.

They are examples: replace what stands in capital letters.
"""

import pathlib
from typing import Any

import yaml

from scaling_dit.parallel import topologies
from scaling_dit.parallel.topologies import Topology

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "tpu_jobs"
# A small slice of several hosts of each generation.
SLICES = {"v4": "v4:2x2x4", "v5e": "v5e:4x8", "v5p": "v5p:2x2x4", "v6e": "v6e:4x8", "tpu7x": "tpu7x:2x2x4"}
# Generation -> (accelerator type before its number, cores that it counts for a chip, image).
TYPES = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": ("tpu7x", 2, ""),
}
# Generation -> name of its nodes in GKE.
NODES = {
    "v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}  # fmt: skip
COMMAND = "scaling-dit train --config=dit_scaling:uvit-h1024-d20-n16 --workdir=gs://BUCKET/runs/RUN"
SETUP = "pip install 'scaling-dit[tpu,gcs,tensorboard] @ git+https://HOST/REPOSITORY@COMMIT'"
# EX_TEMPFAIL: saved and stopped, or another host was lost. The same command resumes.
RESUMES = 75


def accelerator_type(topology: Topology) -> str:
    """The type of a slice as Cloud TPU names it, such as "v5p-32" for 16 chips."""
    assert topology.chip is not None
    name, cores, _ = TYPES[topology.chip.name]
    return f"{name}-{topology.chips // topology.slices * cores}"


def skypilot(topology: Topology) -> dict[str, Any]:
    """A SkyPilot task: `run` is started on every host of the slice."""
    assert topology.chip is not None
    return {
        "name": "scaling-dit",
        "resources": {
            "cloud": "gcp",
            "region": "REGION",
            "accelerators": f"tpu-{accelerator_type(topology)}",
            "accelerator_args": {
                "runtime_version": TYPES[topology.chip.name][2],
                "gcp_queued_resource": True,
            },
            "use_spot": True,
            "job_recovery": {
                "strategy": "FAILOVER",
                "max_restarts_on_errors": 2,
                "recover_on_exit_codes": [RESUMES],
            },
        },
        "setup": SETUP,
        "run": f"scaling-dit doctor --workdir=gs://BUCKET/runs --topology={topology.name} && {COMMAND}",
    }


def gke(topology: Topology) -> dict[str, Any]:
    """A JobSet: one pod for each host of a slice, one job for each slice."""
    chip = topology.chip
    assert chip is not None
    hosts = topology.hosts // topology.slices
    chips = str(min(chip.per_host, topology.chips // topology.slices))
    pod = {
        "restartPolicy": "Never",
        # SIGTERM saves, which takes as long as a checkpoint.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": NODES[chip.name],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.dims)),
            "cloud.google.com/gke-spot": "true",
        },
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            },
        ],
        "containers": [
            {
                "name": "train",
                "image": "REGION-docker.pkg.dev/PROJECT/REPOSITORY/scaling-dit:TAG",
                "command": ["bash", "-c", COMMAND],
                "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
            }
        ],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": "scaling-dit",
            # All pods of a slice on the nodes of one pool.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            # A preempted slice restarts all slices; the run resumes from its last checkpoint.
            "failurePolicy": {"maxRestarts": 20},
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": topology.slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "backoffLimit": 0,
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def files() -> dict[str, str]:
    """File name -> text, for every generation."""
    found = {}
    for generation, name in SLICES.items():
        topology = topologies.parse(name)
        about = f"{name}: {topology.chips} chips on {topology.hosts} hosts"
        found[f"gke_{generation}.yaml"] = _text(gke(topology), about, "kubectl apply -f")
        # Queued resources do not have TPU7x, so SkyPilot has not either.
        if TYPES[generation][2]:
            found[f"skypilot_{generation}.yaml"] = _text(skypilot(topology), about, "sky jobs launch")
    return found


def _text(value: dict[str, Any], about: str, command: str) -> str:
    head = f"# {about}. Replace what stands in capital letters, then: {command} FILE\n"
    return head + yaml.safe_dump(value, sort_keys=False, width=200)


def main() -> None:
    """Writes the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()

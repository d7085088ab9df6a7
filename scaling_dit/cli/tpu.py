"""The verb `tpu`: a table of verbs of its own, which `tpu/` of the repository declares.

`tpu/` is a program on top of the package, so it is found by name, as experiments are.
"""

import dataclasses
import importlib

from scaling_dit.cli.verb import Verb

INSTALLED = "scaling_dit.tpu.verbs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Verb):
    """Runs jobs on TPU slices of Google Cloud that survive preemption."""

    EXAMPLE = (
        "scaling-dit tpu launch --name=first --config=shapes --workdir=gs://bucket/first --topology=v5e:4x4 "
        "--zones=us-west4-a --hours=2"
    )
    ARGUMENTS = "VERB"

    @classmethod
    def verbs(cls) -> dict[str, type[Verb]]:
        """Its verbs."""
        return importlib.import_module(INSTALLED).VERBS

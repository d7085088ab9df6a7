"""The verbs of a study: `study` runs one, `advise` asks one."""

import dataclasses
import sys

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb, json_flag, own_code_flag, trust_if
from scaling_dit.errors import UserError
from scaling_dit.fields import COUNT, FEW, FROM_0, POSITIVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Verb):
    """Runs all members of a study, or resumes it, and keeps one table of them."""

    EXAMPLE = "scaling-dit study --config=experiments/studies/shapes_core.py --workdir=runs/core"

    config: str | None = flag("study: a name such as shapes_core, or path/to/file.py; both take :ARGUMENT")
    workdir: str = flag(
        "folder of the study, local or gs://; a study found there is resumed, and needs no --config",
        required=True,
        path=True,
    )
    at_once: int = flag(
        "members trained at the same time, each on its share of the CPU cores: small models gain little from many",
        1,
        FEW,
    )
    member: str | None = flag(
        "train and evaluate this member of the study in --workdir alone, and leave its tables to a later start"
    )
    own_code: bool = own_code_flag()

    def run(self) -> int:
        """Runs the study, and returns the exit codes of `train`."""
        trust_if(self.own_code)

        from scaling_dit.scaling import members_at_once, spec, study
        from scaling_dit.training.loop import Stopped

        if self.config is None and not study.StudyFolder(self.workdir).study.exists():
            raise UserError(
                f"{self.workdir} holds no study, so study needs --config; for example: {self.EXAMPLE}"
            )
        if self.member is not None and (self.config is not None or self.at_once != 1):
            raise UserError("--member goes with --workdir alone: the folder holds the study's members")
        try:
            if self.member is not None:
                members_at_once.settle()
                done = study.member(self.member, self.workdir)
                print(f"{done} runs of {self.member} are over; `scaling-dit study` writes the tables")
                return 0
            chosen = spec.load(self.config) if self.config else study.read_spec(self.workdir)
            found = study.study(chosen, self.workdir, at_once=self.at_once, own_code=self.own_code)
        except Stopped as stop:
            print(f"scaling-dit: {stop}", file=sys.stderr)
            return stop.code
        print(f"{found.runs} runs, {len(found.rows)} points: {found.folder.table}")
        print(f"its report: scaling-dit report {self.workdir}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advise(Verb):
    """Says what to train with a budget, by the laws of a study and a plan."""

    EXAMPLE = "scaling-dit advise --workdir=runs/core --budget=3e20 --topology=v5p:4x4x4"

    workdir: str = flag("folder of a study that has finished", required=True, path=True)
    budget: float = flag("training FLOPs of the run", None, POSITIVE, required=True)
    topology: str | None = flag("slice such as v5p:4x4x4 to plan the best run for; none without it")
    slices: int = flag("equal slices joined by the data-centre network", 1, COUNT)
    price: float | None = flag(
        "US dollars for a chip-hour; by default a rough list price of 2025", None, FROM_0
    )
    json: bool = json_flag()
    own_code: bool = own_code_flag()

    def run(self) -> int:
        """Prints the advice."""
        from scaling_dit.parallel import topologies

        topology = None
        if self.topology:
            # Before jax is imported.
            topologies.prepare_environment([self.topology])
            topology = topologies.parse(self.topology, self.slices)

        from scaling_dit.scaling import advise

        trust_if(self.own_code)
        return advise.main(self.workdir, self.budget, topology, price=self.price, as_json=self.json)

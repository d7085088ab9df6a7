"""The verbs of a study: `study` runs one, `advise` asks one."""

import dataclasses
import json
import sys
from typing import Any, TextIO

from scaling_dit.cli.options import flag, group
from scaling_dit.cli.train import Processes
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
        "train and evaluate this member of the study in --workdir alone; --tables or a later start writes the tables"
    )
    tables: bool = flag(
        "write the tables of the runs so far of the study in --workdir, for `report`; train nothing", False
    )
    queue: bool = flag(
        "write the study to --workdir and print its members as JSON for `tpu queue add`; train nothing", False
    )
    own_code: bool = own_code_flag()
    processes: Processes = group(Processes)

    def run(self) -> int:
        """Runs the study, and returns the exit codes of `train`."""
        trust_if(self.own_code)

        alone = ["--member"] * (self.member is not None) + ["--tables"] * self.tables
        if len(alone) > 1 or (alone and (self.config is not None or self.at_once != 1 or self.queue)):
            raise UserError(f"{alone[0]} goes with --workdir alone: the folder holds the study's members")
        if self.queue:
            return self._print_members()
        # What follows imports jax, and a supervisor has no use for that.
        return self.processes.run_together(self._train, self._settings, self.command)

    def _settings(self) -> Any:
        from scaling_dit import config as config_lib

        self._check_folder()
        # The members' own would need their configs, and what makes those may use jax, which has to join first.
        return config_lib.defaults().processes

    def _check_folder(self) -> None:
        from scaling_dit.scaling.folder import StudyFolder

        if self.config is None and not StudyFolder(self.workdir).study.exists():
            raise UserError(
                f"{self.workdir} holds no study, so study needs --config; for example: {self.EXAMPLE}"
            )

    def _train(self) -> int:
        """Trains all members, or one, or writes the tables."""
        self._check_folder()
        # Whether the start of this process stands in the study's folder already.
        noted = False
        if self.member is not None:
            from scaling_dit.scaling import members_at_once

            noted = members_at_once.settle()

        chosen = self._chosen()

        from scaling_dit.scaling import study
        from scaling_dit.training.loop import Stopped

        try:
            if self.member is not None:
                done = study.member(self.member, self.workdir, noted=noted)
                self._say(
                    f"{done} runs of {self.member} are over; `scaling-dit study --tables` writes the tables"
                )
                return 0
            if self.tables:
                found = study.write_tables(self.workdir)
            else:
                chosen = chosen or study.read_spec(self.workdir)
                found = study.study(chosen, self.workdir, at_once=self.at_once, own_code=self.own_code)
        except Stopped as stop:
            self._say(f"scaling-dit: {stop}", sys.stderr)
            return stop.code
        runs = f"{found.over} of {found.runs} runs are over" if self.tables else f"{found.runs} runs"
        self._say(f"{runs}, {len(found.rows)} points: {found.folder.table}")
        self._say(f"its report: scaling-dit report {self.workdir}")
        return 0

    def _chosen(self) -> Any:
        """The spec of --config; first, so that a mistake in it is told before the slow imports."""
        from scaling_dit.scaling import spec

        return spec.load(self.config) if self.config else None

    @staticmethod
    def _say(line: str, file: TextIO | None = None) -> None:
        """Prints a line, in process 0 of several."""
        import jax

        if jax.process_index() == 0:
            print(line, file=file)

    def _print_members(self) -> int:
        """Checks and registers the study, and prints what a queue needs to know of it."""
        self._check_folder()
        chosen = self._chosen()

        from scaling_dit.scaling import queue_members, study

        chosen = chosen or study.read_spec(self.workdir)
        folder = study.StudyFolder(self.workdir)
        study.prepare(chosen, folder)
        print(json.dumps(queue_members.of(chosen, folder, own_code=self.own_code), indent=1))
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

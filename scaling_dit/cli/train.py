"""The verb `train`."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from scaling_dit.cli.exit_codes import report_errors
from scaling_dit.cli.options import flag, group
from scaling_dit.cli.verb import Verb, config_flag, own_code_flag
from scaling_dit.errors import UserError
from scaling_dit.fields import COUNT, FROM_0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The flags of every verb that several processes run as one."""

    coordinator: str | None = flag("HOST:PORT of process 0, for several processes; detected on TPU slices")
    processes: int | None = flag("how many processes there are", None, COUNT)
    process: int | None = flag("which of them this is, from 0", None, FROM_0)

    def run_together(
        self, main: Callable[[], int], settings: Callable[[], Mapping[str, Any]], command: tuple[str, ...]
    ) -> int:
        """Runs `main` joined with the other processes of the run, if there are any.

        Args:
          settings: gives `config.processes`; called where there are others, and not in the supervisor of this process.
          command: this command, after the program's name.
        """
        from scaling_dit.parallel import processes

        membership = processes.from_flags(self.coordinator, self.processes, self.process)
        return processes.run_supervised(lambda: report_errors(main), membership, settings, command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Trains a run, or resumes it from its last checkpoint."""

    EXAMPLE = "scaling-dit train --config=shapes --workdir=runs/shapes --config.steps=2000"
    OVERRIDES = True

    config: str | None = config_flag()
    workdir: str = flag(
        "folder of the run, local or gs://; a run found there is resumed, and needs no --config",
        required=True,
        path=True,
    )
    from_: str | None = flag(
        "begin a new run with another's weights: its folder, RUN@STEP, or a safetensors file of a backbone; without "
        "--config, with its config too",
        path=True,
    )
    from_ema: str | None = flag(
        "which weights of --from: a decay of its EMAs, power-WIDTH, or none: the raw weights"
    )
    strict: bool = flag(
        "refuse a damaged checkpoint; by default it is set aside and the run resumes from an older one", False
    )
    own_code: bool = own_code_flag()
    processes: Processes = group(Processes)

    def run(self) -> int:
        """Trains, and returns the exit codes of `training.loop.main`."""
        # Before the slow imports, for goodput. This clock is never set.
        began = time.perf_counter()
        if self.from_ema and not self.from_:
            raise UserError(f"train --from_ema={self.from_ema} belongs to --from, which is not given")
        # Only where it is trained: a supervisor starts its process at once.
        config = functools.cache(self._config)

        def train() -> int:
            # First, so that a mistake in it is told before the slow imports.
            chosen = config()

            from scaling_dit.scaling.folder import StudyFolder

            StudyFolder(self.workdir).check_is_no_study()

            from scaling_dit.training.base import Start
            from scaling_dit.training.loop import main

            start = Start.parse(self.from_, self.from_ema, own_code=self.own_code) if self.from_ else None
            clock = time.time() - (time.perf_counter() - began)
            return main(chosen, self.workdir, clock, strict=self.strict, start=start)

        return self.processes.run_together(train, lambda: config().processes, self.command)

    def _config(self) -> Any:
        """The resolved config: of the experiment, else the workdir's, else that of the run to begin from."""
        from scaling_dit import config as config_lib

        if self.config:
            return config_lib.load(self.config, self.overrides)

        from scaling_dit.checkpoints.workdir import Workdir, read_config

        if not Workdir(self.workdir).config.exists() and self.from_:
            from scaling_dit.training.base import Start

            base = Start.parse(self.from_).place
            if Workdir(base).config.exists():
                return read_config(base, self.overrides, own_code=self.own_code)
            raise UserError(f"{base} holds no run whose config could be taken over, so train needs --config")
        if not Workdir(self.workdir).config.exists():
            raise UserError(
                f"{self.workdir} holds no run, so train needs --config; for example: {self.EXAMPLE}"
            )
        return read_config(self.workdir, self.overrides, own_code=self.own_code)

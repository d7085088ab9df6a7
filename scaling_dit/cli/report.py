"""The verb `report`."""

import dataclasses

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb, json_flag
from scaling_dit.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Reports where a run's time went, its losses, speed, evaluations, checkpoints."""

    EXAMPLE = "scaling-dit report runs/shapes"
    ARGUMENTS = "[RUN]"

    workdir: str | None = flag("folder of the run, in place of the argument", path=True)
    json: bool = json_flag()

    def run(self) -> int:
        """Prints the report."""
        runs = [*self.arguments, *([self.workdir] if self.workdir else [])]
        if len(runs) != 1:
            raise UserError(f"report takes one run, not {len(runs)}; for example: {self.EXAMPLE}")

        from scaling_dit.training import report

        return report.main(runs[0], as_json=self.json)

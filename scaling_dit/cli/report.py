"""The verb `report`."""

import dataclasses

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb, json_flag, own_code_flag, trust_if
from scaling_dit.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Reports where a run's time went and its results; of a study, a page with all.

    A folder that `study` wrote gets a page, and several such folders one page over all their members.
    """

    EXAMPLE = "scaling-dit report runs/shapes"
    ARGUMENTS = "[RUN or STUDY ...]"

    workdir: str | None = flag("folder of the run or study, in place of the argument", path=True)
    json: bool = json_flag()
    own_code: bool = own_code_flag()

    def run(self) -> int:
        """Prints the report."""
        folders = [*self.arguments, *([self.workdir] if self.workdir else [])]
        if not folders:
            raise UserError(f"report takes one run, not 0, or studies; for example: {self.EXAMPLE}")

        from scaling_dit.files import expand
        from scaling_dit.scaling.folder import StudyFolder

        folders = [expand(folder) for folder in folders]
        studies = [folder for folder in folders if StudyFolder(folder).study.exists()]
        if studies:
            if len(studies) != len(folders):
                other = next(folder for folder in folders if folder not in studies)
                raise UserError(f"{other} is no study, so it cannot be reported together with {studies[0]}")

            from scaling_dit.scaling import report as study_report

            trust_if(self.own_code)
            return study_report.main(studies, as_json=self.json)
        if len(folders) != 1:
            raise UserError(f"report takes one run, not {len(folders)}; for example: {self.EXAMPLE}")

        from scaling_dit.training import report

        return report.main(folders[0], as_json=self.json)

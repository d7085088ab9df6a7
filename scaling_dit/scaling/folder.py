"""The folder of a study: where each of its files lies. No other module names one of them."""

import os

from etils import epath

from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError

RESULT = "result.json"


class StudyFolder(os.PathLike[str]):
    """The folder of a study, local or gs://, and the paths of its files.

    Args:
      folder: of the study; it need not exist.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self.folder = epath.Path(folder)
        # The spec with all configs, and when each claim was registered; written before the first run.
        self.study = self.folder / "study.json"
        # One row for each run and point: nothing in it depends on when or how fast the runs ran.
        self.table = self.folder / "table.parquet"
        # One row for each run: wall time, speed, memory, goodput.
        self.measured = self.folder / "measured.parquet"
        # One row for each score: run, point, generation seed, guidance, metric.
        self.scores = self.folder / "scores.parquet"
        # A file for each start: when, by which command, on what machine. Slices that share a study start side by side.
        self.starts = self.folder / "starts"
        # All starts of a study that an earlier version began.
        self.machines = self.folder / "machines.json"
        # Of all runs: TensorBoard opens this one.
        self.tensorboard = self.folder / "tensorboard"
        self.compile_cache = self.folder / "compile_cache"
        self.report = self.folder / "report"

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def check_is_no_study(self) -> None:
        """Raises UserError for a study's folder, before a run begins in it; one with both is as it may be."""
        if self.study.exists() and not self._holds_run():
            raise UserError(f"{self} holds a study ({self.study.name}), not a run; give another --workdir")

    def check_is_no_run(self) -> None:
        """The other way round."""
        if self._holds_run() and not self.study.exists():
            raise UserError(f"{self} holds a run, not a study; give another --workdir")

    def _holds_run(self) -> bool:
        run = Workdir(self.folder)
        return run.config.exists() or run.checkpoints.exists()

    def run(self, member: str, seed: int) -> Workdir:
        """The workdir of one run."""
        return Workdir(self.folder / "runs" / member / f"seed{seed}")

    def memory(self, member: str, seed: int) -> epath.Path:
        """What the driver said of the device's memory after a run, as JSON."""
        return self.folder / "runs" / member / f"seed{seed}.memory.json"

    def stopped(self, member: str, seed: int) -> epath.Path:
        """Why a run ended early for good, as JSON; the run's folder lies beside it."""
        return self.folder / "runs" / member / f"seed{seed}.stopped.json"


def scores_folder(run: Workdir, step: int, seed: int, items: int, guidance: float | None) -> epath.Path:
    """The folder of one evaluation of a run: `evaluate` writes each metric's result below it."""
    scale = "" if guidance is None else f"-guidance{guidance:g}"
    return run.evaluation / f"study-step{step}-seed{seed}-n{items}{scale}"

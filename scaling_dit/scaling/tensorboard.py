"""A study in TensorBoard: one log folder for all runs, with what differs between members as hyperparameters.

Curves over steps have the names that a run's own have. Those under `by_gflop/` have training GFLOPs in place of steps,
so that members of different cost compare at equal compute.
"""

import functools
import sys
from typing import Any

import jax
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.monitor.writers import TensorBoardWriter
from scaling_dit.scaling import ladder, table
from scaling_dit.scaling.columns import Columns
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

_CURVES = ("train/loss", "validation/", "speed/images_per_second")


def write(spec: StudySpec, folder: StudyFolder, member: Member, seed: int) -> None:
    """Writes a run to the study's log folder, again where a killed start left it; one line says if it cannot."""
    if jax.process_index() != 0:
        return
    logs = place(folder, member, seed)
    if logs.exists():
        logs.rmtree()
    try:
        writer = TensorBoardWriter(logs)
    except ModuleNotFoundError as error:
        _say_missing(str(error.name))
        return
    one = ladder.cost(member.config)
    writer.hparams(hparams(spec, member, seed))
    for row in read_metrics(folder.run(member.name, seed)):
        shown = {name: value for name, value in row.items() if name.startswith(_CURVES)}
        if shown:
            writer.scalars(row["step"], shown)
    for row in table.run_rows(spec, folder, member, seed):
        scores = {name: row[name] for name in Columns(spec, [row], []).scores()}
        writer.scalars(row["step"], {f"evaluation/{name}": value for name, value in scores.items()})
        gflop = round(one.train_flops(row["step"]) / 1e9)
        writer.scalars(gflop, {f"by_gflop/{name}": value for name, value in scores.items()})
    writer.close()


@functools.cache
def _say_missing(module: str) -> None:
    """Says once that there is no TensorBoard."""
    print(f"scaling-dit: no TensorBoard of the study: no module {module!r}", file=sys.stderr)


def place(folder: StudyFolder, member: Member, seed: int) -> epath.Path:
    """The log folder of one run."""
    return folder.tensorboard / f"{member.name}-seed{seed}"


def hparams(spec: StudySpec, member: Member, seed: int) -> dict[str, Any]:
    """Member, seed and costs of a run, and the fields in which the study's members differ."""
    every = [config_lib.flatten(each.config) for each in spec.members]
    own = config_lib.flatten(member.config)
    varied = {key: value for key, value in own.items() if any(each.get(key) != value for each in every)}
    one = ladder.cost(member.config)
    costs = {"params": one.params, "train_flops": float(one.train_flops())}
    return {"member": member.name, "seed": seed, **costs, **varied}

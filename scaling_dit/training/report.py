"""`scaling-dit report RUN`: where a run's time went, how far it is, and what it has measured so far."""

import json
from typing import Any

from etils import epath

from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_metrics, read_saved
from scaling_dit.errors import UserError, printable
from scaling_dit.monitor import goodput
from scaling_dit.training import rewind

# Last training losses that a report shows.
_LOSSES = 5
_SPEED = "speed/"


def report(workdir: epath.PathLike) -> dict[str, Any]:
    """The facts of a run, also while it is running or after it was killed.

    Returns:
      "goodput" as in `goodput.summary`; "steps" done and "of" how many; "backbone", "batch"; "losses" {step: the last
      few}; "speed" as last written; "evaluation" {metric: {"step", "value"}}, the newest of each; "checkpoints", steps;
      "rewinds", a list of `rewind.Rewind` as dicts.

    Raises:
      UserError: the folder holds no run.
    """
    run = Workdir(workdir)
    saved = read_saved(run)
    backbone, batch, steps = saved.get("backbone", {}).get("name"), saved.get("batch"), saved.get("steps")
    if not (isinstance(backbone, str) and type(batch) is int and type(steps) is int):
        raise UserError(
            f"{run.config} is damaged: it does not say backbone.name, batch and steps; put it back"
        )
    metrics = read_metrics(run)
    losses = [(row["step"], row["train/loss"]) for row in metrics if "train/loss" in row]
    speed: dict[str, float] = {}
    evaluation: dict[str, dict[str, Any]] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith(_SPEED):
                speed[name.removeprefix(_SPEED)] = value
            elif name.startswith(("validation/", "evaluation/")):
                evaluation[name] = {"step": row["step"], "value": value}
    with Checkpoints(run.checkpoints, read_only=True) as store:
        checkpoints = store.all_steps()
    return {
        "workdir": str(run),
        "backbone": printable(backbone),
        "batch": batch,
        "steps": max([step for step, _ in losses] + checkpoints, default=0),
        "of": steps,
        "losses": dict(losses[-_LOSSES:]),
        "speed": speed,
        "evaluation": evaluation,
        "checkpoints": checkpoints,
        "rewinds": [one._asdict() for one in rewind.read(run.rewinds)],
        "goodput": goodput.summary(run.goodput),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """A report as lines for people."""
    speed = facts["speed"]
    shown = [
        f"{facts['workdir']}: {facts['backbone']}, batch {facts['batch']:,}, step {facts['steps']:,} of {facts['of']:,}"
    ]
    if facts["losses"]:
        shown.append("last losses: " + ", ".join(f"{x:.4g} (step {s:,})" for s, x in facts["losses"].items()))
    if speed:
        shown.append(
            f"speed: {speed['steps_per_second']:.3g} steps/s, {speed['images_per_second']:.4g} images/s, "
            f"{speed['data_wait']:.0%} of it waiting for data"
            + (f", MFU {speed['mfu']:.1%}" if "mfu" in speed else "")
        )
    width = max(map(len, facts["evaluation"]), default=0)
    shown += [
        f"{name:{width}} {one['value']:.4f} (step {one['step']:,})"
        for name, one in facts["evaluation"].items()
    ]
    shown.append("checkpoints: " + (", ".join(f"{step:,}" for step in facts["checkpoints"]) or "none"))
    shown += [
        f"rewind: loss spike at step {one['spike']:,}, back to {one['to']:,}, "
        f"without data steps {one['data_from']:,} to {one['data_to'] - 1:,}"
        for one in facts["rewinds"]
    ]
    return [*shown, "", *goodput.lines(facts["goodput"])]


def main(workdir: str, *, as_json: bool = False) -> int:
    """The `report` verb."""
    facts = report(workdir)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts)))
    return 0

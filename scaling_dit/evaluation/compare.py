"""`evaluate --compare`: the results of several runs, prompt by prompt.

Two runs that were scored on the same prompts are compared by the differences of each prompt's scores, which needs far
fewer prompts than two separate intervals. The other runs are compared with the first. P-values are corrected for all
comparisons of the command (Holm 1979). The unit is the prompt: a result is about these two checkpoints, and says
nothing about how much another training seed would change them; `scaling.claims` has that.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation import sweep
from scaling_dit.evaluation.differences import Bootstrap, holm, paired_bootstrap
from scaling_dit.evaluation.registry import METRICS, is_lower_better
from scaling_dit.evaluation.results import DONE, RESULTS, ROWS, Results

# What two results must share to be compared, if either has it.
_SAME = (
    "prompts_sha256", "judge", "template", "choice_rule", "accepted_rule", "weights_sha256", "resize", "reference",
    "prompt_transform", "sampler", "steps", "guidance_method", "guidance_rescale", "guidance_interval",
)  # fmt: skip
_LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run with one metric.

    Attributes:
      run: as the user named it.
      rows: results of its newest checkpoint with any guidance and seed.
      root: the folder that the rows' folders are in.
    """

    run: str
    rows: Sequence[Mapping[str, Any]]
    root: epath.Path

    def at(self, guidance: float | None) -> list[Mapping[str, Any]]:
        """The rows of one guidance, over generation seeds."""
        return [row for row in self.rows if row.get("guidance") == guidance]

    def scores(self, guidance: float | None) -> dict[str, float]:
        """The score of each prompt, mean over generation seeds; empty for a metric without scores of images."""
        found: dict[str, list[float]] = {}
        for row in self.at(guidance):
            for line in (self.root / row["folder"] / ROWS).read_text().split("\n"):
                if line:
                    one = json.loads(line)
                    if isinstance(one.get("score"), int | float):
                        found.setdefault(one["id"], []).append(one["score"])
        return {key: float(np.mean(some)) for key, some in found.items()}


def main(runs: Sequence[str], *, metrics: Sequence[str] | None = None, as_json: bool = False) -> int:
    """Prints the comparison; returns the exit code.

    Args:
      runs: workdirs, or folders with a `results.jsonl`.
      metrics: to compare; by default all that every run has.

    Raises:
      UserError: fewer than two runs, no results, or results that were not made alike; or rows of an earlier version
        that name a metric of a user's own, which the user of this process has not named.
    """
    found = compare(runs, metrics)
    if as_json:
        print(json.dumps(found))
        return 0
    for metric, one in found.items():
        print(_table(metric, one))
    print(
        "differences: by prompt, with 95 % bootstrap intervals; p corrected for all of them (Holm). They are about "
        "these checkpoints: another training seed may change more."
    )
    return 0


def compare(runs: Sequence[str], metrics: Sequence[str] | None = None) -> dict[str, Any]:
    """Metric -> `scalar`, `guidance` of the comparison, `runs` with their values, and `differences` from the first run.

    A value is at the protocol's guidance and at the best one (`sweep.summarize`). The comparison is at the protocol's
    guidance if all runs have it, else at the only one that they share.
    """
    if len(runs) < 2:
        raise UserError("evaluate --compare needs two runs or more: --compare RUN RUN ...")
    if len(set(runs)) < len(runs):
        raise UserError("evaluate --compare names a run twice")
    read = {run: _read(run) for run in runs}
    shared = [name for name in read[runs[0]] if all(name in found for found in read.values())]
    for name in metrics or ():
        if name not in shared:
            raise UserError(
                f"not every run has results of metric {name!r}; {nearest(name, shared or METRICS)}"
            )
    config_lib.trust_names(metrics or ())
    names = list(metrics or shared)
    if not names:
        raise UserError(f"{', '.join(runs)} have no metric in common")
    found = {name: _compared(name, [read[run][name] for run in runs]) for name in names}
    _correct(found)
    return found


def _read(run: str) -> dict[str, Entry]:
    """Metric -> the results of a run's newest checkpoint that has some."""
    workdir = Workdir(run)
    for root in (workdir.folder, workdir.evaluation):
        if (root / RESULTS).exists():
            rows = [row for row in Results(root).read() if row.get("status") == DONE]
            break
    else:
        raise UserError(f"{run} has no {RESULTS}; evaluate it first: scaling-dit evaluate --workdir={run}")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["metric"], []).append(row)
    entries = {}
    for name, some in found.items():
        newest = max(row.get("step") or 0 for row in some)
        some = [row for row in some if (row.get("step") or 0) == newest]
        # Of several requests of one metric the latest counts, with all others that were made alike.
        some = [row for row in some if _alike(row, some[-1]) is None]
        entries[name] = Entry(run, some, root)
    return entries


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What two results do not share but must, the first such key; None if nothing."""
    return next((key for key in _SAME if one.get(key) != other.get(key)), None)


def _is_lower_better(metric: str, entries: Sequence[Entry]) -> bool:
    """As the rows say, else as the metric does.

    Raises:
      UserError: rows that differ, or older ones of a metric of a user's own, which may not run here.
    """
    said = {
        bool(row["lower_is_better"]) for entry in entries for row in entry.rows if "lower_is_better" in row
    }
    if len(said) > 1:
        raise UserError(
            f"metric {metric!r}: by some results lower is better and by others higher; evaluate all runs anew"
        )
    if said:
        return said.pop()
    # Rows of an earlier version.
    config_lib.check_names({"metric": metric}, str(entries[0].root / RESULTS))
    return is_lower_better(metric)


def _compared(metric: str, entries: Sequence[Entry]) -> dict[str, Any]:
    first = entries[0]
    for entry in entries[1:]:
        if key := _alike(first.rows[-1], entry.rows[-1]):
            raise UserError(
                f"metric {metric!r}: {first.run} and {entry.run} cannot be compared: {key} is "
                f"{first.rows[-1].get(key)!r} and {entry.rows[-1].get(key)!r}; evaluate both alike"
            )
    scales = set.intersection(*({row.get("guidance") for row in entry.rows} for entry in entries))
    if not scales:
        raise UserError(
            f"metric {metric!r}: the runs have no guidance in common; evaluate both with one --guidance"
        )
    scale = sweep.PROTOCOL if sweep.PROTOCOL in scales else min(scales, key=lambda value: value or 0.0)
    lower = _is_lower_better(metric, entries)
    runs = []
    for entry in entries:
        row = entry.at(scale)[-1]
        name = next(iter(row["scalars"]))
        value = float(np.mean([one["scalars"][name] for one in entry.at(scale)]))
        one = {"run": entry.run, "step": row.get("step"), "value": value, "seeds": len(entry.at(scale))}
        one |= {"interval": row.get("interval"), "n": row["n"]}
        if row.get("guidance") is not None:
            summary = sweep.summarize(entry.rows, {metric: lower})[metric]
            one |= {key: summary[key] for key in ("protocol", "best", "best_guidance")}
        runs.append(one)
    scores = [entry.scores(scale) for entry in entries]
    differences = []
    for entry, other in zip(entries[1:], scores[1:], strict=True):
        ids = [key for key in scores[0] if key in other]
        if len(ids) < 2:
            differences.append({"run": entry.run, "effect": None, "why": "it has no score of each image"})
            continue
        found: Bootstrap = paired_bootstrap(
            np.array([other[key] for key in ids]), np.array([scores[0][key] for key in ids])
        )
        differences.append({"run": entry.run, **dataclasses.asdict(found)})
    name = next(iter(first.rows[-1]["scalars"]))
    return {
        "scalar": name, "lower_is_better": lower, "guidance": scale, "runs": runs, "differences": differences,
    }  # fmt: skip


def _correct(found: Mapping[str, Any]) -> None:
    """Adds `p_holm` and `verdict` to all differences, in place."""
    tested = [
        (one, metric["lower_is_better"])
        for metric in found.values()
        for one in metric["differences"]
        if one["effect"] is not None
    ]
    for (one, lower), p in zip(tested, holm([one["p"] for one, _ in tested]), strict=True):
        one["p_holm"] = p
        better = one["effect"] < 0 if lower else one["effect"] > 0
        one["verdict"] = "undecided" if p > _LEVEL else "better" if better else "worse"


def _table(metric: str, found: Mapping[str, Any]) -> str:
    differences = {one["run"]: one for one in found["differences"]}
    lines = [["run", "step", "value", "best", "difference", "95 % interval", "p (Holm)", "detectable", ""]]
    for run in found["runs"]:
        best = f"{run['best']:.4g} at {run['best_guidance']:g}" if "best" in run else "-"
        line = [run["run"], str(run["step"] if run["step"] is not None else "-"), f"{run['value']:.4g}", best]
        one = differences.get(run["run"])
        if one is None:
            line += ["", "", "", "", "the first"]
        elif one["effect"] is None:
            line += ["-", "-", "-", "-", one["why"]]
        else:
            low, high = one["interval"]
            line += [
                f"{one['effect']:+.4g}", f"{low:+.3g} to {high:+.3g}", f"{one['p_holm']:.3g}",
                f"{one['detectable']:.3g}", one["verdict"],
            ]  # fmt: skip
        lines.append(line)
    scale = "" if found["guidance"] is None else f", guidance {found['guidance']:g}"
    return f"{metric} ({found['scalar']}, n {found['runs'][0]['n']}{scale})\n{sweep.columns(lines)}\n"

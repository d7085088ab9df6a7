"""The table of a study: one row for each run and point, read from the runs' own files.

A row is a plain dict. Everything in `run_rows` follows from the spec and from what the runs computed, so a study that
was killed and resumed gives the same rows, and the same parquet file byte for byte with one version of pyarrow. What
depends on the machine (wall time, speed, memory, goodput) stands in `run_measured`, for a table of its own.
"""

import functools
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit import files
from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.config.named import section_of
from scaling_dit.errors import UserError
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.request import Request, config_of
from scaling_dit.monitor import goodput
from scaling_dit.scaling import ladder
from scaling_dit.scaling.folder import RESULT, StudyFolder, scores_folder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec, config_hash, is_loss, point_steps

Row = dict[str, Any]
DONE, RUNNING, STOPPED, WAITING = "done", "running", "stopped", "waiting"
# Columns of every row, in their order; losses by timestep, metrics and groups follow.
COLUMNS = (
    "member",
    "seed",
    "family",
    "status",
    "step",
    "steps",
    "samples",
    "params",
    "macs_paper",
    "macs_total",
    "train_flops",
    "train_flops_paper",
    "inference_flops",
    "endpoint",
    "config_hash",
    "loss",
)
# Columns of an axis of the members, and of the ends of a score's interval.
GROUP = "group_"
ENDS = ("_low", "_high")
# Columns that the table by member has besides: the number of seeds, and the deviation of each score.
_SEEDS, _DEVIATION = "seeds", "_sd"
_SPEED = "speed/mean_images_per_second"
_BIN = re.compile(r"validation/(loss_t\d+-\d+)")
_REMEDY = "put the file back"
_RENAME = "rename it in its class, and give the study another --workdir"
_INSTALL = "needs pyarrow for its tables: pip install 'scaling-dit[study]'"


def run_rows(spec: StudySpec, folder: StudyFolder, member: Member, seed: int) -> list[Row]:
    """The rows of one run so far, by rising step; only finished points have one.

    Columns: those of COLUMNS; "loss_t0000-0199", ...; each metric's scalars, with "_low" and "_high" where there is an
    interval; and "group_AXIS" for each axis of the members.
      train_flops: 6 x MACs x samples up to this step, products inside attention included; `_paper` without them.
      endpoint: whether the point stands for a run of its own with this many steps: the last one does, and each one
        after warm-up at a constant learning rate.
    """
    run = folder.run(member.name, seed)
    if not run.config.exists():
        return []
    config, one = member.config, ladder.cost(member.config)
    status, digest = status_of(spec, folder, member, seed), config_hash(config)
    by_step = {row["step"]: row for row in read_metrics(run) if "validation/loss" in row}
    found = []
    for step in point_steps(config.steps, spec.points):
        if step not in by_step or not all(path.exists() for path in results(spec, run, step).values()):
            continue
        row: Row = {
            "member": member.name,
            "seed": seed,
            "family": str(config.backbone.name),
            "status": status,
            "step": step,
            "steps": config.steps,
            "samples": step * config.batch,
            "params": one.params,
            "macs_paper": one.macs_paper,
            "macs_total": one.macs_total,
            "train_flops": float(one.train_flops(step)),
            "train_flops_paper": float(one.train_flops(step, paper=True)),
            "inference_flops": None if one.inference_flops is None else float(one.inference_flops),
            "endpoint": step == config.steps
            or (config.optim.decay == "constant" and step > config.optim.warmup_steps),
            "config_hash": digest,
            "loss": by_step[step]["validation/loss"],
        }
        bins = {m[1]: value for name, value in by_step[step].items() if (m := _BIN.fullmatch(name))}
        row |= dict(sorted(bins.items()))
        scores = {metric: _averaged(spec, run, step, metric) for metric in spec.metrics}
        _check_names({metric: scalars for metric, (scalars, _) in scores.items()})
        for _, columns in scores.values():
            row |= columns
        row |= {f"{GROUP}{axis}": label for axis, label in sorted(member.groups.items()) if axis != "family"}
        found.append(row)
    return found


def status_of(spec: StudySpec, folder: StudyFolder, member: Member, seed: int) -> str:
    """The state of a run: "done", "stopped" (its loss was not finite, or kept spiking), "running" or "waiting"."""
    run = folder.run(member.name, seed)
    if folder.stopped(member.name, seed).exists():
        return STOPPED
    if not run.config.exists():
        return WAITING
    last = member.config.steps
    scored = all(path.exists() for path in results(spec, run, last).values())
    if scored and any(row["step"] == last and "validation/loss" in row for row in read_metrics(run)):
        return DONE
    return RUNNING


def results(spec: StudySpec, run: Workdir, step: int) -> dict[tuple[str, int, float | None], epath.Path]:
    """(metric, generation seed, guidance or None for the config's own) -> the file of its result at a step."""
    folders = _metric_folders(str(run), spec.metrics)
    scales: tuple[float | None, ...] = (None, *(spec.guidances if step == _last(run) else ()))
    paths = {}
    for metric in spec.metrics:
        for seed in spec.generation_seeds:
            for scale in scales:
                place = scores_folder(run, step, seed, spec.items, scale)
                paths[metric, seed, scale] = place / folders[metric] / RESULT
    return paths


@functools.lru_cache(maxsize=4096)
def _metric_folders(run: str, metrics: tuple[str, ...]) -> dict[str, str]:
    """Metric -> the folder of its results in an evaluation of this run, which depends on the metric's fields."""
    if not metrics:
        return {}
    config = config_of(Request(workdir=run, metrics=metrics))
    return {one.name: one.folder for one in choose(config, config.eval.metrics)}


def _last(run: Workdir) -> int:
    return int(files.read_json(run.config, dict, _REMEDY)["steps"]) if run.config.exists() else -1


def _averaged(spec: StudySpec, run: Workdir, step: int, metric: str) -> tuple[list[str], dict[str, float]]:
    """(names of a metric's scalars, their columns) at the config's own guidance.

    Columns are means over generation seeds, and means of their intervals.
    """
    paths = results(spec, run, step)
    found = [files.read_json(paths[metric, seed, None], dict, _REMEDY) for seed in spec.generation_seeds]
    read = [_flat(metric, one) for one in found]
    return list(found[0]["scalars"]), {
        name: statistics.fmean(one[name] for one in read) for name in read[0] if all(name in o for o in read)
    }


def _flat(metric: str, result: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a result, and "NAME_low", "NAME_high" of those with an interval."""
    intervals = _intervals(metric, result)
    flat: dict[str, float] = {}
    for name, value in result["scalars"].items():
        flat[name] = float(value)
        if name in intervals:
            flat |= dict(zip((f"{name}{end}" for end in ENDS), intervals[name], strict=True))
    return flat


def _intervals(metric: str, result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Scalar -> (low, high): of the first, whose interval a result has, and of types."""
    found = {
        f"{section_of(metric)}_{kind}": ends for kind, ends in result.get("interval_by_type", {}).items()
    }
    if result.get("interval"):
        found[next(iter(result["scalars"]))] = result["interval"]
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def _check_names(scalars: Mapping[str, Sequence[str]]) -> None:
    """Makes sure that the scalars of the metrics have columns of their own: one would silently stand for another.

    Raises:
      UserError: two of one name, or one with the name of another column.
    """
    owners: dict[str, str] = {}
    for metric, names in scalars.items():
        for name in names:
            if name in owners:
                raise UserError(
                    f"metrics {owners[name]!r} and {metric!r} have a scalar {name!r} each, and a study's table one "
                    f"column of a name; {_RENAME}"
                )
            owners[name] = metric
    for name, metric in owners.items():
        base = next((name.removesuffix(e) for e in (*ENDS, _DEVIATION) if name.endswith(e)), name)
        if (
            name in (*COLUMNS, _SEEDS)
            or is_loss(name)
            or name.startswith(GROUP)
            or (base != name and base in owners)
        ):
            raise UserError(
                f"metric {metric!r} has a scalar {name!r}, which is another column of a study's tables; {_RENAME}"
            )


def run_scores(spec: StudySpec, folder: StudyFolder, member: Member, seed: int) -> list[Row]:
    """One row for each score of a run: step, generation seed, guidance, metric, scalar, value, low, high, n."""
    run = folder.run(member.name, seed)
    found = []
    for step in point_steps(member.config.steps, spec.points) if run.config.exists() else ():
        for (metric, generation, scale), path in results(spec, run, step).items():
            if not path.exists():
                continue
            result = files.read_json(path, dict, _REMEDY)
            intervals = _intervals(metric, result)
            about = {
                "member": member.name,
                "seed": seed,
                "step": step,
                "generation_seed": generation,
                "guidance": float(member.config.sample.guidance) if scale is None else scale,
                "metric": metric,
                "n": result["n"],
            }
            for name, value in result["scalars"].items():
                low, high = intervals.get(name, (None, None))
                found.append(about | {"scalar": name, "value": float(value), "low": low, "high": high})
    return found


def run_measured(spec: StudySpec, folder: StudyFolder, member: Member, seed: int) -> list[Row]:
    """What depends on the machine and on kills, one row; none for a run that has not begun.

    wall_seconds, step_seconds, compile_seconds, goodput, starts: of all its starts (`monitor.goodput`).
    images_per_second: mean of the last start. peak_bytes: largest use of one device's memory as its driver counts it,
    else None.
    """
    run = folder.run(member.name, seed)
    if not run.config.exists():
        return []
    spent = goodput.summary(run.goodput)
    speed = [row[_SPEED] for row in read_metrics(run) if _SPEED in row]
    peak = folder.memory(member.name, seed)
    return [
        {
            "member": member.name,
            "seed": seed,
            "status": status_of(spec, folder, member, seed),
            "wall_seconds": spent["wall"],
            "step_seconds": spent["seconds"]["step"],
            "compile_seconds": spent["seconds"]["compile"],
            "goodput": spent["goodput"],
            "starts": spent["starts"],
            "images_per_second": speed[-1] if speed else None,
            "peak_bytes": files.read_json(peak, dict, _REMEDY)["peak_bytes"] if peak.exists() else None,
        }
    ]


def columns_of(found: Sequence[Row]) -> list[str]:
    """All columns of some rows: those of COLUMNS first, then the others as they come, groups last."""
    names = dict.fromkeys(name for row in found for name in row)
    rest = [name for name in names if name not in COLUMNS]
    grouped = [name for name in rest if name.startswith(GROUP)]
    plain = [name for name in rest if not name.startswith(GROUP)]
    return [*(name for name in COLUMNS if name in names), *plain, *sorted(grouped)]


def write_parquet(path: epath.Path, found: Sequence[Row]) -> None:
    """Writes rows as one parquet file; equal rows give equal bytes.

    Raises:
      UserError: pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    names = columns_of(found)
    table = arrow.table({name: [row.get(name) for row in found] for name in names})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    files.write_whole(path, buffer.getvalue())


def read_parquet(path: epath.Path) -> list[Row]:
    """The rows of a file that `write_parquet` wrote; a value that a row lacks is None.

    Raises:
      UserError: no such file, a damaged one, or pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    if not path.exists():
        raise UserError(f"no table {path}; `scaling-dit study --workdir={path.parent} --tables` writes it")
    try:
        return parquet.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    except arrow.ArrowException as error:
        raise UserError(f"{path} is damaged: {error}") from None


def check_installed() -> None:
    """Raises UserError where pyarrow is missing, before a study begins."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise UserError(f"a study {_INSTALL}") from None
    return pyarrow, parquet


def last_points(found: Iterable[Row]) -> list[Row]:
    """The rows of finished runs at their last step."""
    return [row for row in found if row["step"] == row["steps"] and row["status"] == DONE]

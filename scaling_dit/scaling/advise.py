"""What to train with a budget: family, size and steps by a study's laws, and their cost on a slice by `plan`.

Every family with a law of loss over parameters and samples is asked for the size of least loss at the budget. FLOPs
follow from parameters as they do in the study: MACs for each parameter are those of its members. The intervals are
bootstraps over the study's runs. Nothing is said beyond what the laws' audit supports (`audit.py`).
"""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.parallel.topologies import Topology
from scaling_dit.planning import quick
from scaling_dit.planning.plan import Plan
from scaling_dit.scaling import audit as audit_lib
from scaling_dit.scaling import bootstrap, fitted, ladder, laws
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.points import Interval
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row

RESAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Advice:
    """The best run of one family with a budget.

    Attributes:
      family: of backbones. flops: the budget.
      params, samples, loss: by the law, each with its 90 % interval.
      points, runs, sizes: what the law rests on.
      beyond: the budget over the largest compute of the family's runs.
      config_steps: steps of the budget at the batch of the family's members.
      warnings: of the law.
    """

    family: str
    flops: float
    params: float
    params_interval: Interval
    samples: float
    samples_interval: Interval
    loss: float
    loss_interval: Interval
    points: int
    runs: int
    sizes: int
    beyond: float
    config_steps: int
    warnings: tuple[str, ...]


def advise(study: Study, flops: float) -> list[Advice]:
    """The best run of each family, the least loss first.

    Raises:
      UserError: no family has a law, or the budget is beyond what any law's audit supports; the reason for each.
    """
    if not flops > 0:
        raise UserError(f"--budget={flops:g}: a budget is a number of FLOPs above 0, such as 3e20")
    by_family: dict[str, list[Row]] = collections.defaultdict(list)
    for row in fitted.endpoints(study):
        by_family[row["family"]].append(row)
    found, refused = [], []
    for family, rows in by_family.items():
        try:
            found.append(_of_family(family, rows, flops, study))
        except UserError as error:
            refused.append(f"{family}: {error}")
    if not found:
        reasons = "; ".join(refused) or "no run has finished that begins from nothing"
        raise UserError(f"no advice for {flops:.3g} FLOPs from {study.folder}: {reasons}")
    return sorted(found, key=lambda one: one.loss)


def _of_family(family: str, rows: Sequence[Row], flops: float, study: Study) -> Advice:
    n, d, y = (np.array([row[name] for row in rows], float) for name in ("params", "samples", "loss"))
    runs = [f"{row['member']}/{row['seed']}" for row in rows]
    audit = audit_lib.leave_one_size_out(n, d, y, runs)
    largest = max(row["train_flops"] for row in rows)
    limit = largest * audit.factor
    if flops > limit * (1 + 1e-9):
        last = audit.held[-1]
        reached = f"reached {last.compute_beyond:.3g} x beyond the rest and was off by {last.error:+.1%}"
        found = "cannot be fitted" if math.isinf(last.error) else reached
        raise UserError(
            f"its runs end at {largest:.3g} FLOPs, and its audit supports {limit:.3g}: without the largest size, the "
            f"law {found}; add members with more compute"
        )
    # FLOPs for each parameter and sample: constant where size is width, and the median of the members otherwise.
    per = float(np.median([row["train_flops"] / (row["params"] * row["samples"]) for row in rows]))
    law = laws.fit_parametric(n, d, y, runs)

    def best(one: laws.ParametricLaw) -> dict[str, float]:
        params, samples = one.optimum(np.array(flops), per)
        return {"params": float(params), "samples": float(samples), "loss": float(one(params, samples))}

    def refit(indices: np.ndarray) -> dict[str, float] | None:
        try:
            return best(laws.fit_parametric(n[indices], d[indices], y[indices]))
        except UserError:
            return None

    values = best(law)
    ends = bootstrap.intervals(map(refit, bootstrap.resample_runs(runs, len(n), RESAMPLES)))
    warnings = list(law.warnings)
    if not n.min() <= values["params"] <= n.max():
        warnings.append(
            f"the best size lies outside the sizes studied, {n.min():.3g} to {n.max():.3g} parameters"
        )
    return Advice(
        family=family,
        flops=flops,
        params=values["params"],
        params_interval=ends["params"],
        samples=values["samples"],
        samples_interval=ends["samples"],
        loss=values["loss"],
        loss_interval=ends["loss"],
        points=len(n),
        runs=len(set(runs)),
        sizes=len(np.unique(n)),
        beyond=flops / largest,
        config_steps=max(1, round(values["samples"] / _batch(family, study))),
        warnings=tuple(warnings),
    )


def _of(family: str, study: Study) -> list[Member]:
    return [member for member in study.spec.members if member.config.backbone.name == family]


def _batch(family: str, study: Study) -> int:
    return int(max(member.config.batch for member in _of(family, study)))


def member_of(advice: Advice, study: Study) -> Member:
    """A config of the advised size: the family's nearest member, widened to it, with the advised steps.

    Raises:
      UserError: no width comes near the advised size.
    """
    nearest = min(
        _of(advice.family, study), key=lambda one: abs(np.log(ladder.cost(one.config).params / advice.params))
    )
    (resized,) = ladder.matched([nearest], "params", advice.params, tolerance=0.5)
    return ladder.derive(resized.config, {"steps": advice.config_steps}, f"{advice.family}-advised")


def plan_of(member: Member, topology: Topology, price: float | None = None) -> Plan:
    """The plan of a member on a slice, its parameters split over all chips, as `scaling-dit plan --quick` makes it."""
    sharded = ladder.derive(member.config, {"mesh.data": 1, "mesh.fsdp": -1}, member.name)
    return quick.make(sharded.config, topology, "train", price)


def main(
    workdir: str,
    flops: float,
    topology: Topology | None,
    *,
    price: float | None = None,
    as_json: bool = False,
) -> int:
    """The `advise` verb: prints the best run of each family, and the plan of the best one."""
    from scaling_dit.scaling import study as study_lib

    study = study_lib.open_study(workdir)
    found = advise(study, flops)
    plan = member = None
    if topology is not None:
        member = member_of(found[0], study)
        plan = plan_of(member, topology, price)
    if as_json:
        document: dict[str, Any] = {"advice": [dataclasses.asdict(one) for one in found]}
        if plan is not None and member is not None:
            document |= {"plan": plan.to_dict(), "backbone": member.config.backbone.to_dict()}
        print(json.dumps(document, indent=1))
        return 0
    for place, one in enumerate(found):
        print("\n".join(lines(one, first=not place)))
    if plan is not None and member is not None:
        print("\n".join(plan_lines(plan, member)))
    return 0


def lines(one: Advice, *, first: bool) -> list[str]:
    """Advice for one family as text."""

    def ends(interval: Interval) -> str:
        return f"(90 % interval {interval[0]:.3g} to {interval[1]:.3g})"

    rows = [
        f"{'best: ' if first else ''}{one.family}, {ladder.size_label(one.params)} parameters "
        f"{ends(one.params_interval)}",
        f"  samples   {one.samples:.3g} {ends(one.samples_interval)}, {one.config_steps:,} steps at the study's batch",
        f"  loss      {one.loss:.4g} {ends(one.loss_interval)}",
        f"  rests on  {one.points} points of {one.runs} runs in {one.sizes} sizes; the budget is {one.beyond:.3g} x "
        "the largest compute among them",
    ]
    return rows + [f"  careful   {warning}" for warning in one.warnings]


def plan_lines(plan: Plan, member: Member) -> list[str]:
    """The plan of the advised run as text: mesh, memory, hours, cost."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    shown = [
        f"on {plan.topology}: {plan.chips} chips, mesh {mesh}; "
        f"{'fits' if plan.memory.fits else 'does not fit'}, peak {plan.memory.peak / 2**30:.2f} GiB a chip"
    ]
    found = plan.roofline
    if found is None or found.chip_hours_limit is None:
        return [*shown, "  its time is not known: the program does not fit, or the chip is unknown"]
    hours = found.chip_hours_limit / plan.chips
    cost = f", ${found.chip_hours_limit * found.price:,.0f}" if found.price else ""
    return [
        *shown,
        f"  at best {hours:.3g} hours, {found.chip_hours_limit:,.3g} chip-hours{cost}, bound by {found.bound}: a limit "
        "from the compiled program and the chip's peaks, nothing measured",
        f"  config    {json.dumps(member.config.backbone.to_dict())}",
    ]

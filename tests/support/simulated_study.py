"""Studies whose truth is known: rows made by a law, without training."""

import dataclasses

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.scaling import ladder, table
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec, config_hash, point_steps
from scaling_dit.scaling.study import Study

# Loss over parameters and samples of the made families, and how much of it is noise of the training seed.
LAW = {"E": 0.1, "A": 30.0, "B": 20.0, "alpha": 0.4, "beta": 0.35}
NOISE = 0.003
SIZES = tuple(int(size) for size in np.geomspace(1e5, 3e6, 5))
MACS_PER_PARAM = 20


def loss(params, samples, law=LAW):
    return law["E"] + law["A"] / params ** law["alpha"] + law["B"] / samples ** law["beta"]


def members(count, steps=1000):
    """So many members of two families; their configs are one and the same but for the name of the backbone."""
    changes = [f"--config.steps={steps}", "--config.optim.decay=constant", "--config.eval.loss_images=8"]
    base = config_lib.load("experiments/shapes.py:smoke", changes)
    other = config_lib.load("experiments/backbones.py:pixart", changes)
    families = (("uvit", base), ("pixart", other))
    return tuple(
        ladder.Member(f"{family}-{i:03d}", config, {}, {"family": family})
        for i, (family, config) in ((i, families[i % 2]) for i in range(count))
    )


def few_resamples(module, count):
    """A fixture for a file of tests: what a module computes by a bootstrap has so many resamples."""

    @pytest.fixture(scope="module", autouse=True)
    def few():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "RESAMPLES", count)
            yield

    return few


def write(made):
    """Writes a made study as `study` leaves it in its folder, without the runs."""
    study_lib.register(made.spec, made.folder, lambda: 0)
    for name, rows in (("table", made.rows), ("measured", made.measured), ("scores", made.scores)):
        table.write_parquet(getattr(made.folder, name), rows)


def study(folder, count=10, seeds=3, *, points=4, noise=NOISE, claims=None, seed=0, law=LAW):
    """A finished study: member i has SIZES[i // 2] parameters (repeating), and losses of `law` with noise."""
    rng = np.random.default_rng(seed)
    chosen = members(count)
    if claims is None:
        claims = (Claim("the larger is better", chosen[max(1, count - 2)].name, chosen[0].name),)
    spec = StudySpec("Does size help?", chosen, tuple(range(seeds)), claims=claims, points=points)
    rows, measured, scores = [], [], []
    for i, member in enumerate(chosen):
        params = SIZES[(i // 2) % len(SIZES)]
        for run in range(seeds):
            shift = rng.normal(0, noise)
            for step in point_steps(member.config.steps, points):
                rows.append(_row(member, run, step, params, shift, law))
            about = {"member": member.name, "seed": run}
            spent = {"wall_seconds": 60.0 + i, "step_seconds": 50.0, "compile_seconds": 5.0, "goodput": 0.8}
            speed = {"starts": 1, "images_per_second": 600.0, "peak_bytes": None}
            measured.append(about | {"status": "done"} | spent | speed)
            score = {"metric": "shapes_tifa", "n": 200, "scalar": "shapes_tifa", "low": None, "high": None}
            where = {"step": member.config.steps, "generation_seed": 0, "guidance": 1.5}
            scores.append(about | where | score | {"value": rows[-1]["shapes_tifa"]})
    return Study(spec, StudyFolder(folder), rows, measured, scores, {claim.name: 0 for claim in claims})


def _row(member, seed, step, params, shift, law):
    samples = step * 128
    value = float(loss(params, samples, law) * np.exp(shift))
    score = float(1 - value / 2)
    return {
        "member": member.name, "seed": seed, "family": str(member.config.backbone.name), "status": "done", "step": step,
        "steps": member.config.steps, "samples": samples, "params": params, "macs_paper": params * MACS_PER_PARAM,
        "macs_total": params * MACS_PER_PARAM, "train_flops": 6.0 * MACS_PER_PARAM * params * samples,
        "train_flops_paper": 6.0 * MACS_PER_PARAM * params * samples, "inference_flops": 80.0 * MACS_PER_PARAM * params,
        "endpoint": True, "config_hash": config_hash(member.config), "loss": value, "loss_t0000-0499": value * 1.5,
        "loss_t0500-0999": value * 0.5, "shapes_tifa": score, "shapes_tifa_low": score - 0.02,
        "shapes_tifa_high": score + 0.02, "shapes_tifa_color": score, "shapes_tifa_spatial": score / 2,
    }  # fmt: skip


def with_rows(made, rows):
    """The study with other rows."""
    return dataclasses.replace(made, rows=rows)

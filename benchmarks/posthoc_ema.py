"""The error of averages rebuilt after training against directly kept ones, on a real run of 2,000 steps.

    python benchmarks/posthoc_ema.py --note=benchmarks/posthoc_ema_cpu.md

Trains a small U-ViT on the built-in shapes with a constant learning rate, so that the weights keep moving. The run
keeps averages with five decays, and stores two power averages every 50 steps. Then each decay is rebuilt from the two.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np
from etils import epath
from note import header

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints import posthoc_ema
from scaling_dit.checkpoints.ema import power_name
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.sampling import pipeline
from scaling_dit.trees import Params

DECAYS = (0.9, 0.99, 0.995, 0.999, 0.9995)
WIDTHS = (0.05, 0.1)
STEPS, EVERY = 2000, 50


def main() -> None:
    """Trains the run if the workdir does not hold it, compares the averages, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--workdir", help="folder of the run; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = epath.Path(args.workdir or temporary) / "posthoc_ema"
        config = run_config()
        scaling_dit.train(config, workdir)
        rows = [row for step in (STEPS // 2, STEPS) for row in compare(workdir, step)]
    args.note.write_text(note(rows))


def run_config() -> config_lib.ConfigDict:
    """The config of shapes:smoke with more steps."""
    config = config_lib.load("shapes:smoke").copy_and_resolve_references().unlock()
    config.steps = STEPS
    config.batch = 16
    config.optim.update(
        {"learning_rate": 1e-3, "warmup_steps": 50, "decay": "constant", "ema": DECAYS, "ema_power": WIDTHS}
    )
    config.sample.ema = 0.995
    config.eval.every = 0
    config.log.update({"every": 100, "tensorboard": False})
    config.checkpoint.update({"every": STEPS // 2, "ema_every": EVERY})
    return config


def compare(workdir: epath.Path, step: int) -> list[tuple[int, float, float, float, float]]:
    """(step, decay, error over the average, error over its distance to the raw weights, expected) of each decay."""
    raw = pipeline.load(workdir, step=step).params
    tracks = [power_name(width) for width in WIDTHS]
    basis = [(name, at) for at in range(EVERY, step + 1, EVERY) for name in tracks]
    rows = []
    with Checkpoints(Workdir(workdir).checkpoints, read_only=True) as store:
        for decay in DECAYS:
            kept = pipeline.load(workdir, step=step, ema=decay).params
            rebuilt = posthoc_ema.rebuild(
                Workdir(workdir).ema_snapshots, store, step, raw, str(decay), tracks
            )
            error = distance(rebuilt, kept)
            expected = posthoc_ema.fit(str(decay), step, basis).residual
            rows.append((step, decay, error / length(kept), error / distance(kept, raw), expected))
    return rows


def length(tree: Params) -> float:
    """Euclidean norm of all leaves together, in float64."""
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree))))


def distance(a: Params, b: Params) -> float:
    """`length` of the difference."""
    return length(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))


def note(rows: list[tuple[int, float, float, float, float]]) -> str:
    """The markdown table."""
    worst = max(row[2] for row in rows)
    lines = [
        *header("Averages rebuilt after training", "benchmarks/posthoc_ema.py"),
        "",
        f"Small U-ViT on shapes, {STEPS} steps of 16 images at a constant learning rate of 1e-3. Power averages of "
        f"relative widths {WIDTHS[0]} and {WIDTHS[1]}, stored every {EVERY} steps. Largest error: {worst:.3%} of the "
        "average's length. `expected` is the residual of the fit, which `load(ema=...)` reports.",
        "",
        "| step | decay | error / length of the average | error / distance from the raw weights | expected |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {step} | {decay} | {a:.4%} | {b:.3%} | {expected:.3%} |" for step, decay, a, b, expected in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Exact TIFA and time of every sampler on one trained run, against DDIM with 50 steps.

    python benchmarks/samplers.py runs/demo --note=benchmarks/samplers_cpu.md

Every row generates images of the same held-out scenes from the same noise with the same weights; only sampler and steps
change. The difference to DDIM with 50 steps is paired by scene, with a bootstrap interval. Seconds are the time to
generate all images, after one batch that compiles.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import numpy as np
from note import header

from scaling_dit.checkpoints.workdir import read_config
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.intervals import mean_interval
from scaling_dit.evaluation.scoring import Scoring, score
from scaling_dit.model.build import open_source
from scaling_dit.sampling.pipeline import open_for_sampling

BAR = ("ddim", 50)
# Samplers with the numbers of steps that they are used with. A step of Heun calls the model twice.
ROWS = (
    BAR,
    ("ddim", 20),
    ("dpmpp_2m", 20),
    ("dpmpp_2m", 10),
    ("euler", 30),
    ("heun", 15),
    ("heun", 25),
)


def main() -> None:
    """Measures every row and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="workdir of a trained run on the built-in shapes")
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--items", type=int, default=500, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise and of the bootstrap")
    args = parser.parse_args()
    source = open_source(read_config(args.run))
    metric = METRICS["shapes_tifa"](baseline=False)
    scoring = Scoring("shapes_tifa", metric, metric.items(source, args.items))
    rows = []
    for sampler, steps in ROWS:
        rows.append(measure(str(args.run), scoring, sampler, steps, args.seed))
        print({name: value for name, value in rows[-1].items() if name != "scores"})
    args.note.write_text(note(args.run, rows, args.seed))


def measure(workdir: str, scoring: Scoring, sampler: str, steps: int, seed: int) -> dict[str, Any]:
    """One row: settings, seconds, TIFA and the scores by scene."""
    pipe, chosen, about = open_for_sampling(
        read_config(workdir), workdir, {"sampler": sampler, "steps": steps}
    )
    prompts = [prompt for _, prompt in scoring.prompts]
    # The first batch compiles.
    chosen(pipe.params, pipe.frozen, prompts[: chosen.options.batch], seed=seed)
    start = time.perf_counter()
    images = chosen(pipe.params, pipe.frozen, prompts, seed=seed)
    seconds = time.perf_counter() - start
    result, scored = score(scoring, [images], seed)
    return about | {
        "seconds": seconds,
        "tifa": result["tifa_average"],
        "interval": result["interval"],
        "scores": [row["score"] for row in scored],
    }


def note(run: pathlib.Path, rows: list[dict[str, Any]], seed: int) -> str:
    """All rows as markdown. The first one is the bar."""
    config, bar = read_config(run), rows[0]
    settings = f"{len(bar['scores'])} held-out scenes, seed {seed}, step {bar['step']}, ema {bar['ema']}"
    lines = [
        *header("Samplers", "benchmarks/samplers.py"),
        "",
        f"Source {config.source.name}, backbone {config.backbone.name}, schedule {config.diffusion.schedule}, "
        f"prediction {config.diffusion.prediction}, guidance {bar['guidance']}; {settings}.",
        f"Difference: TIFA minus the TIFA of {bar['sampler']} with {bar['steps']} steps, paired by scene. "
        "Intervals are 95 % bootstrap intervals over scenes.",
        "",
        "| sampler | steps | TIFA | interval | difference | interval | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paired = [ours - theirs for ours, theirs in zip(row["scores"], bar["scores"], strict=True)]
        low, high = mean_interval(np.asarray(paired), seed)
        lines.append(
            f"| {row['sampler']} | {row['steps']} | {row['tifa']:.3f} | "
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f} | {statistics.fmean(paired):+.3f} | "
            f"{low:+.3f} to {high:+.3f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Writes a dated note of an evaluated run: its results, the machine, and a grid of images.

    python benchmarks/note.py runs/demo --note=benchmarks/demo_cpu.md --grid=docs/images/demo.png

All numbers come from the run's own files (`evaluation/**/result.json`, `metrics/`, `config.json`).
"""

import argparse
import json
import pathlib

import numpy as np
from etils import epath
from header import header

from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.evaluation import METRICS
from scaling_dit.monitor.grid import captioned_grid, read_png, write_png

SETTINGS = ("n", "seed", "step", "ema", "sampler", "steps", "guidance")


def main() -> None:
    """Writes the note, and the grid if one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=pathlib.Path, help="workdir of a run that `scaling-dit evaluate` has scored"
    )
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--grid", type=pathlib.Path, help="PNG file to write: a grid of the first images")
    parser.add_argument("--images", type=int, default=18, help="images of the grid")
    parser.add_argument("--command", default="make demo", help="what was run")
    args = parser.parse_args()
    found = sorted(args.run.glob("evaluation/**/result.json"))
    if not found:
        parser.error(f"{args.run}/evaluation has no result.json: `scaling-dit evaluate --workdir={args.run}`")
    args.note.write_text(note(args.run, args.command, [json.loads(path.read_text()) for path in found]))
    if args.grid:
        write_png(epath.Path(args.grid), first_images(found[0].parent, args.images))


def note(run: pathlib.Path, command: str, results: list[dict]) -> str:
    """All results of a run as markdown."""
    config = json.loads((run / "config.json").read_text())
    rate, wait = training_rate(run)
    seconds = config["steps"] * config["batch"] / rate
    lines = [
        *header(command, "benchmarks/note.py", "from the run's own files"),
        "",
        f"Training: {config['steps']} steps of {config['batch']} images in {seconds / 60:.1f} minutes "
        f"({rate:.0f} images/s without compilation and evaluation; waiting for data {wait:.1%}).",
    ]
    for result in results:
        name, settings = result["metric"], ", ".join(f"{key} {result[key]}" for key in SETTINGS)
        lines += ["", f"## Metric `{name}`", "", settings, "", "```", METRICS[name]().table(result), "```"]
    return "\n".join(lines) + "\n"


def training_rate(run: pathlib.Path) -> tuple[float, float]:
    """Images per second of a run, without compilation and evaluation, and the share of time waiting for data."""
    rows = read_metrics(run)
    names = ("speed/mean_images_per_second", "speed/mean_data_wait")
    rate, wait = (next(row[name] for row in reversed(rows) if name in row) for name in names)
    return rate, wait


def first_images(folder: pathlib.Path, count: int) -> np.ndarray:
    """A grid of the first images in a folder that `evaluate` wrote, not selected in any way."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][:count]
    images = np.stack([read_png(epath.Path(folder / row["path"])) for row in rows])
    return captioned_grid(images, [row["prompt"] for row in rows], columns=6)


if __name__ == "__main__":
    main()

"""Writes the table of experiments/backbones.py: every backbone on shapes, with one recipe and equal parameters.

    for b in uvit pixart large_dit next_dit unet unet_if; do
      scaling-dit train --config=backbones:$b --workdir=runs/backbones/$b
      scaling-dit evaluate --workdir=runs/backbones/$b --items=500
    done
    python benchmarks/backbones.py runs/backbones/* --note=benchmarks/backbones_cpu.md

All numbers come from the runs' own files and from `scaling_dit.count`. Exits with 1 if a run misses the bar: the whole
95 % interval of TIFA at least 0.2 above the score of true images of wrong scenes, and colour above 0.7.
"""

import argparse
import json
import pathlib
import sys

from note import header, training_rate

from scaling_dit import backbones, count
from scaling_dit.checkpoints.workdir import read_config
from scaling_dit.encoders import scratch
from scaling_dit.model.build import build_model, open_source

MARGIN, COLOUR = 0.2, 0.7


def main() -> int:
    """Writes the note; 1 if a run misses the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="workdirs that `evaluate` has scored")
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    args = parser.parse_args()
    rows = sorted((results(run) for run in args.runs), key=lambda row: -row["tifa"])
    missed = [row["name"] for row in rows if row["low"] < row["baseline"] + MARGIN or row["colour"] <= COLOUR]
    args.note.write_text(note(rows, missed))
    print(f"{len(rows)} runs in {args.note}; below the bar: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def results(run: pathlib.Path) -> dict:
    """The results of one run, from its files."""
    config = read_config(run)
    (found,) = run.glob("evaluation/**/shapes_tifa/result.json")
    result = json.loads(found.read_text())
    low, high = result["interval"]
    model = build_model(config, scratch.build_tokenizer(open_source(config)))
    shape, text = model.latent_shape, (model.text_encoder.length, model.text_encoder.dim)
    fields = config.backbone.to_dict()
    cost = count(backbones.create_for(in_channels=shape[2], text_dim=text[1], **fields), shape, text)
    return {
        "name": config.backbone.name,
        "params": cost.params,
        "macs": cost.macs_total,
        "steps": config.steps,
        "batch": config.batch,
        "side": model.image_size,
        "minutes": config.steps * config.batch / training_rate(run)[0] / 60,
        "n": result["n"],
        "tifa": result["tifa_average"],
        "low": low,
        "high": high,
        "baseline": result["baseline"]["tifa_average"],
        "colour": result["accuracy_by_type"]["color"],
        "shape": result["accuracy_by_type"]["shape"],
        "spatial": result["accuracy_by_type"]["spatial"],
    }


def note(rows: list[dict], missed: list[str]) -> str:
    """The markdown of all rows."""
    first = rows[0]
    lines = [
        *header("Backbones on shapes, one recipe, equal parameters", "benchmarks/backbones.py"),
        "",
        f"Each run: `experiments/backbones.py`, {first['steps']} steps of {first['batch']} images of "
        f"{first['side']}x{first['side']} px, one seed. TIFA over {first['n']} held-out scenes with its 95 % interval; "
        f"true images of wrong scenes score {first['baseline']:.3f}.",
        f"The bar: the whole interval of TIFA {MARGIN} above that score, and colour above {COLOUR}. "
        f"Missed by: {', '.join(missed) or 'none'}.",
        "",
        "| backbone | parameters | MACs per image | TIFA | 95 % interval | colour | shape | spatial | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['params'] / 1e6:.2f} M | {row['macs'] / 1e6:.1f} M | {row['tifa']:.3f} | "
            f"{row['low']:.3f} to {row['high']:.3f} | {row['colour']:.3f} | {row['shape']:.3f} | "
            f"{row['spatial']:.3f} | {row['minutes']:.1f} |"
        )
    lines += [
        "",
        "One seed each, so differences of a few hundredths between backbones say little. "
        "Minutes are of the steps alone, without compilation and evaluation, and the machine may have been shared.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

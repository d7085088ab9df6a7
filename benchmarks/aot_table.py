"""Plans of every size of the papers on four slices, compiled ahead of time, as a table for the docs.

    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells          # every cell that is not there yet
    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells --only=uvit-h2048-d42-n16@v5p:4x4x4
    python benchmarks/aot_table.py commands --cells=benchmarks/aot_cells     # the command of each cell
    python benchmarks/aot_table.py write --cells=benchmarks/aot_cells --note=docs/plan_table.md

A cell is one size on one slice; its plan is kept as one JSON file, so the table can be made in pieces, on several
machines. A size is tried with the settings of `ATTEMPTS` in turn until it fits. The text encoder is OpenCLIP-H, frozen;
latents come of the fixed transform `dct`, as in the experiments. No accelerator is used: nothing is measured.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

import note
from scaling_dit.experiments import dit_scaling, unet_scaling

SLICES = ("v5e:16x16", "v5p:4x4x4", "v4:4x4x4", "v6e:16x16")
CONFIGS = {size: f"dit_scaling:{size}" for size in dit_scaling.ARGUMENTS} | {
    size: f"unet_scaling:{size}" for size in unet_scaling.ARGUMENTS
}
# What P1 and P2 train with: a frozen OpenCLIP-H. Its weights are not read to plan.
PAPER = (
    "--config.text_encoder.name=clip",
    "--config.text_encoder.size=openclip-h",
    "--config.train_text_encoder=False",
)
# From the cheapest step to the smallest memory.
ATTEMPTS = (
    (),
    ("--config.backbone.remat=full",),
    ("--config.backbone.remat=full", "--config.optim.accumulate=4"),
)
GIB = 2**30
HEADS = (
    "size", "slice", "settings", "arguments GiB", "peak GiB", "of", "TFLOP model", "TFLOP program", "GB sent",
    "of it async", "M cycles", "ms limit", "ms estimate", "MFU estimate", "chip-hours", "compile s",
)  # fmt: skip


def command(size: str, topology: str, attempt: int) -> list[str]:
    """The command that plans one cell."""
    config = f"--config={CONFIGS[size]}"
    flags = [config, f"--topology={topology}", "--json", *PAPER, *ATTEMPTS[attempt]]
    return [sys.executable, "-m", "scaling_dit", "plan", *flags]


def cells(only: str | None) -> list[tuple[str, str]]:
    """(size, slice) of every cell, or of the one named "SIZE@SLICE"."""
    every = [(size, topology) for size in CONFIGS for topology in SLICES]
    return [cell for cell in every if only is None or "@".join(cell) == only]


def place(folder: pathlib.Path, size: str, topology: str) -> pathlib.Path:
    """The file of a cell."""
    return folder / f"{size}@{topology.replace(':', '-')}.json"


def make(folder: pathlib.Path, size: str, topology: str) -> None:
    """Plans a cell with each attempt until one fits, and keeps the last plan."""
    for attempt in range(len(ATTEMPTS)):
        done = subprocess.run(command(size, topology, attempt), capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{size}@{topology}: {done.stderr.strip()}")
        (plan,) = json.loads(done.stdout)
        if plan["memory"]["fits"]:
            break
    folder.mkdir(parents=True, exist_ok=True)
    place(folder, size, topology).write_text(json.dumps(plan | {"attempt": attempt}, indent=1) + "\n")
    print(f"{size}@{topology}: " + " | ".join(row(size, plan)[2:]), flush=True)


def row(size: str, plan: dict) -> list[str]:
    """The cells of the table's line of a plan."""
    memory, found, times = plan["memory"], plan["statistics"], plan["roofline"]
    settings = f"remat {plan['settings']['remat']}"
    if plan["settings"]["microbatches"] > 1:
        settings += f", {plan['settings']['microbatches']} microbatches"
    line = [
        size,
        plan["topology"],
        settings,
        f"{memory['arguments'] / GIB:.2f}",
        f"{memory['peak'] / GIB:.2f}",
    ]
    line.append(f"{memory['limit'] / GIB:.2f}{'' if memory['fits'] else ': does not fit'}")
    line.append(f"{plan['model_flops'] / plan['chips'] / 1e12:.2f}")
    if found is None:
        return [*line, *[""] * (len(HEADS) - len(line) - 1), f"{plan['compile_seconds']:.0f}"]
    sent = sum(entry["wire"] for entry in found["collectives"])
    hidden = sum(entry["wire"] for entry in found["collectives"] if entry["asynchronous"])
    return [
        *line,
        f"{found['flops'] / 1e12:.2f}",
        f"{sent / 1e9:.2f}",
        f"{hidden / max(sent, 1):.0%}",
        f"{found['cycles'] / 1e6:.0f}",
        f"{1e3 * times['limit']:.0f}",
        f"{1e3 * times['estimate']:.0f}",
        f"{times['mfu_estimate']:.1%}",
        f"{times['chip_hours_estimate']:,.0f}",
        f"{plan['compile_seconds']:.0f}",
    ]


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
    """The page with the table of all cells that are there."""
    lines = [
        *note.header(
            "Plans of the papers' sizes", "benchmarks/aot_table.py", "compiled with libtpu, nothing measured"
        ),
        "",
        "Per chip, global batch 2048, text encoder OpenCLIP-H, codec `dct`; columns as [planning](plan.md) "
        "explains them. Each size is shown with the first of these settings that fits: as in its experiment; "
        "`remat=full`; and four microbatches as well.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
    ]
    for size, topology in cells(None):
        file = place(folder, size, topology)
        if file.exists():
            lines.append(f"| {' | '.join(row(size, json.loads(file.read_text())))} |")
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "commands", "write"))
    parser.add_argument("--cells", type=pathlib.Path, required=True, help="folder of the JSON files")
    parser.add_argument("--only", help="one cell, SIZE@SLICE")
    parser.add_argument("--note", type=pathlib.Path, help="page to write")
    args = parser.parse_args()
    chosen = cells(args.only)
    if not chosen:
        parser.error(f"no cell {args.only}; see the list of `commands`")
    if args.what == "write":
        if args.note is None:
            parser.error("write needs --note")
        write(args.cells, args.note)
        return
    for size, topology in chosen:
        if args.what == "commands":
            print(shlex.join(command(size, topology, 0)))
        elif not place(args.cells, size, topology).exists():
            make(args.cells, size, topology)


if __name__ == "__main__":
    main()

"""Plans of every size of the papers on four slices, compiled ahead of time, as a table for the docs.

    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells          # every cell that is not there yet
    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells --sizes=uvit-h2048-d42-n16,sdxl --slices=v5p:4x4x4
    python benchmarks/aot_table.py run --quick --cells=benchmarks/aot_cells  # as `plan --quick`, without cycles
    python benchmarks/aot_table.py commands --cells=benchmarks/aot_cells     # the first command of each cell
    python benchmarks/aot_table.py write --cells=benchmarks/aot_cells --note=docs/plan_table.md

A cell is one size on one slice; its plan is kept as one JSON file, so the table can be made in pieces, on several
machines. A size is tried with the settings that `ATTEMPTS` has for the slice, in turn, until it fits. Where the last of
them fails, the file and the table hold its error, and the next run tries that cell again. A cell made with `--quick`
has no cycles; the next run without that flag makes it whole. The text encoder is OpenCLIP-H, frozen; latents come of
the fixed transform `dct`, and parameters are split over all chips, as in the experiments. No accelerator is used:
nothing is measured.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from header import header
from scaling_dit.experiments import dit_scaling, unet_scaling

from scaling_dit.errors import UserError, nearest

CONFIGS = {size: f"dit_scaling:{size}" for size in dit_scaling.ARGUMENTS} | {
    size: f"unet_scaling:{size}" for size in unet_scaling.ARGUMENTS
}
# What P1 and P2 train with: a frozen OpenCLIP-H. Its weights are not read to plan.
PAPER = (
    "--config.text_encoder.name=clip",
    "--config.text_encoder.size=openclip-h",
    "--config.train_text_encoder=False",
)
# From the fastest step to the smallest memory. The copy of the parameters and gradients that gathering once costs does
# not fit a v5e at the largest sizes; a part of its gathers layer by layer is asynchronous, which no other's are.
_SAVING = (
    ("--config.backbone.remat=full",),
    ("--config.backbone.remat=full", "--config.optim.accumulate=4"),
)
_GATHERED = ("--config.sharding.gather_once=True", "--config.backbone.remat=products")
_BY_LAYER = ("--config.backbone.remat=products",)
# Over 256 chips the parameters of a width that 256 does not divide stay whole (IF-XL's 704): over 64 they are split.
_OVER_64 = ("--config.mesh.data=4", "--config.backbone.remat=products")
ATTEMPTS = {
    "v5e:16x16": (_BY_LAYER, _OVER_64, *_SAVING),
    "v5p:4x4x4": (_GATHERED, *_SAVING),
    "v4:4x4x4": (_GATHERED, *_SAVING),
    "v6e:16x16": (_GATHERED, _OVER_64, *_SAVING),
}
SLICES = tuple(ATTEMPTS)
GIB = 2**30
HEADS = (
    "size", "slice", "settings", "arguments GiB", "peak GiB", "of", "TFLOP model", "TFLOP program", "GB sent",
    "of it async", "M cycles", "ms limit", "ms estimate", "MFU estimate", "chip-hours", "compile s",
)  # fmt: skip


def command(size: str, topology: str, flags: Sequence[str], quick: bool = False) -> list[str]:
    """The command that plans one cell with the flags of one attempt."""
    config = f"--config={CONFIGS[size]}"
    return [
        sys.executable, "-m", "scaling_dit", "plan", config, f"--topology={topology}", "--json",
        *["--quick"] * quick, *PAPER, *flags,
    ]  # fmt: skip


def place(folder: pathlib.Path, size: str, topology: str) -> pathlib.Path:
    """The file of a cell."""
    return folder / f"{size}@{topology.replace(':', '-')}.json"


def missing(file: pathlib.Path, quick: bool = False) -> bool:
    """Whether a cell is still to be planned: its file is not there, holds an error, or less than is asked for."""
    if not file.exists():
        return True
    plan = json.loads(file.read_text())
    return "error" in plan or not (quick or plan.get("kernels", True))


def make(folder: pathlib.Path, size: str, topology: str, quick: bool = False) -> bool:
    """Plans a cell with each attempt until one fits, and keeps the last plan or its error; False with an error."""
    found: dict[str, Any] = {}
    failed = []
    for flags in ATTEMPTS[topology]:
        done = subprocess.run(command(size, topology, flags, quick), capture_output=True, text=True)
        if (
            done.returncode in (0, 1) and done.stdout.strip()
        ):  # Python ends with 1 for an error of its own as well
            (found,) = json.loads(done.stdout)
        else:
            last = done.stderr.strip().rpartition("\n")[2]
            found = {"topology": topology, "error": last or f"exit code {done.returncode}"}
            failed.append(f"{' '.join(flags)}: {found['error']}")
        found["flags"] = list(flags)
        if "error" not in found and found["memory"]["fits"]:
            break
    folder.mkdir(parents=True, exist_ok=True)
    file = place(folder, size, topology)
    if "error" in found and not missing(file, quick=True):
        print(f"{size}@{topology}: {'; '.join(failed)}; the quick plan stays", flush=True)
        return False
    file.write_text(json.dumps(found | {"failed": failed}, indent=1) + "\n")
    print(f"{size}@{topology}: {' | '.join(row(size, found)[2:])}", flush=True)
    return "error" not in found


def row(size: str, plan: dict) -> list[str]:
    """The cells of the table's line of a plan, or of the error in its place."""
    if "error" in plan:
        told = f"{' '.join(plan['flags'])}: {plan['error']}".replace("|", "/")
        return [size, plan["topology"], told, *[""] * (len(HEADS) - 3)]
    memory, found, times = plan["memory"], plan["statistics"], plan["roofline"]
    settings = "" if plan["mesh"]["data"] == 1 else f"data {plan['mesh']['data']}, "
    settings += f"gather_once {plan['settings']['gather_once']}, remat {plan['settings']['remat']}"
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
        f"{found['cycles'] / 1e6:.0f}" if found["cycles"] else "",
        f"{1e3 * times['limit']:.0f}",
        *_estimated(times),
        f"{plan['compile_seconds']:.0f}",
    ]


def _estimated(times: dict) -> list[str]:
    """Milliseconds, MFU and chip-hours by cycles; empty for a plan without them."""
    if times["estimate"] is None:
        return [""] * 3
    return [
        f"{1e3 * times['estimate']:.0f}",
        f"{times['mfu_estimate']:.1%}",
        f"{times['chip_hours_estimate']:,.0f}",
    ]


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
    """The page with the table of all cells that are there."""
    lines = [
        *header(
            "Plans of the papers' sizes",
            "benchmarks/aot_table.py",
            "from programs compiled with libtpu beside other work, which `compile s` shows; nothing was measured",
        ),
        "",
        "Per chip, global batch 2048, text encoder OpenCLIP-H, codec `dct`; columns as [planning](plan.md) "
        "explains them. Each size is shown with the first of these settings that fits: `remat=products`, on v5p, v4 "
        "and v6e with `gather_once`; on 256 chips the parameters split over 64, with `data` 4; `remat=full`; and four "
        "microbatches as well. Rows without cycles come of `plan --quick`; their peak counts "
        "the gaps between arrays too.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
    ]
    cells = list(itertools.product(CONFIGS, SLICES))
    there = [cell for cell in cells if place(folder, *cell).exists()]
    for size, topology in there:
        found = json.loads(place(folder, size, topology).read_text())
        lines.append(f"| {' | '.join(row(size, found))} |")
    if len(there) < len(cells):
        lines += ["", f"{len(cells) - len(there)} of {len(cells)} plans are still to be made; `run` goes on."]
    target.write_text("\n".join(lines) + "\n")


def names(text: str | None, known: Sequence[str]) -> list[str]:
    """The names in a list with commas, all that are known for None.

    Raises:
      UserError: one is not known.
    """
    found = list(known) if text is None else text.split(",")
    for name in found:
        if name not in known:
            raise UserError(f"unknown {name!r}; {nearest(name, known)}")
    return found


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "commands", "write"))
    parser.add_argument("--cells", type=pathlib.Path, required=True, help="folder of the JSON files")
    parser.add_argument("--sizes", help="of the cells to plan, separated by commas; all if not given")
    parser.add_argument("--slices", help="the same")
    parser.add_argument(
        "--quick", action="store_true", help="plan without kernels: all but cycles and estimates"
    )
    parser.add_argument("--note", type=pathlib.Path, help="page to write")
    args = parser.parse_args()
    try:
        chosen = list(itertools.product(names(args.sizes, tuple(CONFIGS)), names(args.slices, SLICES)))
    except UserError as error:
        parser.error(str(error))
    if args.what == "write":
        if args.note is None:
            parser.error("write needs --note")
        write(args.cells, args.note)
        return
    if args.what == "commands":
        for size, topology in chosen:
            print(shlex.join(command(size, topology, ATTEMPTS[topology][0], args.quick)))
        return
    left = [cell for cell in chosen if missing(place(args.cells, *cell), args.quick)]
    failed = [
        f"{size}@{topology}" for size, topology in left if not make(args.cells, size, topology, args.quick)
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""Plans of every size of the papers on four slices, compiled ahead of time, as a table for the docs.

    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells          # every missing cell
    python benchmarks/aot_table.py run --cells=benchmarks/aot_cells --sizes=uvit-h2048-d42-n16,sdxl --slices=v5p:4x4x4
    python benchmarks/aot_table.py run --quick --cells=benchmarks/aot_cells  # as `plan --quick`, without cycles
    python benchmarks/aot_table.py commands --cells=benchmarks/aot_cells     # the first command of each cell
    python benchmarks/aot_table.py write --cells=benchmarks/aot_cells --note=docs/plan_table.md

A cell is one size on one slice. Its plan is kept as one JSON file, so the table can be made in parts and on several
machines. A size is planned with the slice's settings in `ATTEMPTS`, in turn, until it fits. If the last of them fails,
the file and the table hold its error, and the next run tries that cell again. A cell made with `--quick` has no cycles;
the next run without the flag replaces it. The text encoder is a frozen OpenCLIP-H, latents come from the fixed
transform `dct`, and parameters are split over all chips, as in the experiments. No accelerator is used, and nothing is
measured.
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
# The text encoder of P1 and P2, a frozen OpenCLIP-H. A plan does not read its weights.
PAPER = (
    "--config.text_encoder.name=clip",
    "--config.text_encoder.size=openclip-h",
    "--config.train_text_encoder=False",
)
# From the fastest step to the smallest memory. At the largest sizes a v5e cannot hold the copy of parameters and
# gradients that gather_once needs. Only on a v5e are some of the gathers layer by layer asynchronous.
_SAVING = (
    ("--config.backbone.remat=full",),
    ("--config.backbone.remat=full", "--config.optim.accumulate=4"),
)
_GATHERED = ("--config.sharding.gather_once=True", "--config.backbone.remat=products")
_BY_LAYER = ("--config.backbone.remat=products",)
# Parameters whose width 256 does not divide (IF-XL's 704) stay whole over 256 chips, but split over 64.
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
    """Whether a cell must be planned: its file is missing, holds an error, or a quick plan in place of a full one."""
    if not file.exists():
        return True
    plan = json.loads(file.read_text())
    return "error" in plan or not (quick or plan.get("kernels", True))


def make(folder: pathlib.Path, size: str, topology: str, quick: bool = False) -> bool:
    """Plans a cell with each attempt until one fits, and saves the last plan or error; returns False for an error."""
    found: dict[str, Any] = {}
    failed = []
    for flags in ATTEMPTS[topology]:
        done = subprocess.run(command(size, topology, flags, quick), capture_output=True, text=True)
        # Python also ends with 1 after an error of its own, but then prints nothing to stdout.
        if done.returncode in (0, 1) and done.stdout.strip():
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
        print(f"{size}@{topology}: {'; '.join(failed)}; the quick plan is kept", flush=True)
        return False
    file.write_text(json.dumps(found | {"failed": failed}, indent=1) + "\n")
    print(f"{size}@{topology}: {' | '.join(row(size, found)[2:])}", flush=True)
    return "error" not in found


def row(size: str, plan: dict) -> list[str]:
    """The cells of a plan's line in the table, or of its error."""
    if "error" in plan:
        fault = f"{' '.join(plan['flags'])}: {plan['error']}".replace("|", "/")
        return [size, plan["topology"], fault, *[""] * (len(HEADS) - 3)]
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
    """Milliseconds, MFU and chip-hours of the estimate; empty for a plan without cycles."""
    if times["estimate"] is None:
        return [""] * 3
    return [
        f"{1e3 * times['estimate']:.0f}",
        f"{times['mfu_estimate']:.1%}",
        f"{times['chip_hours_estimate']:,.0f}",
    ]


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the page with the table of all existing cells."""
    lines = [
        *header(
            "Plans of the papers' sizes",
            "benchmarks/aot_table.py",
            "from programs compiled with libtpu on a shared machine, which affects `compile s`; nothing was measured",
        ),
        "",
        "Per chip, global batch 2048, text encoder OpenCLIP-H, codec `dct`; columns as [planning](plan.md) "
        "explains them. Each size is shown with the first of these settings that fits: `remat=products`, on v5p, v4 "
        "and v6e with `gather_once`; on 256 chips the parameters split over 64, with `data` 4; `remat=full`; "
        "`remat=full` with four microbatches. Rows without cycles come from `plan --quick`; their peak includes "
        "the gaps between arrays.",
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
        lines += ["", f"{len(cells) - len(there)} of {len(cells)} plans are missing; `run` makes them."]
    target.write_text("\n".join(lines) + "\n")


def names(text: str | None, known: Sequence[str]) -> list[str]:
    """The names in a comma-separated list; for None all known names.

    Raises:
      UserError: a name is not known.
    """
    found = list(known) if text is None else text.split(",")
    for name in found:
        if name not in known:
            raise UserError(f"unknown {name!r}; {nearest(name, known)}")
    return found


def main() -> None:
    """Runs the command line."""
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

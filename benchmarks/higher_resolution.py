"""The loss at twice the resolution before the first step there, for each way to continue positions and noise.

    python benchmarks/higher_resolution.py --note=benchmarks/higher_resolution_cpu.md

Trains a small model of each family on scenes of 24 px. Each then begins a run at 48 px (`train --from`) for every
choice of its position fields, and with the noise schedule as it is and shifted for the ratio of the sides. The
validation loss of that run at step 0, on the same scenes, is divided by the base's at 24 px. Both are measured at the
same noise levels, at which a larger image is easier: a ratio below 1 is no gain over the base, so compare the rows of a
family.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from note import header

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.evaluation.validation import ValidationLoss
from scaling_dit.training.base import Start
from scaling_dit.training.loop import open_checkpoints
from scaling_dit.training.start import Run

# Four tokens of 6 px along a side of the base.
TRANSFORMER = {"hidden": 96, "depth": 3, "heads": 4, "patch": 6}
BASES: dict[str, dict[str, Any]] = {
    "uvit": {**TRANSFORMER, "depth": 2},
    "pixart": {**TRANSFORMER, "base_size": 4},
    "large_dit": {**TRANSFORMER, "base_size": 4},
    "next_dit": {**TRANSFORMER, "base_size": 4},
    "unet": {
        "channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "transformer_depth": (0, 1), "head_dim": 32,
    },
}  # fmt: skip
SCALINGS = ("none", "linear", "ntk", "centred")
CHOICES: dict[str, list[dict[str, Any]]] = {
    "uvit": [{}, {"table_side": 4}],
    "pixart": [{}, {"base_size": 8}],
    "large_dit": [{"rope_scaling": name} for name in (*SCALINGS, "grid")],
    "next_dit": [{"rope_scaling": name} for name in SCALINGS],
    "unet": [{}],
}
SHIFTS = (1.0, 2.0)


def main() -> None:
    """Trains the bases that the workdir does not hold, measures, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--workdir", help="folder of the runs; a temporary one by default")
    parser.add_argument("--families", default=",".join(BASES), help="those to measure, separated by commas")
    parser.add_argument("--steps", type=int, default=600, help="steps of each base")
    parser.add_argument("--images", type=int, default=256, help="triples of each validation loss")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(args.workdir or temporary)
        for family in args.families.split(","):
            rows += measure(family, folder, args.steps, args.images)
            args.note.write_text(note(rows, args.steps, args.images))


def measure(
    family: str, folder: epath.Path, steps: int, images: int
) -> list[tuple[str, str, float, list[float]]]:
    """(family, fields, loss of the base, loss of each shift at step 0 over it) of every choice."""
    base = run_config(family, steps, "grid24", {})
    scaling_dit.train(base, folder / family)
    before = loss(base, folder / family, None, images)
    rows = []
    for number, fields in enumerate(CHOICES[family]):
        after = []
        for shift in SHIFTS:
            config = run_config(family, steps, "grid48", fields, shift)
            place = folder / f"{family}-{number}-{shift}"
            after.append(loss(config, place, Start(str(folder / family)), images))
        text = ", ".join(f"{name}={value!r}" for name, value in fields.items()) or "as it is"
        rows.append((family, text, before, [value / before for value in after]))
        print(*rows[-1], flush=True)
    return rows


def run_config(
    family: str, steps: int, preset: str, fields: dict[str, Any], shift: float = 1.0
) -> ConfigDict:
    """The run of a family on scenes of a preset."""
    config = config_lib.load("stages:shapes-24").copy_and_resolve_references().unlock()
    config.steps, config.batch = steps, 32
    config.source.preset = preset
    config.backbone = ConfigDict({"name": family, **BASES[family], **fields})
    config.text_encoder.update({"dim": 96, "heads": 4})
    config.diffusion.resolution_shift = shift
    config.eval.update({"every": 0, "metrics": ()})
    del config["metrics"]
    config.log.tensorboard = False
    return config_lib.resolve(config)


def loss(config: ConfigDict, workdir: epath.Path, start: Start | None, images: int) -> float:
    """The validation loss of a run in its present state; one that is new begins from `start`."""
    fresh = not Workdir(workdir).config.exists()
    run = Run.open(config, Workdir(workdir), jax.devices()[:1], None, start if fresh else None)
    with open_checkpoints(run) as store:
        state, _, loader = run.begin(store, ())
        loader.close()
    measured = ValidationLoss(run.model, run.source, run.program.mesh, images=images, bins=1, batch=64)
    return measured(state.params, run.frozen)["loss"]


def note(rows: list[tuple[str, str, float, list[float]]], steps: int, images: int) -> str:
    """The note as markdown."""
    lines = header("The loss at twice the resolution, at step 0", "benchmarks/higher_resolution.py")
    lines += [
        "",
        f"Bases of {steps} steps at 24 px, batch 32, one seed; validation loss on {images} triples at the same noise.",
        "The last columns are the loss of the run at 48 px before its first step, over the base's at 24 px, with",
        "`diffusion.resolution_shift` of 1 and of 2.",
        "",
        "| family | fields of the backbone | base's loss | shift 1 | shift 2 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {family} | {fields} | {before:.4f} | " + " | ".join(f"{ratio:.3f}" for ratio in after) + " |"
        for family, fields, before, after in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

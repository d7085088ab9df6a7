"""Which backbone learns to compose best, at equal parameters and one recipe?

The demo's run (experiments/shapes.py: data, text encoder, loss, optimizer, steps) with each backbone of the library, at
the number of parameters of the demo's U-ViT within a tenth:

    scaling-dit train --config=backbones:pixart --workdir=runs/backbones/pixart
    scaling-dit evaluate --workdir=runs/backbones/pixart

Arguments: uvit, pixart, large_dit, next_dit, unet, unet_if.

Slice: none; 2 CPU cores. A transformer takes about five minutes there; the UNets compute more per parameter and take
several times as long.

Expect each to score far above images of wrong scenes, and to learn colours first. benchmarks/backbones_cpu.md has the
results.
"""

from typing import Any

from ml_collections import ConfigDict
from scaling_dit.experiments import shapes

# The transformers have one token for each grid cell, as the demo's U-ViT. The UNets' first level has 16x16 pixels and
# their last 4x4.
BACKBONES: dict[str, dict[str, Any]] = {
    "uvit": {"hidden": 128, "depth": 4, "heads": 4, "patch": 8, "positions": "sincos_init"},
    "pixart": {"hidden": 120, "depth": 4, "heads": 4, "patch": 8},
    "large_dit": {"hidden": 112, "depth": 3, "heads": 4, "patch": 8},
    "next_dit": {"hidden": 128, "depth": 3, "heads": 4, "patch": 8},
    "unet": {
        "channels": 32, "channel_mult": (1, 1, 2), "res_blocks": 1, "transformer_depth": (0, 1, 1), "head_dim": 32
    },
    "unet_if": {
        "channels": 32, "channel_mult": (1, 1, 2), "res_blocks": 1, "attention_levels": (1, 2), "head_dim": 32
    },
}  # fmt: skip
ARGUMENTS = tuple(BACKBONES)


def get_config(arg: str = "uvit") -> ConfigDict:
    """The demo's run with the backbone `arg`."""
    config = shapes.get_config()
    config.backbone = ConfigDict({"name": arg} | BACKBONES[arg])
    return config

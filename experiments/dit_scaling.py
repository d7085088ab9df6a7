"""Which diffusion transformer scales best? The ladders of arXiv 2404.02883, Table 2, and of arXiv 2412.12391 ("P2").

The recipe (recipe.py) with each row's transformer, named family-size:

    scaling-dit train --config=dit_scaling:uvit-h2048-d42-n16 --workdir=runs/dits/uvit-h2048-d42-n16
    scaling-dit count --config=dit_scaling:uvit-h2048-d42-n16

Rows: hidden width h, depth d, heads n (16 where PixArt names none). P2's own tables are not public. A source names
U-ViT's h2048-d42-n16 and h2560-d42-n16; the others are candidates for its "0.3B to 8B". next_dit is the other reading
of P2's LargeDiT.

Slice: any, for parameters, optimizer state and averages are sharded over all devices. `count` prints the training
FLOPs of the whole run; divided by chips x peak FLOP/s x utilisation they give its seconds.

Expect, as in P2 on its data: at 0.6B and at 2B parameters U-ViT converges faster and ends higher than PixArt and
LargeDiT, and h2048-d42-n16 reaches the scores of the SDXL UNet. On the stand-in data only cost and speed are comparable
with P2.
"""

from ml_collections import ConfigDict
from scaling_dit.experiments.recipe import OPTIONS, recipe

__all__ = ["ARGUMENTS", "LADDERS", "OPTIONS", "get_config"]

LADDERS: dict[str, tuple[str, ...]] = {
    "uvit": (
        "h1024-d20-n16",
        "h1024-d28-n16",
        "h1152-d28-n16",
        "h1024-d42-n16",
        "h1024-d56-n16",
        "h1536-d28-n16",
        "h1536-d42-n16",
        "h2048-d28-n16",
        "h2048-d42-n16",
        "h2560-d42-n16",
        "h3072-d56-n16",
    ),
    "pixart": ("h1024-d28", "h1024-d56", "h1152-d28", "h1536-d28", "h2048-d28", "h2304-d28", "h3072-d28"),
    "large_dit": (
        "h1024-d16-n16",
        "h1024-d28-n16",
        "h1536-d16-n32",
        "h2048-d28-n16",
        "h3072-d32-n32",
        "h4096-d32-n32",
    ),
    "next_dit": ("h2304-d24-n32",),
}
ARGUMENTS = tuple(f"{family}-{size}" for family, sizes in LADDERS.items() for size in sizes)


def get_config(arg: str = "uvit-h2048-d42-n16") -> ConfigDict:
    """The recipe with the transformer of the row `arg`, after which `,pretrained` may stand."""
    row, _, option = arg.partition(",")
    family, _, size = row.partition("-")
    return recipe(family, option=option, size=size)

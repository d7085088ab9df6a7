"""How should a UNet grow: in channels, or in the depth of its transformers? The UNets of arXiv 2404.02883, Table 1.

The recipe (recipe.py) with each row's UNet:

    scaling-dit train --config=unet_scaling:sdxl-td4_4 --workdir=runs/unets/sdxl-td4_4
    scaling-dit count --config=unet_scaling:sdxl-td4_4

Rows: `-c192` is the width of the first level, `-td4_12` the transformer depth at 2x and at 4x downsampling. `-td4` sets
the depth at 4x alone, and the depth at 2x stays 2.

    designs       sd2, sd2-c512, if-xl-c512, if-xl, sdxl
    channels      sdxl-c128, sdxl-c192, sdxl (320), sdxl-c384
    depth         sdxl-td2, sdxl-td4, sdxl (10), sdxl-td12, sdxl-td14
    at 2x too     sdxl-td4_4, sdxl-td4_8, sdxl-td4_12, sdxl-c384-td4_12

Slice: any, for parameters, optimizer state and averages are sharded over all devices. `count` prints the training
FLOPs of the whole run; divided by chips x peak FLOP/s x utilisation they give its seconds.

Expect, as in P1 on its data: transformer depth improves alignment more than width does, and sdxl-td4_4 scores as high
as sdxl with 45 % fewer parameters and 28 % less compute. On the stand-in data only cost and speed are comparable with
P1.
"""

from ml_collections import ConfigDict
from scaling_dit.experiments.recipe import OPTIONS, recipe

__all__ = ["ARGUMENTS", "OPTIONS", "get_config"]

ARGUMENTS = (
    "sd2",
    "sd2-c512",
    "if-xl-c512",
    "if-xl",
    "sdxl",
    "sdxl-c128",
    "sdxl-c192",
    "sdxl-c384",
    "sdxl-td2",
    "sdxl-td4",
    "sdxl-td12",
    "sdxl-td14",
    "sdxl-td4_4",
    "sdxl-td4_8",
    "sdxl-td4_12",
    "sdxl-c384-td4_12",
)


def get_config(arg: str = "sdxl-td4_4") -> ConfigDict:
    """The recipe with the UNet of the row `arg`, after which `,pretrained` may stand."""
    row, _, option = arg.partition(",")
    return recipe("unet_if" if row.startswith("if-") else "unet", option=option, size=row)

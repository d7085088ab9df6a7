"""What the studies on built-in shapes share: a base for two CPU cores, and every family at sizes that are alike.

The base is the demo's run with a constant learning rate, so that each checkpoint is the end of a run with a smaller
budget; the average of its weights stands in for the decay. Scenes are 8 px wide, four cells of 4 px, with one or two
objects and captions that say everything, relations included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from scaling_dit.experiments import shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.ladder import Member

Rows = Mapping[str, Mapping[str, Any]]

# A transformer has one token for each cell; a UNet's two levels have 8x8 and 4x4 pixels. Parameters of each set lie
# within a tenth of their mean, which a test counts.
SMALL: Rows = {
    "uvit": {"hidden": 96, "depth": 2, "heads": 4},
    "pixart": {"hidden": 68, "depth": 4, "heads": 4},
    "large_dit": {"hidden": 64, "depth": 3, "heads": 4},
    "next_dit": {"hidden": 72, "depth": 3, "heads": 2},
    "unet": {"channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "transformer_depth": (0, 1), "head_dim": 32},
    "unet_if": {"channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "attention_levels": (1,), "head_dim": 32},
}  # fmt: skip
LARGE: Rows = {
    "uvit": {"hidden": 120, "depth": 4, "heads": 4},
    "pixart": {"hidden": 112, "depth": 4, "heads": 4},
    "large_dit": {"hidden": 104, "depth": 3, "heads": 4},
    "next_dit": {"hidden": 112, "depth": 3, "heads": 4},
    "unet": {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "transformer_depth": (0, 1), "head_dim": 32},
    "unet_if": {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_levels": (1,), "head_dim": 32},
}  # fmt: skip
# One UNet widened, and deepened to nine tenths of its parameters.
WIDE = {"channels": 64, "channel_mult": (1, 1), "res_blocks": 1, "transformer_depth": (0, 1), "head_dim": 32}
# Scanned, for unrolled its 44 transformer blocks take XLA many minutes to compile on a CPU.
DEEP = {
    "channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "transformer_depth": (0, 11), "head_dim": 32,
    "scan_layers": True,
}  # fmt: skip
# muP scales width with heads of one size, which divides every width of U-ViT in `shapes_full`.
MUP_HEAD = 16


def base(preset: str = "grid8", *, steps: int = 1000, batch: int = 32) -> ConfigDict:
    """The run that members replace fields of."""
    config = shapes.get_config()
    config.steps, config.batch = steps, batch
    config.source.preset = preset
    config.optim.decay = "constant"
    # The study scores the images; training measures the loss and makes a grid.
    config.eval.update({"metrics": (), "loss_images": 256, "grid": 12})
    config.sample.update({"sampler": "dpmpp_2m", "steps": 10})
    return config


def section(name: str, row: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """The section `backbone` of a family's row."""
    made = {"name": name, **row}
    if "hidden" in row:
        made["patch"] = patch
    if name == "uvit":
        made["positions"] = "sincos_init"
    return made


def families(config: ConfigDict, rows: Rows, size: str, patch: int = 4) -> tuple[Member, ...]:
    """Every family of `rows`, named family-size."""
    made = {f"{name}-{size}": section(name, row, patch) for name, row in rows.items()}
    return ladder.families(config, made, {"size": size})


def by_mup(sizes: Sequence[Member]) -> list[Member]:
    """Sizes of one family with their rate tuned at the smallest width, and the largest with such heads alone.

    Heads change no cost that is counted, so budgets stay.
    """
    smallest = sizes[0].config.backbone.hidden
    made = []
    for member in sizes:
        heads = {"backbone.heads": member.config.backbone.hidden // MUP_HEAD}
        changes = heads | {"optim.mup_base": smallest}
        made.append(
            ladder.derive(member.config, changes, f"{member.name}-mup", {**member.groups, "mup": "on"})
        )
    last = sizes[-1]
    without = ladder.derive(last.config, heads, f"{last.name}-h{MUP_HEAD}", {**last.groups, "mup": "off"})
    return [*made, without]

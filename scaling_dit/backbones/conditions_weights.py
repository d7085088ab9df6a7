"""The parameters of image conditions in weight tables: names of this project's own, and diffusers' widened UNets.

The published code of the transformers reads no image conditions, so their tables have entries of its own for these:
`condition_embed.NAME.weight` [D, Ci, p, p], `condition_embed.NAME.bias`, and for U-ViT's shifted positions
`condition_pos.NAME` [1, T, D].

diffusers' inpainting and editing UNets have a first convolution with more input channels: those of the noise, then for
each condition its masks and its image, 4 + 1 + 4 for inpainting. That is the sum of ours, whose image comes first.
InstructPix2Pix's has latents of another scale, which no weight says; see `interop.diffusers.pipelines.check_latents`.
"""

from typing import Any

import numpy as np

from scaling_dit.backbones.conditions import EMBED, position_table, rows_of
from scaling_dit.errors import UserError
from scaling_dit.weights.table import Row, Slices, Transform, conv, leading_axis, patch_conv


def token_rows(backbone: Any) -> list[Row]:
    """The rows of a transformer's conditions; none without conditions."""
    table = []
    for row in rows_of(backbone):
        theirs, ours = f"{EMBED}.{row.name}", f"{EMBED}/{row.name}"
        table.append(Row(f"{theirs}.weight", f"{ours}/kernel", patch_conv(backbone.patch)))
        if row.concat == "token":
            table.append(Row(f"{theirs}.bias", f"{ours}/bias"))
    return table


def position_rows(backbone: Any) -> list[Row]:
    """The rows of the learned tables of shifted conditions."""
    return [
        Row(f"condition_pos.{row.name}", position_table(row.name), leading_axis(), free=(0,))
        for row in rows_of(backbone)
        if row.concat == "token" and row.positions == "shifted"
    ]


def first_convolution(backbone: Any) -> list[Row | Slices]:
    """The rows of a UNet's first convolution, whose weight holds that of every condition too."""
    weight = "conv_in.weight"
    bias = Row("conv_in.bias", "conv_in/bias")
    conditions = rows_of(backbone)
    if not conditions:
        return [Row(weight, "conv_in/kernel", conv()), bias]
    noise = f"{weight}[noise]"
    parts: list[tuple[str, int]] = [(noise, backbone.in_channels)]
    table: list[Row | Slices] = [Row(noise, "conv_in/kernel", conv()), bias]
    for row in conditions:
        masks = max(0, row.channels - backbone.in_channels)
        image = f"{weight}[{row.name}.image]", row.channels - masks
        ours = f"{EMBED}/{row.name}/kernel"
        if masks:
            mask = f"{weight}[{row.name}.masks]", masks
            parts += [mask, image]
            table.append(Row((mask[0], image[0]), ours, _masks_last(masks)))
        else:
            parts.append(image)
            table.append(Row(image[0], ours, conv()))
    return [Slices(weight, 1, tuple(parts)), *table]


def input_channels(backbone: Any) -> int:
    """Channels of the first layer, conditions among them."""
    return backbone.in_channels + sum(row.channels for row in rows_of(backbone) if row.concat == "channel")


def refuse(backbone: Any, class_name: str) -> None:
    """Raises UserError for a backbone with conditions, which a class of diffusers does not read."""
    if rows := rows_of(backbone):
        raise UserError(
            f"diffusers' {class_name} reads no image conditions, and this backbone reads "
            f"{', '.join(row.name for row in rows)}; use --to=safetensors, whose entries {EMBED}.* they are"
        )


def _masks_last(masks: int) -> Transform:
    """Weights OIHW of masks and of an image <-> our kernel HWIO of the image, then the masks."""
    whole = conv()
    return Transform(
        load=lambda mask, image: whole.load(np.concatenate([image, mask], axis=1)),
        save=lambda p: (whole.save(p[:, :, -masks:])[0], whole.save(p[:, :, :-masks])[0]),
    )

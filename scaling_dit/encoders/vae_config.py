"""The architecture of an autoencoder, by name or from the `config.json` of diffusers' `AutoencoderKL`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling_dit.components import tuples
from scaling_dit.errors import UserError
from scaling_dit.weights.inert import EMA_SETTINGS

CLASS_NAME = "AutoencoderKL"

# Arguments of diffusers 0.42.1 for which our module supports one value only.
_FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}
# Arguments without effect here: the tile size, and whether diffusers avoids float16.
_FREE = ("sample_size", "force_upcast")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of an `AutoencoderKL`; the defaults are SDXL's.

    Attributes:
      widths: channels of each level, the finest first; each level halves the sides.
      res_blocks: residual blocks of a level in the encoder; the decoder has one more.
      latent_channels: channels of a latent.
      groups: groups of every GroupNorm.
      quant_conv: whether a 1x1 convolution follows the encoder.
      post_quant_conv: whether a 1x1 convolution precedes the decoder.
      mid_attention: whether attention lies between the residual blocks in the middle.
      scale: factor on latents that brings their variance near 1.
      shift: subtracted before scaling.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    mid_attention: bool = True
    scale: float = 0.13025
    shift: float = 0.0

    @property
    def factor(self) -> int:
        """Side of an image divided by the side of its latent."""
        return 2 ** (len(self.widths) - 1)


ARCHITECTURES = {"sdxl": Architecture(), "sd": Architecture(scale=0.18215)}


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a `config.json` describes. Missing arguments get diffusers' defaults.

    Raises:
      UserError: an argument or value that our module does not support.
    """
    config = tuples(config)
    widths = config.get("block_out_channels", (64,))
    fixed = dict(_FIXED)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        fixed[name] = (kind,) * (len(widths) if isinstance(widths, tuple) else 1)
    known = {
        "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "use_quant_conv",
        "use_post_quant_conv", "mid_block_add_attention", "scaling_factor", "shift_factor", *_FREE, *EMA_SETTINGS,
    }  # fmt: skip
    for name, value in config.items():
        if name in fixed and value != fixed[name]:
            raise UserError(
                f"{where} has {name} {value!r}; the autoencoder here computes with {fixed[name]!r}"
            )
        if name not in fixed and name not in known and not name.startswith("_") and value:
            raise UserError(f"{where} sets {name}, which {CLASS_NAME} does not have")
    try:
        found = Architecture(
            widths=tuple(map(int, widths)),
            res_blocks=int(config.get("layers_per_block", 1)),
            latent_channels=int(config.get("latent_channels", 4)),
            groups=int(config.get("norm_num_groups", 32)),
            quant_conv=bool(config.get("use_quant_conv", True)),
            post_quant_conv=bool(config.get("use_post_quant_conv", True)),
            mid_attention=bool(config.get("mid_block_add_attention", True)),
            scale=float(config.get("scaling_factor", 0.18215)),
            shift=float(config.get("shift_factor") or 0.0),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"the config.json of {where} makes no {CLASS_NAME}: {error}") from None
    numbers = (*found.widths, found.res_blocks, found.latent_channels, found.groups)
    if not found.widths or min(numbers) < 1 or any(width % found.groups for width in found.widths):
        raise UserError(
            f"the config.json of {where} makes no {CLASS_NAME}: widths {found.widths} and groups {found.groups}"
        )
    return found


def write_architecture(architecture: Architecture, sample_size: int) -> dict[str, Any]:
    """The `config.json` of an architecture, for images of `sample_size` px; the inverse of `read_architecture`."""
    levels = len(architecture.widths)
    return {
        "_class_name": CLASS_NAME,
        **_FIXED,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(architecture.widths),
        "layers_per_block": architecture.res_blocks,
        "latent_channels": architecture.latent_channels,
        "norm_num_groups": architecture.groups,
        "use_quant_conv": architecture.quant_conv,
        "use_post_quant_conv": architecture.post_quant_conv,
        "mid_block_add_attention": architecture.mid_attention,
        "scaling_factor": architecture.scale,
        "shift_factor": architecture.shift or None,
        "sample_size": sample_size,
        "force_upcast": True,
    }

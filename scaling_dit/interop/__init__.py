"""Weights in and out of other code bases, by their own names."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.backbones import contract
from scaling_dit.backbones import (
    large_dit_weights as large_dit,
)
from scaling_dit.backbones import (
    next_dit_weights as next_dit,
)
from scaling_dit.backbones import (
    pixart_weights as pixart,
)
from scaling_dit.backbones import (
    unet_if_weights as unet_if,
)
from scaling_dit.backbones import (
    unet_weights as unet,
)
from scaling_dit.backbones import (
    uvit_weights as uvit,
)
from scaling_dit.backbones.large_dit import LargeDiT
from scaling_dit.backbones.next_dit import NextDiT
from scaling_dit.backbones.pixart import PixArt
from scaling_dit.backbones.unet import UNet
from scaling_dit.backbones.unet_if import UNetIF
from scaling_dit.backbones.uvit import UViT
from scaling_dit.errors import UserError
from scaling_dit.weights import table

__all__ = ["TABLES", "load_state_dict", "to_state_dict"]

# Backbone class -> the rows of one backbone of that class.
TABLES: dict[type[nn.Module], Callable[[Any], table.Table]] = {
    UViT: uvit.rows,
    PixArt: pixart.rows,
    LargeDiT: large_dit.rows,
    NextDiT: next_dit.rows,
    UNet: unet.rows,
    UNetIF: unet_if.rows,
}


def load_state_dict(backbone: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Upstream weights as variables of the backbone.

    Args:
      backbone: module whose class is in TABLES, layers scanned or not.
      state_dict: upstream name -> array (numpy or anything `np.asarray` takes). The table of positions may have any
        length; it then fits inputs of that many tokens, or is resized for them.

    Returns:
      {"params": tree} of numpy arrays in `param_dtype`, without logical axes.

    Raises:
      UserError: no mapping for this class, or unknown, missing or misshapen entries, all in one message.
    """
    rows, abstract, what = _mapping(backbone)
    return {"params": table.load(rows, abstract, state_dict, what)}


def to_state_dict(backbone: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables {"params": tree} of the backbone, with logical axes or without, as upstream name -> array.

    Raises:
      UserError: no mapping for this class, or parameters that do not fit the backbone, all in one message.
    """
    rows, abstract, what = _mapping(backbone)
    if "params" not in variables:
        raise UserError(f"variables of {what} must be {{'params': ...}}, got {sorted(variables)}")
    return table.save(rows, abstract, trees.unbox(variables["params"]), what)


def _mapping(backbone: nn.Module) -> tuple[table.Table, dict[str, Any], str]:
    """Rows, abstract parameters and a name for errors."""
    what = type(backbone).__name__
    for family, rows in TABLES.items():
        if isinstance(backbone, family):
            fields: Any = backbone
            side = 16 * getattr(backbone, "patch", 2)  # any that the backbone takes
            inputs = contract.example_inputs(
                backbone, (side, side, fields.in_channels), (77, fields.text_dim)
            )
            return rows(backbone), contract.abstract_variables(backbone, inputs)["params"], what
    raise UserError(f"no mapping of weights for {what}; known: {', '.join(c.__name__ for c in TABLES)}")

"""The model FLOPs of one train step of a run, which MFU is about."""

import re
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.costs.count import Count, count
from scaling_dit.errors import UserError
from scaling_dit.model.adapters import Adapters
from scaling_dit.model.model import Model


def train_flops(config: ConfigDict, model: Model) -> int | None:
    """FLOPs of the backbone in one train step over all chips; None if they cannot be counted."""
    text = (model.text_encoder.length, model.text_encoder.dim)
    backbone: Any = model.backbone
    try:
        counted = count(backbone, model.latent_shape, text)
    except UserError:
        return None
    saved = frozen_macs(counted, adapters_of(config, model))
    return counted.train_flops(config.batch, 1) - 2 * saved * config.batch


def adapters_of(config: ConfigDict, model: Model) -> Adapters | None:
    """The adapters that a run trains, if it does; shapes alone are made."""
    if not config.adapter.rank:
        return None
    return Adapters.of(config, model.shapes()[0])


def frozen_macs(counted: Count, adapters: Adapters | None) -> int:
    """Multiply-accumulates per image that a step of adapters saves: the gradients of kernels that nothing adapts.

    The gradient of a kernel costs as much as its product. Those of the small factors are not counted.
    """
    if adapters is None:
        return 0
    adapted = {_unnumbered(path[1:-1]) for path in adapters.leaves if path[0] == "backbone"}
    kept = sum(cost.macs_paper for path, cost in counted.tree.items() if _unnumbered(path) in adapted)
    return counted.macs_paper - kept


def _unnumbered(path: tuple[str, ...]) -> tuple[str, ...]:
    """A module's path without the numbers of layers, which a count joins."""
    return tuple(re.sub(r"_\d+$", "", name) for name in path)

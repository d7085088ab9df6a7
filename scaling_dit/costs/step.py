"""The model FLOPs of one train step of a run, which MFU is about."""

from typing import Any

from ml_collections import ConfigDict

from scaling_dit.costs.count import count
from scaling_dit.errors import UserError
from scaling_dit.model.model import Model


def train_flops(config: ConfigDict, model: Model) -> int | None:
    """FLOPs of the backbone in one train step over all chips; None if they cannot be counted."""
    text = (model.text_encoder.length, model.text_encoder.dim)
    backbone: Any = model.backbone
    try:
        return count(backbone, model.latent_shape, text).train_flops(config.batch, 1)
    except UserError:
        return None

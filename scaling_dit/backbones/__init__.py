"""Backbones by name: `create("uvit", size="h2048-d42-n16")` or `create("my_package.my_file:MyBackbone", width=64)`."""

from typing import Any

from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.large_dit import LargeDiT
from scaling_dit.backbones.next_dit import NextDiT
from scaling_dit.backbones.pixart import PixArt
from scaling_dit.backbones.unet import UNet
from scaling_dit.backbones.unet_if import UNetIF
from scaling_dit.backbones.uvit import UViT
from scaling_dit.components import Registry

BACKBONES: dict[str, type[nn.Module]] = {
    "uvit": UViT,
    "pixart": PixArt,
    "large_dit": LargeDiT,
    "next_dit": NextDiT,
    "unet": UNet,
    "unet_if": UNetIF,
}
# `parent` and `name` are linen's own.
_REGISTRY = Registry("backbone", BACKBONES, filled=("parent", "name"), check=contract.check_class)

__all__ = ["BACKBONES", "backbone_fields", "create", "create_for", "splits_tokens"]


def create(name: str, **kwargs: Any) -> nn.Module:
    """A backbone (contract.py) with the given fields; lists are taken as tuples.

    Args:
      name: a name in BACKBONES, or "package.module:Class" for a user's own.
      kwargs: fields of the class; those left out keep their defaults.

    Raises:
      UserError: unknown name or field, a module or class that is not found, or a class that is no backbone.
    """
    return _REGISTRY.create(name, kwargs)


def create_for(name: str, *, in_channels: int, text_dim: int, **kwargs: Any) -> nn.Module:
    """`create` for latents of so many channels and text of such a width.

    A class that has no field `in_channels` or `text_dim` reads that width from its inputs.
    """
    known = _REGISTRY.arguments(name)
    widths = {"in_channels": in_channels, "text_dim": text_dim}
    return create(name, **kwargs, **{field: value for field, value in widths.items() if field in known})


def backbone_fields(name: str) -> dict[str, Any]:
    """The fields of a backbone that a config can set, with their defaults.

    Raises:
      UserError: as `create`, and for a field without a default.
    """
    return _REGISTRY.fields(name)


def splits_tokens(name: str) -> bool:
    """Whether a backbone's tokens may be split over the mesh axis `context`; if not, that axis splits the batch.

    Raises:
      UserError: as `create`, for an unknown name.
    """
    return bool(getattr(_REGISTRY.resolve(name), "SPLITS_TOKENS", False))

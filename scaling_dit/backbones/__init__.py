"""Backbones by name: `create("uvit", size="h2048-d42-n16")` or `create("my_package.my_file:MyBackbone", width=64)`.

A family is a row here, a file with its class, and beside it `FAMILY_weights.py` with the table of its weights. All else
(its extras, its weight table, its class in diffusers, whether its tokens can be split) stands in attributes of the
class (`contract.py`), so that a user's own backbone can declare the same.
"""

from typing import Any

from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.components import Registry
from scaling_dit.errors import UserError

# Name -> the place of the class, which is imported when it is asked for.
BACKBONES: dict[str, str] = {
    "uvit": "scaling_dit.backbones.uvit:UViT",
    "pixart": "scaling_dit.backbones.pixart:PixArt",
    "large_dit": "scaling_dit.backbones.large_dit:LargeDiT",
    "next_dit": "scaling_dit.backbones.next_dit:NextDiT",
    "unet": "scaling_dit.backbones.unet:UNet",
    "unet_if": "scaling_dit.backbones.unet_if:UNetIF",
}
# `parent` and `name` are linen's own.
_REGISTRY = Registry("backbone", BACKBONES, filled=("parent", "name"), check=contract.check_class)

__all__ = ["BACKBONES", "backbone_class", "backbone_fields", "create", "create_for", "splits_tokens"]


def create(name: str, **kwargs: Any) -> nn.Module:
    """A backbone (contract.py) with the given fields; lists are taken as tuples.

    Args:
      name: a name in BACKBONES, or "package.module:Class" for a user's own.
      kwargs: fields of the class; those left out keep their defaults.

    Raises:
      UserError: unknown name or field, a module or class that is not found, or a class that is no backbone.
    """
    backbone: nn.Module = _REGISTRY.create(name, kwargs)
    return backbone


def create_for(
    name: str, *, in_channels: int, text_dim: int, conditions: tuple[Any, ...] = (), **kwargs: Any
) -> nn.Module:
    """`create` for latents of so many channels, text of such a width, and image conditions (rows of conditions.py).

    A class that has no field `in_channels` or `text_dim` reads that width from its inputs.

    Raises:
      UserError: as `create`, and for conditions of a class without a field `conditions`.
    """
    known = _REGISTRY.arguments(name)
    derived: dict[str, Any] = {"in_channels": in_channels, "text_dim": text_dim}
    if conditions:
        if "conditions" not in known:
            raise UserError(
                f"backbone {name!r} reads no conditions, for it has no field `conditions`; "
                f"leave config.conditioning.names empty, not {tuple(row[0] for row in conditions)}"
            )
        derived["conditions"] = conditions
    return create(name, **kwargs, **{field: value for field, value in derived.items() if field in known})


def backbone_class(name: str) -> type[nn.Module]:
    """The class of a backbone.

    Raises:
      UserError: as `create`, for an unknown name.
    """
    found: type[nn.Module] = _REGISTRY.resolve(name)
    return found


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
    return bool(getattr(backbone_class(name), "SPLITS_TOKENS", False))

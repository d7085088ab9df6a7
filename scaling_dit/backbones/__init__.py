"""Backbones by name: `create("uvit", size="h2048-d42-n16")` or `create("my_package.my_file:MyBackbone", width=64)`."""

import dataclasses
import importlib
from typing import Any

from flax import linen as nn

from scaling_dit.backbones import contract
from scaling_dit.backbones.uvit import UViT
from scaling_dit.errors import UserError, nearest

BACKBONES: dict[str, type[nn.Module]] = {"uvit": UViT}

__all__ = ["BACKBONES", "backbone_class", "backbone_fields", "create", "create_for"]


def create(name: str, **kwargs: Any) -> nn.Module:
    """A backbone (contract.py) with the given fields; lists are taken as tuples.

    Args:
      name: a name in BACKBONES, or "package.module:Class" for a user's own.
      kwargs: fields of the class; those left out keep their defaults.

    Raises:
      UserError: unknown name or field, a module or class that is not found, or a class that is no backbone.
    """
    module = backbone_class(name)
    known = _fields(module)
    for field in kwargs:
        if field not in known:
            raise UserError(f"backbone {name!r} has no field {field!r}; {nearest(field, known)}")
    missing = [
        field for field, default in known.items() if default is dataclasses.MISSING and field not in kwargs
    ]
    if missing:
        raise UserError(f"backbone {name!r} needs a value for {', '.join(missing)}")
    return module(**{field: _tuples(value) for field, value in kwargs.items()})


def create_for(name: str, *, channels: int, text_dim: int, **kwargs: Any) -> nn.Module:
    """`create` for latents of so many channels and text of such a width; a class may read either from its inputs instead."""
    known = _fields(backbone_class(name))
    widths = {"in_channels": channels, "text_dim": text_dim}
    return create(name, **kwargs, **{field: value for field, value in widths.items() if field in known})


def backbone_fields(name: str) -> dict[str, Any]:
    """The fields of a backbone that a config can set, with their defaults.

    Raises:
      UserError: as `create`, and for a field without a default.
    """
    fields = _fields(backbone_class(name))
    for field, default in fields.items():
        if default is dataclasses.MISSING:
            raise UserError(
                f"backbone {name!r}: field {field!r} needs a default, so that a config can show it"
            )
    return {field: default for field, default in fields.items() if _is_plain(default)}


def backbone_class(name: str) -> type[nn.Module]:
    """The class behind a name of BACKBONES or "package.module:Class".

    Raises:
      UserError: unknown name, module or class not found, or a class that is no backbone.
    """
    if ":" not in name:
        if name not in BACKBONES:
            raise UserError(
                f"unknown backbone {name!r} (or 'package.module:Class'); {nearest(name, BACKBONES)}"
            )
        return BACKBONES[name]
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module_name == missing or module_name.startswith(missing + "."):
            raise UserError(
                f"backbone {name!r}: module {missing!r} is not found; its folder must be on the Python path"
            ) from None
        raise UserError(
            f"backbone {name!r}: {module_name} imports {missing!r}, which is not found"
        ) from error
    except Exception as error:
        raise UserError(
            f"backbone {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, class_name):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise UserError(
            f"backbone {name!r}: {module_name} has no class {class_name!r}; {nearest(class_name, classes)}"
        )
    return contract.check_class(getattr(module, class_name), repr(name))


def _fields(module: type[nn.Module]) -> dict[str, Any]:
    """Fields and defaults, MISSING where there is none; `parent` and `name` are linen's own."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        if field.init and field.name not in ("parent", "name"):
            factory = field.default_factory
            defaults[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return defaults


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value

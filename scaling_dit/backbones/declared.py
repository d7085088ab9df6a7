"""What the class of a backbone declares about other code: its weight table and its class in diffusers (`contract.py`).

Both are attributes that name an object as "package.module:name", so that a module loads its table only when weights
come in or go out.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from scaling_dit import backbones
from scaling_dit.components import Registry
from scaling_dit.errors import UserError
from scaling_dit.weights.diffusers_class import DiffusersClass
from scaling_dit.weights.table import Table


def weight_table(backbone: nn.Module) -> Callable[[nn.Module], Table]:
    """The function of a backbone's class that gives the table of its weights.

    Raises:
      UserError: the class names none, or what it names is not found or no function.
    """
    family = type(backbone)
    place = getattr(family, "WEIGHTS", None)
    if place is None:
        raise UserError(
            f"{family.__name__} has no weight table; give the class the attribute WEIGHTS = 'package.module:function', "
            f"as the built-in backbones {', '.join(backbones.BACKBONES)} do"
        )
    found: Callable[[nn.Module], Table] = _load(family, "WEIGHTS", place, "function", _check_function)
    return found


def diffusers_class(family: type[Any]) -> DiffusersClass | None:
    """The diffusers class that computes what a backbone's class does; None if it declares none.

    Raises:
      UserError: what it names is not found or no `DiffusersClass`.
    """
    place = getattr(family, "DIFFUSERS", None)
    if place is None:
        return None
    found: DiffusersClass = _load(family, "DIFFUSERS", place, "DiffusersClass", _check_diffusers)
    return found


@functools.cache
def built_in_diffusers() -> dict[str, DiffusersClass]:
    """The built-in backbones that diffusers has a class for, by name."""
    found = {name: diffusers_class(backbones.backbone_class(name)) for name in backbones.BACKBONES}
    return {name: declared for name, declared in found.items() if declared is not None}


def _load(
    family: type[nn.Module], attribute: str, place: Any, kind: str, check: Callable[[Any, str], None]
) -> Any:
    what = f"{attribute} of {family.__name__}"
    if not isinstance(place, str):
        raise UserError(f"{what} must be a text, 'package.module:{kind}', it is a {type(place).__name__}")
    return Registry(what, {}, check=check, kind=kind).resolve(place)


def _check_function(found: Any, name: str) -> None:
    if not callable(found):
        raise UserError(
            f"WEIGHTS names {name}, which must be a function from a backbone to rows, not a {type(found).__name__}"
        )


def _check_diffusers(found: Any, name: str) -> None:
    if not isinstance(found, DiffusersClass):
        raise UserError(
            f"DIFFUSERS names {name}, which must be a DiffusersClass, not a {type(found).__name__}"
        )

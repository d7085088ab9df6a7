"""The `config.json` of diffusers' models and the fields of our backbones, each from the other.

What a backbone computes fixes every argument of its diffusers class (the class attribute `DIFFUSERS`) but a few. An
imported file is checked by writing it again, so that an option which the backbone does not have is an error and never a
silent difference.
"""

from collections.abc import Mapping
from typing import Any

from scaling_dit import backbones
from scaling_dit.backbones.declared import built_in_diffusers, diffusers_class
from scaling_dit.errors import UserError, nearest
from scaling_dit.weights.diffusers_class import VERSION, DiffusersClass
from scaling_dit.weights.inert import EMA_SETTINGS


def write_config(backbone_name: str, backbone: Any, latents: tuple[int, int]) -> dict[str, Any]:
    """The `config.json` of a backbone for latents of a height and width.

    Raises:
      UserError: diffusers has no class that computes what this backbone does.
    """
    family = diffusers_class(type(backbone))
    if family is None:
        raise UserError(
            f"diffusers has no model that computes what backbone {backbone_name!r} does; it has one for "
            f"{', '.join(built_in_diffusers())}; --to=safetensors writes the names of the published code"
        )
    head = {"_class_name": family.class_name, "_diffusers_version": VERSION}
    return head | dict(family.defaults) | family.to_arguments(backbone, latents)


def family_of(
    config: Mapping[str, Any], where: str, configured: str | None = None
) -> tuple[str, DiffusersClass]:
    """The backbone that a `config.json` belongs to, by name, and its class in diffusers.

    Args:
      config: the file's contents.
      where: names the file in errors.
      configured: the backbone of the run, such as a user's own, which is asked before the built-in ones.

    Raises:
      UserError: it names no class, or one that no backbone computes.
    """
    named = config.get("_class_name")
    if named is None:
        raise UserError(
            f"the config.json of {where} has no _class_name, so diffusers did not write it; give a safetensors file "
            "instead of the folder, or export it first if it is a run"
        )
    families = built_in_diffusers()
    own = diffusers_class(backbones.backbone_class(configured)) if configured else None
    if configured and own is not None:
        families = {configured: own, **families}
    for name, family in families.items():
        if named in (family.class_name, *family.aliases) and family.matches(_arguments(family, config)):
            return name, family
    known = {family.class_name for family in families.values()}
    raise UserError(f"{where} is of a {named}, which no backbone here computes; {nearest(str(named), known)}")


def read_fields(family: DiffusersClass, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our backbone's fields from a `config.json`; arguments that it leaves out have their defaults.

    Raises:
      UserError: an argument that diffusers does not have and that is switched on, or a value of the wrong type.
    """
    for name, value in config.items():
        # The average of weights that a trainer of diffusers saves has settings of its own.
        if name in EMA_SETTINGS and name not in family.defaults:
            continue
        # Files of older versions carry switches that later ones dropped; off, they mean nothing.
        if name not in family.defaults and not name.startswith("_") and value:
            raise UserError(f"{where} sets {name}, which {family.class_name} does not have")
    try:
        return family.to_fields(_arguments(family, config))
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the config.json of {where} makes no {family.class_name}: {error}") from None


def check_same(
    name: str,
    family: DiffusersClass,
    config: Mapping[str, Any],
    backbone: Any,
    latents: tuple[int, int],
    where: str,
) -> None:
    """Makes sure that a backbone, by name `name`, computes what a `config.json` describes.

    Raises:
      UserError: names the first argument that differs.
    """
    ours = _arguments(family, write_config(name, backbone, latents))
    for argument, value in _arguments(family, config).items():
        if argument not in family.free and not same_value(value, ours[argument]):
            raise UserError(
                f"{where} has {argument} {value!r}; backbone {name!r} computes with {ours[argument]!r} here"
            )


def keep_spelling(
    family: DiffusersClass, written: Mapping[str, Any], imported: Mapping[str, Any]
) -> dict[str, Any]:
    """`written` with the values of the file it was imported from where both mean the same: 8 and [8, 8, 8] do."""
    return {
        name: imported[name]
        if name in imported and (name in family.free or same_value(value, imported[name]))
        else value
        for name, value in written.items()
    }


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of an argument mean the same; one number stands for any number of equal ones."""
    one, other = _tuple(one), _tuple(other)
    if isinstance(one, tuple) != isinstance(other, tuple):
        many, single = (one, other) if isinstance(one, tuple) else (other, one)
        return bool(many) and all(same_value(value, single) for value in many)
    return one == other


def _arguments(family: DiffusersClass, config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(config.get(name, default)) for name, default in family.defaults.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value

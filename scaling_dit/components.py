"""Components by name: what the `name` of a config section stands for, and which fields it takes.

A component is a class whose constructor arguments are plain config values with defaults. It is named by a short
built-in name or, a user's own, by "package.module:Class".
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from scaling_dit.errors import UserError, nearest


def resolve(what: str, name: str, known: Mapping[str, str]) -> type[Any]:
    """The class behind a name.

    Args:
      what: the kind of component, for error lines ("source").
      name: a key of `known`, or "package.module:Class".
      known: built-in name -> "package.module:Class"; imported only when asked for.

    Raises:
      UserError: unknown name, module or class.
    """
    module_name, _, class_name = known.get(name, name).partition(":")
    if not (class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        hint = nearest(name.partition(":")[0], known)
        raise UserError(f"unknown {what} {name!r}; {hint} (or a class of your own: package.module:Class)")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the named module itself is the user's slip; a missing import inside it keeps its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        hint = nearest(module_name, known)
        raise UserError(
            f"unknown {what} {name!r}: no module {error.name!r} on the Python path; {hint}"
        ) from None
    found = getattr(module, class_name, None)
    if found is None:
        hint = nearest(class_name, [key for key in vars(module) if not key.startswith("_")])
        raise UserError(f"{what} {name!r}: module {module_name!r} has no {class_name!r}; {hint}")
    return found


def fields(component: type[Any]) -> dict[str, Any]:
    """The config-settable fields of a component with their defaults.

    A dataclass field with `metadata={"config": False}`, and any argument without a default, is not settable: the
    caller fills it.
    """
    hidden = set()
    if dataclasses.is_dataclass(component):
        hidden = {
            field.name for field in dataclasses.fields(component) if not field.metadata.get("config", True)
        }
    return {
        name: parameter.default
        for name, parameter in inspect.signature(component).parameters.items()
        if parameter.default is not parameter.empty and name not in hidden
    }


def construct(
    what: str,
    name: str,
    component: type[Any],
    given: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """`component(**fixed, **given)`, after checking `given` against its fields.

    Raises:
      UserError: a field that the component does not have.
    """
    known = fields(component)
    for field in given:
        if field not in known:
            raise UserError(f"{what} {name!r} has no field {field!r}; {nearest(field, known)}")
    return component(**(fixed or {}), **given)

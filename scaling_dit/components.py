"""Components by name: what the `name` of a config section stands for, and which fields it takes.

A component is a class whose constructor arguments are plain config values with defaults. It is named by a short
built-in name or, a user's own, by "package.module:Class".
"""

import dataclasses
import importlib
import inspect
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

from scaling_dit.errors import UserError, nearest

REQUIRED = dataclasses.MISSING  # stands for the default of an argument that has none


@dataclasses.dataclass(frozen=True)
class Registry:
    """The components of one kind.

    Attributes:
      what: the kind, for error lines ("source").
      known: built-in name -> class, or "package.module:Class", which is imported only when it is asked for.
      filled: arguments that the program fills, so that no config has them.
      check: what a class must hold to, given it and its name as a text; raises UserError.
      kind: what a name of a user's own stands for, for error lines.
    """

    what: str
    known: Mapping[str, str | type[Any]]
    filled: Collection[str] = ()
    check: Callable[[Any, str], None] = lambda candidate, name: None
    kind: str = "class"

    def resolve(self, name: str) -> Any:
        """The class behind a key of `known` or "package.module:Class".

        Raises:
          UserError: unknown name, a module that is not found or fails on import, an unknown class, or one that does
            not pass `check`.
        """
        known = self.known.get(name, name)
        found = self._load(name, known) if isinstance(known, str) else known
        self.check(found, repr(name))
        return found

    def arguments(self, name: str) -> dict[str, Any]:
        """Every argument a caller may give a component, with its default or REQUIRED.

        Left out are those in `filled`, and dataclass fields with `metadata={"config": False}`.

        Raises:
          UserError: as `resolve`.
        """
        component = self.resolve(name)
        if dataclasses.is_dataclass(component):
            defaults = {
                field.name: field.default if field.default_factory is REQUIRED else field.default_factory()
                for field in dataclasses.fields(component)
                if field.init and field.metadata.get("config", True)
            }
        else:
            defaults = {
                parameter.name: REQUIRED if parameter.default is parameter.empty else parameter.default
                for parameter in inspect.signature(component).parameters.values()
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            }
        return {argument: default for argument, default in defaults.items() if argument not in self.filled}

    def fields(self, name: str) -> dict[str, Any]:
        """What a config can set of a component, with the defaults; arguments that are no plain values are left out.

        Raises:
          UserError: as `resolve`, and for an argument without a default.
        """
        arguments = self.arguments(name)
        for argument, default in arguments.items():
            if default is REQUIRED:
                raise UserError(
                    f"{self.what} {name!r}: field {argument!r} needs a default, so that a config can show it"
                )
        return {argument: default for argument, default in arguments.items() if _is_plain(default)}

    def create(self, name: str, given: Mapping[str, Any], **filled: Any) -> Any:
        """A component from the given arguments, in which lists are taken as tuples, and those that the program fills.

        Raises:
          UserError: as `resolve`, an argument the component does not have, or one left out that has no default.
        """
        known = self.arguments(name)
        for argument in given:
            if argument not in known:
                hint = nearest(argument, known) if known else "it has none"
                raise UserError(f"{self.what} {name!r} has no field {argument!r}; {hint}")
        missing = [argument for argument in known if known[argument] is REQUIRED and argument not in given]
        if missing:
            raise UserError(f"{self.what} {name!r} needs a value for {', '.join(missing)}")
        return self.resolve(name)(**filled, **{argument: tuples(value) for argument, value in given.items()})

    def _load(self, name: str, place: str) -> Any:
        """The class at `place`, "package.module:Class"."""
        module_name, _, class_name = place.partition(":")
        form = f"package.module:{'Class' if self.kind == 'class' else self.kind}"
        hint = nearest(module_name, self.known) if self.known else f"write {form}"
        if not (class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
            own = f" (or a {self.kind} of your own: {form})" if self.known else ""
            raise UserError(f"unknown {self.what} {name!r}; {hint}{own}")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            if name in self.known:  # a fault of ours
                raise
            missing = isinstance(error, ModuleNotFoundError) and error.name
            if missing and f"{module_name}.".startswith(f"{missing}."):
                raise UserError(
                    f"{self.what} {name!r}: no module {missing!r} on the Python path; {hint}"
                ) from None
            raise UserError(
                f"{self.what} {name!r}: importing {module_name} failed at {_place(error)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not hasattr(module, class_name):
            kind = type if self.kind == "class" else object
            defined = [
                key for key, value in vars(module).items() if isinstance(value, kind) and key[0] != "_"
            ]
            hint = nearest(class_name, defined) if defined else "it defines none"
            raise UserError(f"{self.what} {name!r}: {module_name} has no {self.kind} {class_name!r}; {hint}")
        return getattr(module, class_name)


def _place(error: Exception) -> str:
    """File and line of the code that raised an error while it was imported."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    last = next(frame for frame in reversed(frames) if not frame.filename.startswith("<"))  # not importlib's
    return f"{last.filename}, line {last.lineno}"


def tuples(value: Any) -> Any:
    """The value with every list in it, at any depth, as a tuple: configs hold no lists."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)

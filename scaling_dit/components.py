"""Components by name: what the `name` of a config section stands for, and which fields it takes.

A component is a class, or a function that returns an object, whose arguments are plain config values with defaults. It
is named by a short built-in name or, a user's own, by "package.module:Name". A `Seam` is a single field of the config,
such as `diffusion.schedule`, that names one.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from scaling_dit.errors import UserError, nearest
from scaling_dit.files import expand, is_remote

# Stands for the default of an argument that has none.
REQUIRED = dataclasses.MISSING


def comparable(*parts: Any) -> bool:
    """Whether what follows from these parts follows from any that are equal to them.

    It does from built-in ones whose fields have a hash; a user's own may depend on more than its fields.
    """
    try:
        hash(parts)
    except TypeError:
        return False
    return all(type(part).__module__.startswith("scaling_dit.") for part in parts)


@dataclasses.dataclass(frozen=True)
class Registry:
    """The components of one kind.

    Attributes:
      what: the kind, for error lines ("source").
      known: built-in name -> class, or "package.module:Class", which is imported only when it is asked for.
      filled: arguments that the program fills, where a component has them, so that no config has them.
      check: what a class must hold to, given it and its name as a text; raises UserError.
      kind: what a name of a user's own stands for, for error lines.
    """

    what: str
    known: Mapping[str, str | Callable[..., Any]]
    filled: Collection[str] = ()
    check: Callable[[Any, str], None] = lambda candidate, name: None
    kind: str = "class or function"

    def resolve(self, name: str) -> Any:
        """The class or function behind a key of `known` or "package.module:Name".

        Raises:
          UserError: unknown name, a module that is not found or fails on import, a name that it does not define, or one
            that does not pass `check`.
        """
        if not isinstance(name, str):
            raise UserError(f"{self.what} is named by a text, not by {describe(name)}")
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
        """The fields that a config can set of a component, with their defaults; only plain values are fields.

        Raises:
          UserError: as `resolve`, and for an argument without a default.
        """
        arguments = self.arguments(name)
        for argument, default in arguments.items():
            if default is REQUIRED:
                raise UserError(
                    f"{self.what} {name!r}: field {argument!r} needs a default, so that a config can show it"
                )
        return {argument: default for argument, default in arguments.items() if is_plain(default)}

    def create(self, name: str, given: Mapping[str, Any], **filled: Any) -> Any:
        """A component from the given arguments, in which lists are taken as tuples, and those that the program fills.

        Raises:
          UserError: as `resolve`, an argument the component does not have, or one left out that has no default.
        """
        known = self.arguments(name)
        self.check_known(name, given)
        for argument, value in given.items():
            if is_plain(known[argument]) and not is_plain(value):
                right = "a number, text, True, False or None, or a tuple of these"
                raise UserError(
                    f"{self.what} {name!r}: field {argument!r} is {describe(value)}; it must be {right}"
                )
        missing = [argument for argument in known if known[argument] is REQUIRED and argument not in given]
        if missing:
            raise UserError(f"{self.what} {name!r} needs a value for {', '.join(missing)}")
        component = self.resolve(name)
        filled = {argument: value for argument, value in filled.items() if self._takes(component, argument)}
        arguments = filled | {argument: tuples(value) for argument, value in given.items()}
        if name in self.known:
            return component(**arguments)
        with one_line(f"{self.what} {name!r}: it"):
            return component(**arguments)

    def check_known(self, name: str, given: Iterable[str]) -> None:
        """Makes sure that a component has these arguments; raises UserError for the first that it has not."""
        known = self.arguments(name)
        for argument in given:
            if argument not in known:
                hint = nearest(argument, known) if known else "it has none"
                raise UserError(f"{self.what} {name!r} has no field {argument!r}; {hint}")

    def _takes(self, component: Any, argument: str) -> bool:
        """Whether a component takes an argument that the program fills; those not in `filled` it must take."""
        if argument not in self.filled:
            return True
        parameters = inspect.signature(component).parameters
        return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def _load(self, name: str, place: str) -> Any:
        """The class or function at `place`, "package.module:Name"."""
        module_name, _, class_name = place.partition(":")
        form = f"package.module:{'function' if self.kind == 'function' else 'Name'}"
        hint = nearest(module_name, self.known) if self.known else f"write {form}"
        if not (class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
            own = f" (or one of your own: {form})" if self.known else ""
            raise UserError(f"unknown {self.what} {name!r}; {hint}{own}")
        try:
            module = importlib.import_module(module_name)
        # A file may leave by sys.exit, too.
        except (Exception, SystemExit) as error:
            # A fault of the library.
            if name in self.known:
                raise
            missing = isinstance(error, ModuleNotFoundError) and error.name
            if missing and f"{module_name}.".startswith(f"{missing}."):
                raise UserError(
                    f"{self.what} {name!r}: no module {missing!r} in {os.getcwd()} or elsewhere on the Python path; "
                    f"start from the folder that holds it, or add that to PYTHONPATH; {hint}"
                ) from None
            raise UserError(
                f"{self.what} {name!r}: importing {module_name} failed at {_place(error)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        # A registry of other things than classes and functions takes any value.
        takes = callable if self.kind in ("class", "function", "class or function") else _is_value
        found = getattr(module, class_name, None)
        if found is None or not takes(found):
            names = [key for key, value in vars(module).items() if takes(value) and not key.startswith("_")]
            hint = nearest(class_name, names) if names else "it defines none"
            raise UserError(f"{self.what} {name!r}: {module_name} has no {self.kind} {class_name!r}; {hint}")
        return found


@dataclasses.dataclass(frozen=True)
class BackEnds:
    """Components that a flag names together with their place, such as "openai:http://localhost:8000/v1".

    Attributes:
      registry: the components.
      places: built-in name -> the field that follows the colon of a name.
      flag: that gives other fields as FIELD=VALUE, for error lines.
    """

    registry: Registry
    places: Mapping[str, str]
    flag: str

    def split(self, name: str) -> tuple[str, dict[str, str]]:
        """(name of the component, the field after the colon with its value).

        Raises:
          UserError: a built-in component without its place.
        """
        kind, _, place = name.partition(":")
        if kind not in self.places:
            return name, {}
        if not place:
            field = self.places[kind]
            raise UserError(f"{self.registry.what} {name!r} names no {field}; write {kind}:{field.upper()}")
        # A server is named by a URL.
        return kind, {self.places[kind]: place if is_remote(place) else expand(place)}

    def is_own(self, kind: str) -> bool:
        """Whether this component is a user's own."""
        return kind not in self.registry.known

    def create(self, name: str, options: Mapping[str, str]) -> Any:
        """A component.

        Args:
          name: its name, with its place.
          options: field -> value as text, converted to the type of the field's default.

        Raises:
          UserError: the name or a field is unknown, a value has the wrong type, or the component cannot start.
        """
        kind, given = self._given(name, options)
        return self.registry.create(kind, given)

    def check(self, name: str, options: Mapping[str, str]) -> None:
        """Makes sure that `create` will find the component and its fields, and makes none; raises UserError."""
        kind, given = self._given(name, options)
        self.registry.check_known(kind, given)

    def _given(self, name: str, options: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """(name of the component, its fields with their values)."""
        kind, place = self.split(name)
        known = self.registry.arguments(kind)
        given = {
            field: self._typed(field, text, known[field]) if field in known else text
            for field, text in options.items()
        }
        return kind, given | place

    def _typed(self, field: str, text: str, default: Any) -> Any:
        """The text of an option, converted to the type of its default."""
        kind = type(default) if isinstance(default, int | float) and not isinstance(default, bool) else str
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{self.flag}={field}={text}: give a value such as {default}") from None


@dataclasses.dataclass(frozen=True)
class Seam:
    """A field of the config that names one of several built-in parts or, by "package.module:Name", a user's own.

    Built-in parts are set by other fields of the same section. A user's own has fields of its own, in a section beside.

    Attributes:
      key: the field, such as "diffusion.schedule".
      names: of the built-in parts.
      filled: arguments that the program gives to a user's own part that has them.
    """

    key: str
    names: Collection[str]
    filled: Collection[str] = ()

    def is_own(self, name: str) -> bool:
        """Whether this names a part of a user's own."""
        return name not in self.names

    def where(self, name: str) -> str:
        """How an error line names a part."""
        return f"config.{self.key} {name!r}"

    def fields(self, name: str) -> dict[str, Any]:
        """The fields of a part of a user's own, with their defaults; none for a built-in one.

        Raises:
          UserError: as `Registry.fields`.
        """
        return self._registry.fields(name) if self.is_own(name) else {}

    def create(
        self,
        name: str,
        fields: Mapping[str, Any],
        built_in: Callable[[], Any],
        check: Callable[[Any, str], None],
        **filled: Any,
    ) -> Any:
        """The part that the field names: a built-in one, or a user's own made of its fields and checked.

        Args:
          name: what the field names.
          fields: of a user's own.
          built_in: gives the built-in part of this name.
          check: raises UserError where a user's own is not as its protocol says, given it and its name for the line.
          filled: arguments that the program gives to a user's own.

        Raises:
          UserError: as `Registry.create`, and whatever the constructor or `check` raises, in one line.
        """
        if not self.is_own(name):
            return built_in()
        part = self._registry.create(name, fields, **filled)
        check(part, self.where(name))
        return part

    @property
    def _registry(self) -> Registry:
        return Registry(f"config.{self.key}", dict.fromkeys(self.names, ""), self.filled)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns what a user's own code raises into a UserError: what raised, the error, and its file and line.

    Args:
      what: who raises, such as "config.diffusion.schedule 'my:Laplace': alpha()".
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{what} raised {type(error).__name__}: {first} ({_place(error)})") from error


class Guarded:
    """A part of a user's own whose methods raise in one line: which method, the error, its file and line.

    Args:
      part: any object.
      where: its name in the error line.
    """

    def __init__(self, part: Any, where: str) -> None:
        self._part, self._where = part, where

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """That of the part, for `isinstance`."""
        return type(self._part)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with one_line(f"{self._where}: {name}()"):
                return value(*args, **kwargs)

        return call


def check_methods(part: Any, where: str, methods: Mapping[str, str]) -> None:
    """Makes sure that a part has the methods of its protocol, and that each can be called so.

    Args:
      part: any object.
      where: its name in the error line.
      methods: name of a method -> its arguments, separated by ", ", such as {"table": "schedule, steps"}; "__call__"
        is the call of the part itself.

    Raises:
      UserError: the first method that is missing or takes other arguments.
    """
    for name, arguments in methods.items():
        shown = f"{name}({arguments})"
        # A function's own __call__ takes anything.
        method = part if name == "__call__" else getattr(part, name, None)
        if isinstance(part, type) or not callable(method):
            raise UserError(f"{where}: it has no method {shown}; it is {describe(part)}")
        try:
            signature = inspect.signature(method)
        # Some built-in callables have no signature.
        except ValueError:
            continue
        try:
            signature.bind(*arguments.split(", "))
        except TypeError as error:
            raise UserError(
                f"{where}: {name} has the call {signature}; it must take ({arguments}): {error}"
            ) from None


def check_class_methods(
    candidate: type, where: str, kind: str, methods: Mapping[str, tuple[int, str]]
) -> None:
    """Makes sure that a class has the methods of its contract, and that they take as many arguments.

    Args:
      candidate: the class.
      where: what names it in the error line.
      kind: what it is to be, such as "source".
      methods: name -> (number of arguments with self, how the contract writes it).

    Raises:
      UserError: a method that is missing or cannot be called so.
    """
    for method, (arguments, form) in methods.items():
        found = getattr(candidate, method, None)
        if not callable(found):
            raise UserError(f"{kind} {where} has no {method}; a {kind} needs {form}")
        try:
            inspect.signature(found).bind(*[None] * arguments)
        except TypeError as error:
            raise UserError(f"{kind} {where}: a {kind} needs {form}, its own takes {error}") from None
        except ValueError:
            # A method written in C has no signature.
            continue


def describe(thing: Any) -> str:
    """Describes an object, for an error line: "the class UViT", "a float"."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _place(error: Exception | SystemExit) -> str:
    """File and line of the code that raised an error, outside of installed packages if some of it is."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")
    ]
    here = [frame for frame in frames if "site-packages" not in frame.filename]
    last = (here or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def tuples(value: Any) -> Any:
    """The value with every list in it, at any depth, as a tuple: configs hold no lists."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def _is_value(value: Any) -> bool:
    return not isinstance(value, types.ModuleType)


def is_plain(value: Any) -> bool:
    """Whether a value is one that a field can have: a number, text, True, False or None, or a tuple of these."""
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)

"""Experiment files, found by path or by name, and the configs that they return.

An experiment is a Python file with `get_config(arg="") -> ConfigDict`. A file that takes arguments lists them in
`ARGUMENTS`, a tuple of strings, so that a mistyped one is caught and each has its golden dump. One of `OPTIONS`, if the
file has them, may follow an argument after a comma.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import describe
from scaling_dit.errors import UserError, nearest
from scaling_dit.files import expand

INSTALLED = "scaling_dit.experiments"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file that `--config` names may be.

    Attributes:
      word: what it is, such as "experiment".
      function: what the file must define; it is called with the argument, if there is one.
      returns: the class of what that must return.
      package: where those that are installed lie. folder: where others of a name are looked for.
      example: the name of one that is installed.
    """

    word: str
    function: str
    returns: type
    package: str
    folder: str
    example: str


EXPERIMENT = Kind("experiment", "get_config", ConfigDict, INSTALLED, "experiments", "shapes")


def read_experiment(spec: str) -> ConfigDict:
    """Calls the `get_config` of an experiment.

    Args:
      spec: `path/to/file.py`, the name of an installed experiment such as `shapes`, or either with `:argument`.

    Raises:
      UserError: as `read`.
    """
    config: ConfigDict = read(spec, EXPERIMENT)
    return config


def read(spec: str, kind: Kind) -> Any:
    """Calls the function of a file, and returns what it gives.

    Args:
      spec: `path/to/file.py`, the name of an installed file, or either with `:argument`.
      kind: what the file is.

    Raises:
      UserError: no such file, no such function in it, an unknown argument, or whatever the file raises, such as for a
        field that does not exist or is of another type; the original error is its cause.
    """
    a = f"{'an' if kind.word[0] in 'aeiou' else 'a'} {kind.word}"
    if not isinstance(spec, str):
        raise UserError(f"{a} is named by a text such as '{kind.example}:smoke', not by {describe(spec)}")
    place, _, argument = spec.partition(":")
    module = load_file(pathlib.Path(expand(place)), kind.word) if _is_path(place) else _named(place, kind, a)
    where = getattr(module, "__file__", None) or place
    function = getattr(module, kind.function, None)
    if not callable(function):
        raise UserError(f"{where} has no {kind.function}(arg='') function; {a} file must define one")
    with faults_of(where):
        _check_argument(module, function, argument, where, kind)
        found = function(argument) if argument else function()
    if not isinstance(found, kind.returns):
        raise UserError(
            f"{kind.function} of {where} returned {type(found).__name__}; it must return a {kind.returns.__name__}"
        )
    return found


def experiment_arguments(module: types.ModuleType) -> tuple[str, ...]:
    """The arguments that an experiment names; '' is the experiment without one."""
    return tuple(dict.fromkeys(("", *getattr(module, "ARGUMENTS", ()))))


def _is_path(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def load_file(path: pathlib.Path, word: str = EXPERIMENT.word) -> types.ModuleType:
    """The module of a Python file that `--config` names.

    Raises:
      UserError: no such file, or one that cannot be imported; its own exception is the cause.
    """
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(str(path), beside) if beside else f"its folder holds no {word}"
        raise UserError(f"--config: no file {path}; {hint}")
    name = f"scaling_dit_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles find a module by its name.
    sys.modules[name] = module
    try:
        with faults_of(str(path)):
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno or 1}: {error.msg}") from None
    return module


@contextlib.contextmanager
def faults_of(where: str) -> Iterator[None]:
    """Turns any exception of a user's file into a UserError with its line; a SyntaxError stays one."""
    try:
        yield
    except (UserError, SyntaxError):
        raise
    # A file may leave by sys.exit, too.
    except (Exception, SystemExit) as error:
        raise _fault(where, error) from error


def _fault(where: str, error: Exception | SystemExit) -> UserError:
    """An exception of an experiment file as a UserError with its line; ml_collections' messages need no type."""
    frames = traceback.extract_tb(error.__traceback__)
    path = os.path.abspath(where)
    line = next((frame.lineno for frame in reversed(frames) if os.path.abspath(frame.filename) == path), 1)
    known = frames and "ml_collections" in frames[-1].filename
    return UserError(f"{where}, line {line}: {error if known else f'{type(error).__name__}: {error}'}")


def _named(name: str, kind: Kind, a: str) -> types.ModuleType:
    """An installed file, else the one of that name in the kind's folder of the working directory."""
    here = pathlib.Path(kind.folder) / f"{name}.py"
    if not name.isidentifier():
        raise UserError(
            f"--config={name}: not {a}; give a name such as {kind.example}, or path/to/file.py[:argument]"
        )
    try:
        return importlib.import_module(f"{kind.package}.{name}")
    except ModuleNotFoundError as error:
        # A checkout that is not installed has no such package.
        if not f"{kind.package}.{name}.".startswith(f"{error.name}."):
            raise
    if here.is_file():
        return load_file(here, kind.word)
    known = installed_names(kind)
    hint = nearest(name, known) if known else f"none is installed or lies in {kind.folder}/"
    raise UserError(f"--config: no {kind.word} {name!r}; {hint} (or give path/to/file.py)")


def installed_names(kind: Kind) -> list[str]:
    """Those that can be given by name, installed or in the working directory."""
    folders = [pathlib.Path(kind.folder)]
    # A checkout that is not installed has no such package.
    with contextlib.suppress(ModuleNotFoundError):
        folders += map(pathlib.Path, importlib.import_module(kind.package).__path__)
    return sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})


def _check_argument(module: types.ModuleType, function: Any, argument: str, where: str, kind: Kind) -> None:
    if not argument:
        return
    if not inspect.signature(function).parameters:
        raise UserError(f"{kind.function} of {where} takes no argument; leave out ':{argument}'")
    known = [name for name in experiment_arguments(module) if name]
    options = getattr(module, "OPTIONS", ())
    row, comma, option = argument.partition(",") if options else (argument, "", "")
    if hasattr(module, "ARGUMENTS") and row not in known:
        raise UserError(f"{where} has no argument {row!r}; {nearest(row, known)}")
    if comma and option not in options:
        raise UserError(f"{where} has no option {option!r} after the comma; {nearest(option, options)}")

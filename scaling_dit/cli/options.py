"""The flags of a verb as fields of a frozen dataclass.

`flag(...)` declares one, `group(...)` takes over the flags of another dataclass, which several verbs share. The
annotation of a field gives the type of its flag: `str`, `int`, `float`, `bool`, a `Literal` of the allowed words, or a
`tuple` of numbers or words, which are separated by commas.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from absl import flags

from scaling_dit.errors import UserError
from scaling_dit.fields import Rule, each

_FLAG, _GROUP = "flag", "group"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: `--name=value`, or several values."""

    name: str
    # Of one value: str, int, float or bool.
    type: type
    help: str
    default: Any = None
    rule: Rule | None = None
    required: bool = False
    # The only words allowed, if there are any.
    choices: tuple[str, ...] = ()
    # A tuple of values: separated by commas or, with `repeat`, given by repeating the flag.
    several: bool = False
    repeat: bool = False
    # It names a file or folder: ~ and $VARIABLES in it are expanded.
    path: bool = False
    # An empty value means something.
    empty: bool = False

    def define(self, values: flags.FlagValues) -> None:
        """Adds the flag to `values`."""
        if self.choices:
            flags.DEFINE_enum(self.name, self.default, self.choices, self.help, flag_values=values)
        elif self.type is bool:
            flags.DEFINE_boolean(self.name, self.default, self.help, flag_values=values)
        elif self.repeat:
            flags.DEFINE_multi_string(self.name, list(self.default), self.help, flag_values=values)
        else:
            flags.DEFINE(_Parser(self), self.name, self.default, self.help, flag_values=values)

    def check_given(self, value: Any) -> None:
        """Makes sure that a value which was typed is not empty, as that of a shell variable that is not set.

        Raises:
          UserError: it, or one of several, is.
        """
        parts = value if isinstance(value, list | tuple) else (value,)
        if not self.empty and (not parts or any(isinstance(one, str) and not one.strip() for one in parts)):
            many = " (one of several)" if len(parts) > 1 else ""
            raise UserError(
                f"--{self.name} is given an empty value{many}; write a value (is a shell variable not set?), or leave "
                f"--{self.name} out"
            )


@dataclasses.dataclass(frozen=True)
class _Group:
    """Flags whose values become one value of the verb."""

    flags: tuple[Flag, ...]
    collect: Callable[[dict[str, Any]], Any]


def flag(
    help: str,  # noqa: A002
    default: Any = None,
    rule: Rule | None = None,
    *,
    required: bool = False,
    repeat: bool = False,
    path: bool = False,
    empty: bool = False,
) -> Any:
    """A field that is a flag.

    Args:
      help: one line; `--help` adds the choices, the default and whether it is required.
      default: the field's value where the flag is not given.
      rule: what values are right.
      required: the verb cannot run without it.
      repeat: a tuple of words, one each time that the flag is given.
      path: it names a file or folder, in which ~ and $VARIABLES are expanded (`files.expand`).
      empty: `--name=` means something; it is refused otherwise, also where the default is "".
    """
    settings = {
        "help": help, "rule": rule, "required": required, "repeat": repeat, "path": path, "empty": empty,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata={_FLAG: settings})


def group(options: type) -> Any:
    """A field that holds an instance of `options`, a dataclass of flags."""
    return dataclasses.field(metadata={_GROUP: _Group(declared(options), lambda given: options(**given))})


def changes(options: type, several: Collection[str] = ()) -> Any:
    """A field that holds a dict: the values given on the command line for fields of `options`.

    Args:
      options: a dataclass whose values a run has already; the metadata of its fields has their `Field` as "declared".
      several: names of fields that take one or several values, which are then tuples.
    """
    hints = typing.get_type_hints(options)
    found = []
    for field in dataclasses.fields(options):
        one = field.metadata["declared"]
        made = _flag_of(
            field.name,
            hints[field.name],
            help=f"{one.doc}; the run's by default",
            rule=one.check,
            empty=one.default in ("", ()),
        )
        if field.name in several:
            rule = each(made.rule) if made.rule else None
            made = dataclasses.replace(made, several=True, rule=rule, help=f"{made.help}; one or several")
        found.append(made)

    def collect(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    return dataclasses.field(metadata={_GROUP: _Group(tuple(found), collect)})


def declared(options: type) -> tuple[Flag, ...]:
    """The flags of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(options)
    found: list[Flag] = []
    for field in dataclasses.fields(options):
        if _GROUP in field.metadata:
            found += field.metadata[_GROUP].flags
        elif _FLAG in field.metadata:
            hint, settings = hints[field.name], field.metadata[_FLAG]
            found.append(_flag_of(_name(field), hint, default=field.default, **settings))
    return tuple(found)


def collect(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from the values of its flags, by name."""
    found = {}
    for field in dataclasses.fields(options):
        if _GROUP in field.metadata:
            one: _Group = field.metadata[_GROUP]
            found[field.name] = one.collect({flag.name: given[flag.name] for flag in one.flags})
        elif _FLAG in field.metadata:
            found[field.name] = given[_name(field)]
    return found


def _name(field: "dataclasses.Field[Any]") -> str:
    """The flag's name; the field `from_` is --from, a word that Python keeps for itself."""
    return field.name.rstrip("_")


def _flag_of(name: str, hint: Any, **settings: Any) -> Flag:
    """A flag of the type that an annotation names."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return Flag(name, str, choices=arguments, **settings)
    if kind is tuple:
        return Flag(name, arguments[0], several=True, **settings)
    return Flag(name, hint, **settings)


class _Parser(flags.ArgumentParser):
    """Text -> the value of a flag; an error says what would be right."""

    def __init__(self, flag: Flag) -> None:
        super().__init__()
        self._flag = flag

    def parse(self, argument: Any) -> Any:
        """The value; `argument` is text, or the default."""
        flag = self._flag
        rule = flag.rule.right if flag.rule else ""
        if isinstance(argument, str):
            read, noun, nouns = _TYPES[flag.type]
            try:
                if flag.several:
                    argument = tuple(read(part.strip()) for part in argument.split(",")) if argument else ()
                else:
                    argument = read(argument)
            except ValueError:
                right = rule or f"{nouns} separated by commas" if flag.several else f"{noun} {rule}"
                raise ValueError(f"it must be {right.strip()}") from None
        if flag.rule and not flag.rule.fits(argument):
            raise ValueError(f"it must be {rule}")
        return argument


# How a value is read, and what one and several are called.
_TYPES: dict[type, tuple[Callable[[str], Any], str, str]] = {
    str: (str, "a word", "words"),
    int: (flags.IntegerParser().convert, "an integer", "integers"),
    float: (flags.FloatParser().convert, "a number", "numbers"),
}

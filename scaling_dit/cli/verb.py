"""What a verb is: a frozen dataclass whose fields are its flags and whose method `run` does the work.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Blend(Verb):
        '''Averages images.'''

        EXAMPLE = "scaling-dit blend --folder=samples --images=4"
        folder: str = flag("folder of the images", required=True)
        images: int = flag("how many of them", 8, COUNT)

        def run(self) -> int: ...

The class's name in lower case is the verb's name, and the first line of its docstring is its summary; `options.py`
says how fields become flags. `run` imports what it works with, so that `--help` imports nothing heavy.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

from absl import flags

from scaling_dit.cli.exit_codes import PROGRAM
from scaling_dit.cli.options import Flag, collect, declared, flag
from scaling_dit.errors import UserError, nearest

_OVERRIDES_HELP = (
    "any field of the config, for example --config.optim.learning_rate=1e-3 --config.backbone.name=uvit"
)
_MISSING = (None, "", (), ("",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """The base of all verbs; see the top of this file."""

    EXAMPLE: ClassVar[str]
    # What the positional arguments are, for a verb that takes some.
    ARGUMENTS: ClassVar[str] = ""
    # Whether it takes --config.KEY=VALUE.
    OVERRIDES: ClassVar[bool] = False

    # Positional arguments, --config.KEY=VALUE arguments, and the whole command after the program's name.
    arguments: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    def run(self) -> int:
        """Does the work and returns the exit code."""
        raise NotImplementedError

    @classmethod
    def verbs(cls) -> "dict[str, type[Verb]]":
        """The verbs below this one, typed as `scaling-dit VERB BELOW`; a verb that has some does nothing itself."""
        return {}

    @classmethod
    def name(cls) -> str:
        """The verb as it is typed."""
        return cls.__name__.lower()

    @classmethod
    def summary(cls) -> str:
        """One line for `--help`."""
        return (cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def help(cls) -> str:
        """What `--help` prints."""
        rows = [(f"--{one.name}", _flag_help(one)) for one in declared(cls)]
        rows += [(name, verb.summary()) for name, verb in cls.verbs().items()]
        if cls.OVERRIDES:
            rows.append(("--config.KEY=VALUE", _OVERRIDES_HELP))
        width = max((len(name) for name, _ in rows), default=0)
        table = "".join(f"  {name:{width}}  {text}\n" for name, text in rows)
        usage = " ".join(filter(None, (PROGRAM, cls.name(), cls.ARGUMENTS, "[flags]")))
        return f"{cls.summary()}\n\nusage: {usage}\n\n{table}\nexample: {cls.EXAMPLE}"

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """The verb with the values of a command.

        Args:
          arguments: what follows the verb.

        Raises:
          UserError: an unknown flag, an empty value or one that a flag cannot take, or a required flag is missing.
        """
        if below := cls.verbs():
            return cast(Self, find_verb(f"{cls.name()} ", below, arguments).parse(arguments[1:]))
        name, rest, overrides = cls.name(), list(arguments), list[str]()
        if cls.OVERRIDES:
            rest, overrides = split_overrides(arguments)
        # The verb's own `FlagValues`, so that flags of imported libraries neither show nor clash.
        values = flags.FlagValues()
        for one in declared(cls):
            one.define(values)
        # Flags may follow positional arguments.
        values.set_gnu_getopt(True)
        try:
            positional = values([name, *rest])[1:]
        except flags.UnrecognizedFlagError as error:
            hint = nearest(error.flagname, values)
            raise UserError(f"{name} has no flag --{error.flagname}; {hint}") from None
        except flags.Error as error:
            raise UserError(f"{name}: {error}; see {PROGRAM} {name} --help") from None
        if positional and not cls.ARGUMENTS:
            raise UserError(f"{name} takes flags only, not {positional[0]!r}; see {PROGRAM} {name} --help")
        given = {flag: _field_value(values[flag].value) for flag in values}
        cls.check_given({one.name: given[one.name] for one in declared(cls) if one.required})
        for one in declared(cls):
            if values[one.name].present:
                try:
                    one.check_given(given[one.name])
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
            if one.path and given[one.name]:
                given[one.name] = _expanded(one.name, given[one.name])
        return cls(
            **collect(cls, given),
            arguments=tuple(positional),
            overrides=tuple(overrides),
            command=(name, *arguments),
        )

    @classmethod
    def check_given(cls, values: dict[str, Any]) -> None:
        """Raises UserError for the first of these flags that has no value."""
        for name, value in values.items():
            if value in _MISSING:
                raise UserError(f"{cls.name()} needs --{name}; for example: {cls.EXAMPLE}")


def find_verb(before: str, verbs: Mapping[str, type[Verb]], arguments: Sequence[str]) -> type[Verb]:
    """The verb that the first argument names; `before` is what was typed before it.

    Raises:
      UserError: no argument, or no such verb.
    """
    if not arguments or arguments[0] not in verbs:
        given = f"no verb {before + arguments[0]!r}" if arguments else f"{before.strip()} needs a verb"
        hint = nearest(arguments[0], verbs) if arguments else f"known: {', '.join(verbs)}."
        raise UserError(f"{given}; {hint} See {' '.join((PROGRAM, before)).strip()} --help")
    return verbs[arguments[0]]


def config_flag(*, required: bool = False) -> Any:
    """The flag `--config` of the verbs that take an experiment."""
    return flag(
        "experiment: a name such as shapes, or path/to/file.py; both take :ARGUMENT", required=required
    )


def json_flag() -> Any:
    """The flag `--json` of the verbs that print results."""
    return flag("print the result as JSON", False)


def own_code_flag() -> Any:
    """The flag `--own_code` of the verbs that read the config of a workdir."""
    return flag(
        "run the code outside of scaling_dit that the workdir's config names; only if you trust it", False
    )


def trust_if(own_code: bool) -> None:
    """Lets the folders of a command name code of users' own, as its flag `--own_code` says."""
    if own_code:
        from scaling_dit.config import trust_folder

        trust_folder()


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the rest, the `--config.key=value` arguments); `--config.key value` is joined with `=`."""
    rest, overrides = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not re.match(r"--?(no)?config\.", argument):
            rest.append(argument)
            continue
        if "=" not in argument and pending and not re.match(r"-[^\d.]", pending[0]):
            argument += "=" + pending.pop(0)
        overrides.append(argument)
    return rest, overrides


def _field_value(value: Any) -> Any:
    """A flag's value as a field holds it: absl gives the values of a repeated flag as a list."""
    return tuple(value) if isinstance(value, list) else value


def _expanded(name: str, path: str) -> str:
    # Loads etils, which --help can do without.
    from scaling_dit.files import expand

    try:
        return expand(path)
    except UserError as error:
        raise UserError(f"--{name}: {error}") from None


def _flag_help(one: Flag) -> str:
    notes = []
    if one.choices:
        notes.append(f"one of {', '.join(one.choices)}" if len(one.choices) > 1 else one.choices[0])
    if one.required:
        notes.append("required")
    elif one.default not in _MISSING and one.default is not False:
        shown = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        notes.append(f"default {shown}")
    return f"{one.help} ({'; '.join(notes)})" if notes else one.help

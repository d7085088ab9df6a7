"""Sections that a list of names in the config makes: each part that the list names has a section of its own fields.

`eval.metrics` makes the sections `metrics.NAME` (metrics.py), `conditioning.names` makes `conditions.NAME`
(conditions.py).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Registry
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import Field


def section_of(name: str) -> str:
    """The name of a part's section, and of what it writes or holds: of "package.module:Name" it is "Name"."""
    return name.rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class NamedSections:
    """The sections of one list of names.

    Attributes:
      key: the field that holds the list, such as "eval.metrics".
      group: the section of the sections, such as "metrics".
      registry: the parts that it may name.
      common: fields that every section has. A part that has one of them as a field of its own gives it another
        default, and is given the value.
    """

    key: str
    group: str
    registry: Registry
    common: Mapping[str, Field]

    @property
    def what(self) -> str:
        """What a name stands for, such as "metric"."""
        return self.registry.what

    def fields(self, name: str) -> dict[str, Any]:
        """The fields of a part's section with their defaults.

        Raises:
          UserError: no such part, or a field that no config can hold.
        """
        known = self.registry.known
        if ":" not in name and name not in known:
            own = f"or a {self.registry.kind} of your own: package.module:{self.registry.kind.capitalize()}"
            raise UserError(f"unknown {self.what} {name!r}; {nearest(name, known)} ({own})")
        return {key: field.default for key, field in self.common.items()} | self.registry.fields(name)

    def own_fields(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of the values of a part's section those that its class takes."""
        return {field: values[field] for field in self.registry.fields(name)}

    def sections(self, names: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """The sections of some parts with their fields and defaults.

        Raises:
          UserError: as `fields`; also names that are no texts, or two parts with one section.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            if not isinstance(name, str):
                raise UserError(
                    f"config.{self.key} is {names!r}; it must be a tuple of names of {self.what}s"
                )
            if section_of(name) in found:
                raise UserError(
                    f"config.{self.key} names two {self.what}s {section_of(name)!r}; leave one out"
                )
            found[section_of(name)] = self.fields(name)
        return found

    def named(self, config: Any, default: Any = ()) -> Any:
        """The value of the list in any part of a config."""
        section, _, field = self.key.rpartition(".")
        chosen = config.get(section, ConfigDict())
        return chosen.get(field, default) if isinstance(chosen, ConfigDict) else default

    def rename(self, config: ConfigDict, names: Iterable[str]) -> None:
        """Sets the list in place, and drops the sections of parts that it does not name any more."""
        names = tuple(names)
        section, _, field = self.key.rpartition(".")
        if section not in config:
            config[section] = ConfigDict()
        config[section][field] = names
        kept = {section_of(str(name)) for name in names}
        if isinstance(config.get(self.group), ConfigDict):
            held = config[self.group].items()
            config[self.group] = ConfigDict({key: value for key, value in held if key in kept})

    def drop_untouched(self, config: ConfigDict, named: Iterable[str]) -> None:
        """Drops in place the sections of built-in parts that are not `named` and hold their defaults only.

        They are left in a resolved config whose list is then set from Python, and say nothing. A section with
        another value stays, so that it is refused.
        """
        for section, fields in list(config.get(self.group, ConfigDict()).items()):
            known = section not in named and section in self.registry.known
            if known and fields.to_dict() == self.fields(section):
                del config[self.group][section]

    def check(self, config: ConfigDict) -> None:
        """Checks the fields that every part has.

        Raises:
          UserError: names the first field at fault, its value and what would be right.
        """
        for section, fields in config[self.group].items():
            for key, field in self.common.items():
                where, value = f"config.{self.group}.{section}.{key}", fields[key]
                if field.choices and value not in field.choices:
                    raise UserError(f"{where} is {value!r}; {nearest(str(value), field.choices)}")
                fits = type(value) is type(field.default) and (field.check is None or field.check.fits(value))
                if not fits:
                    right = field.check.right if field.check else "a text"
                    raise UserError(f"{where} is {value!r}; it must be {right}")

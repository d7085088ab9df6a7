"""`SamplingOptions`: how a run samples, from `config.sample` and what replaces it for one request."""

import dataclasses
import json
import operator
from collections.abc import Mapping
from typing import Any, Self

from ml_collections import ConfigDict

from scaling_dit.components import tuples
from scaling_dit.config import check_choice
from scaling_dit.diffusion.sampling_fields import SamplingFields
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import Field

# The options that may name a part of a user's own; the option NAME_fields has the fields of that part.
_PARTS = ("sampler", "guidance_method")
# Fields of a part by name, as pairs, so that options can be compared and hashed.
PartFields = tuple[tuple[str, Any], ...]


def _part_fields(part: str) -> dict[str, Any]:
    """The metadata of an option that holds the fields of a user's own part."""
    return {
        "declared": Field((), f"the fields of {part} of a user's own"),
        "noted": "if changed",
        "label": "",
    }


@dataclasses.dataclass(frozen=True)
class SamplingOptions(SamplingFields):
    """The options of sampling, checked: those of `SamplingFields`, and the fields of a user's own parts.

    The latter can be given as a mapping.
    """

    sampler_fields: PartFields = dataclasses.field(default=(), metadata=_part_fields("a sampler"))
    guidance_method_fields: PartFields = dataclasses.field(default=(), metadata=_part_fields("guidance"))

    @classmethod
    def of(cls, settings: ConfigDict, **changes: Any) -> Self:
        """From `config.sample`; `changes` replace single options.

        Another sampler or guidance than that of `config.sample` has its own defaults, not the fields there.

        Raises:
          UserError: as `replace`.
        """
        given = {field.name: settings[field.name] for field in dataclasses.fields(cls)}
        for part in _PARTS:
            if isinstance(changes.get(part), str) and changes[part] != given[part]:
                given[f"{part}_fields"] = ()
        return cls().replace(**given).replace(**changes)

    def replace(self, **changes: Any) -> Self:
        """These options with others in their place; None keeps one.

        Raises:
          UserError: no such option or sampler, or a value of the wrong type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        checked: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in fields:
                raise UserError(f"sampling has no option {name!r}; {nearest(name, fields)}")
            if name.endswith("_fields") and value is not None:
                checked[name] = _pairs(name, value)
            elif value is not None:
                checked[name] = _check(name, value, fields[name])
        return dataclasses.replace(self, **checked)

    @property
    def about(self) -> dict[str, Any]:
        """The options that change images, as a manifest has them; some only where they differ from the default."""
        noted = {}
        for field in dataclasses.fields(self):
            value, when = getattr(self, field.name), field.metadata["noted"]
            if when == "always" or (when == "if changed" and value != field.default):
                # As JSON reads it back.
                noted[field.name] = json.loads(
                    json.dumps(dict(value) if field.name.endswith("_fields") else value)
                )
        return noted


def tag(about: dict[str, Any], seed: int) -> str:
    """A folder name for images made with these settings: `step`, `ema` and those of `SamplingOptions.about`."""
    sampler = about["sampler"].replace(":", ".")
    name = f"step{about['step']}-ema{about['ema']}-{sampler}{about['steps']}-guidance{about['guidance']}"
    for field in dataclasses.fields(SamplingOptions):
        if field.metadata["noted"] == "if changed" and field.name in about:
            value = about[field.name]
            if isinstance(value, dict):
                name += "".join(f"-{key}{_text_of(one)}" for key, one in value.items())
            else:
                name += f"-{field.metadata['label'] or field.name}{_text_of(value)}"
    return f"{name}-seed{seed}"


def _text_of(value: Any) -> str:
    """A value in the name of a folder."""
    return "-".join(map(str, value)) if isinstance(value, list) else str(value).replace(":", ".")


def _pairs(name: str, value: Any) -> PartFields:
    """The fields of a part, from a mapping or pairs, as sorted pairs without lists."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if not isinstance(value, Mapping | tuple):
        raise UserError(f"{name} is {value!r}; it must be a mapping from fields to values")
    return tuple(sorted(tuples(dict(value)).items()))


def _check(name: str, value: Any, field: "dataclasses.Field[Any]") -> Any:
    """`value` in the type of the option's default.

    Raises:
      UserError: it is of another type, out of range or none of the choices.
    """
    declared: Field = field.metadata["declared"]
    noun, convert = _TYPES[type(field.default)]
    right = declared.check.right if declared.check else noun
    try:
        typed = convert(value)
        if declared.check and not declared.check.fits(typed):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; it must be {right}") from None
    if declared.choices:
        check_choice(declared, name, typed)
    return typed


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool")
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError("no number")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("no bool")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


_TYPES: dict[type, tuple[str, Any]] = {
    str: ("a name", _text),
    bool: ("true or false", _truth),
    int: ("an integer", _integer),
    float: ("a number", _number),
    tuple: ("a tuple of numbers", tuple),
}

"""From an experiment and overrides to the config that a run starts with, and whether a workdir holds the same run.

A config is an `ml_collections.ConfigDict`. Component sections name a component and carry that component's own fields,
so each can be set from the command line and a typo is caught.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from scaling_dit.components import describe, is_plain, tuples
from scaling_dit.config import conditions, metrics, own_code, schema
from scaling_dit.config.experiment_files import read_experiment
from scaling_dit.config.named import NamedSections
from scaling_dit.config.overrides import apply_overrides, component_names, override_key, own_part_names
from scaling_dit.config.validate import check_field, validate
from scaling_dit.config.values import dump, flatten, why_unknown
from scaling_dit.errors import UserError

# Lists of names, each of which has a section of its own.
NAMED = (metrics.SECTIONS, conditions.SECTIONS)


def complete(config: ConfigDict) -> ConfigDict:
    """A full config: the defaults and each component's own fields, under the values that `config` sets.

    Args:
      config: any part of a config; it is not changed.

    Raises:
      UserError: an unknown key or component, or a value of another type than the field's.
    """
    full = schema.defaults()
    given = config.copy_and_resolve_references()
    for section, component in schema.COMPONENTS.items():
        chosen = given.get(section, ConfigDict())
        if not isinstance(chosen, ConfigDict):
            raise UserError(f"config.{section} is {chosen!r}; set config.{section}.name and its fields")
        name = chosen.get("name", full[section].name)
        if not isinstance(name, str):
            raise UserError(f"config.{section}.name is {name!r}; it must be a name")
        fields = {
            field: _settable(default)
            for field, default in component.fields_of(name).items()
            if field not in component.derived
        }
        full[section] = ConfigDict({"name": name} | fields)
    for key, part in schema.OWN_PARTS.items():
        section, _, field = part.section.rpartition(".")
        name = _named(given, key) or full[key]
        full[section][field] = ConfigDict(
            {own: _settable(default) for own, default in schema.own_fields(key, name).items()}
        )
    for sections in NAMED:
        full[sections.group] = _named_sections(sections, given, sections.named(full))
    known = flatten(full)
    for key, value in flatten(given).items():
        if key not in known:
            raise UserError(f"config.{key}: {why_unknown(key, known)}")
        section, _, field = key.rpartition(".")
        value = _python_value(key, value, known[key])
        try:
            (full[section] if section else full)[field] = value
        except TypeError:
            expected = type(known[key]).__name__
            raise UserError(
                f"config.{key} is {value!r}, but its default {known[key]!r} is of type {expected}"
            ) from None
    return full


def resolve(config: ConfigDict, overrides: Sequence[str] = ()) -> ConfigDict:
    """What a run starts with: `config` completed, overridden, validated and locked.

    A config that came from here and has not been changed since is returned as it is, the same object, unless there are
    overrides. So a command resolves its config once, and whoever is handed one may call this for certainty. Whoever
    changes a resolved config changes a copy of it (`copy_and_resolve_references`), and resolves that.

    Args:
      config: any part of a config; it is not changed.
      overrides: arguments such as `--config.optim.learning_rate=1e-3`, typed as ml_collections.config_flags does.
        A component's name is set first, so its fields can be set along with it. Another name than the config's
        keeps the values of the section that the new component has a field for; the rest are its own defaults.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range.
    """
    if isinstance(config, dict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise UserError(f"a config must be a ConfigDict, it is {describe(config)}")
    if not (isinstance(overrides, list | tuple) and all(isinstance(one, str) for one in overrides)):
        raise UserError("overrides must be a list of texts such as '--config.optim.learning_rate=1e-3'")
    if not overrides and _is_resolved(config):
        return config
    config = config.copy_and_resolve_references()
    for section, name in component_names(overrides, schema.COMPONENTS).items():
        _switch_component(config, section, name)
    for key, name in own_part_names(overrides, schema.OWN_PARTS).items():
        _switch_own_part(config, key, name)
    for sections in NAMED:
        _switch_named(sections, config, overrides)
    config = complete(config)
    apply_overrides(config, overrides)
    config = config.copy_and_resolve_references()
    for key, value in flatten(config).items():
        if isinstance(value, list | tuple):
            section, _, field = key.rpartition(".")
            # As a saved config is read, so that a run recognises itself.
            (config[section] if section else config)[field] = tuples(value)
    check_field("optim.ema", config.optim.ema)
    if config.sample.ema == -1:
        config.sample.ema = max(config.optim.ema, default=0.0)
    validate(config)
    own_code.trust(config)
    return _mark_resolved(config.lock())


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of an experiment, ready to run.

    Args:
      spec: `path/to/file.py`, the name of an installed experiment such as `shapes`, or either with `:argument`.
      overrides: as in `resolve`.

    Raises:
      UserError: no such experiment or argument, or a config that `resolve` refuses.
    """
    return resolve(read_experiment(spec), overrides)


def check_same_run(saved: ConfigDict, config: ConfigDict) -> None:
    """Makes sure that a run resumes with the config it was started with, except for the fields that are free.

    `steps` may be raised where the learning rate stays constant after warm-up: it changes nothing computed so far.

    Raises:
      UserError: lists the fields that differ.
    """
    found = differences(flatten(saved), flatten(config))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"the workdir was written by another experiment: {', '.join(found[:3])}{more};"
            " give another --workdir, or the config it was started with"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which fields that are not free a config differs from an earlier one of its run, both flattened, in words."""
    absent = "absent"
    constant = then.get("optim.decay") == now["optim.decay"] == "constant"
    if constant and type(then.get("steps")) is int and then["steps"] < now["steps"]:
        then = {**then, "steps": now["steps"]}
    return [
        f"{key} is {then.get(key, absent)!r} there and {now.get(key, absent)!r} here"
        for key in sorted(then.keys() | now.keys())
        if not schema.is_free(key) and then.get(key, absent) != now.get(key, absent)
    ]


# Attribute of a resolved config: its text when it was resolved. Copies of a config do not have it.
_TEXT = "_resolved_text"


def _mark_resolved(config: ConfigDict) -> ConfigDict:
    # An attribute of the object, and no field of the config, which setattr would make.
    object.__setattr__(config, _TEXT, dump(config))
    return config


def _is_resolved(config: ConfigDict) -> bool:
    """Whether `resolve` returned this object and no value has changed since; a lock keeps fields, not their values."""
    return config.is_locked and vars(config).get(_TEXT) == dump(config)


def _switch_component(config: ConfigDict, section: str, name: str) -> None:
    """Renames a section's component in place, keeping the values that the new one has a field for.

    One of a user's own keeps none: what its fields are called says nothing of what the last one's meant.
    """
    old = config.get(section, ConfigDict())
    if old.get("name") == name:
        return
    fields = schema.COMPONENTS[section].fields_of(name)
    if f"{section}.name" in own_code.own_names({section: {"name": name}}):
        old = ConfigDict()
    shared = {k: v for k, v in old.items() if k in fields and isinstance(v, type(fields[k]))}
    config[section] = ConfigDict({"name": name} | shared)


def _switch_own_part(config: ConfigDict, key: str, name: str) -> None:
    """Names another part in place; as `_switch_component`, one of a user's own keeps none of the last one's values."""
    if _named(config, key) == name:
        return
    section, _, field = key.rpartition(".")
    beside = schema.OWN_PARTS[key].section.rpartition(".")[2]
    chosen = config.get(section, ConfigDict())
    config[section] = chosen
    config[section].update({field: name})
    config[section][beside] = ConfigDict()


def _named(config: ConfigDict, key: str) -> str:
    """The part that a field of `OWN_PARTS` names; "" where a partial config has no such text."""
    section, _, field = key.rpartition(".")
    chosen = config.get(section, ConfigDict())
    name = chosen.get(field, "") if isinstance(chosen, ConfigDict) else ""
    return name if isinstance(name, str) else ""


def _named_sections(sections: NamedSections, given: ConfigDict, default: Sequence[str]) -> ConfigDict:
    """The sections of the parts that `given` names, with their defaults; drops idle ones from it."""
    named = sections.named(given, default)
    found = sections.sections(named if isinstance(named, tuple | list) else default)
    sections.drop_untouched(given, found)
    for section in given.get(sections.group, ConfigDict()):
        if section not in found:
            where = f"config.{sections.group}.{section}"
            raise UserError(f"{where}: config.{sections.key} names no {sections.what} {section!r}")
    return ConfigDict(
        {
            section: {key: _settable(value) for key, value in fields.items()}
            for section, fields in found.items()
        }
    )


def _switch_named(sections: NamedSections, config: ConfigDict, overrides: Sequence[str]) -> None:
    """Takes over in place which parts the overrides name, so that fields of these can be set along with it."""
    chosen = [override for override in overrides if override_key(override) == sections.key]
    if chosen:
        section, _, field = sections.key.rpartition(".")
        named = ConfigDict({section: {field: sections.named(config)}})
        apply_overrides(named, chosen)
        sections.rename(config, tuples(named[section][field]))


def _python_value(key: str, value: Any, default: Any) -> Any:
    """A value as configs hold it: of numpy's numbers the Python ones.

    Raises:
      UserError: None where the default is something, or a value that no config can hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    # A bool is an integer to Python.
    of_other_type = isinstance(value, bool) and isinstance(default, int) and not isinstance(default, bool)
    # The class of a component may take None for a name, such as that of a size.
    may_be_none = default is None or (isinstance(default, str) and key not in schema.FIELDS)
    if of_other_type or (value is None and not may_be_none):
        raise UserError(
            f"config.{key} is {value!r}, but its default {default!r} is of type {type(default).__name__}"
        )
    if not is_plain(value):
        right = "a number, text, True, False or None, or a tuple of these"
        raise UserError(f"config.{key} is {describe(value)}; it must be {right}")
    return value


def _settable(value: Any) -> Any:
    """A field's default; a default of None accepts a value of any type."""
    if value is None:
        return placeholder(object)
    return tuples(value)

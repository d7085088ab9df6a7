"""A config as text: dotted keys, one line a field, JSON, and hints for keys that do not exist."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import tuples
from scaling_dit.config import renamed, schema
from scaling_dit.errors import UserError, nearest
from scaling_dit.files import parse_json


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every field, in the order of the config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def dump(config: ConfigDict) -> str:
    """One `key = value` line per field, sorted: the same config always gives the same text."""
    return "".join(f"{key} = {value!r}\n" for key, value in sorted(flatten(config).items()))


def to_json(config: ConfigDict) -> str:
    """The config as sorted JSON; `from_json` gives back an equal one."""
    return json.dumps(config.to_dict(), sort_keys=True, indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, in this version or an earlier one, whose names are replaced (renamed.py).

    Sequences become tuples, as every sequence of a config is one.

    Raises:
      UserError: `text` is not a JSON object.
    """
    try:
        saved = parse_json(text)
    except ValueError as error:
        raise UserError(f"the saved config is not valid JSON: {error}") from None
    if not isinstance(saved, dict):
        raise UserError(f"the saved config is no JSON object: {text[:40]!r}")
    return from_saved(saved)


def from_saved(saved: dict[str, Any]) -> ConfigDict:
    """As `from_json`, from the object itself.

    Raises:
      UserError: an object that `to_json` cannot have written.
    """
    for section in (*schema.SECTIONS, *schema.COMPONENTS, "metrics", "conditions"):
        if not isinstance(saved.get(section, {}), dict):
            raise UserError(f"config.{section} is {saved[section]!r}; it must be a section with fields")
    try:
        return ConfigDict(renamed.upgrade(tuples(saved)))
    # Keys that are no names, and values that an old name cannot have had.
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"the saved config is not one of this program: {type(error).__name__}: {error}"
        ) from None


def why_unknown(key: str, known: Iterable[str]) -> str:
    """Why a dotted key is none of `known`, and what would be right: a new name, the field elsewhere, or a near one."""
    if schema.derived(key):
        return f"it {schema.derived(key)}"
    if key in renamed.FIELDS:
        return f"it is config.{renamed.FIELDS[key].key} now"
    known = list(known)
    section, _, field = key.rpartition(".")
    if schema.owner(section):
        names = [name.rpartition(".")[2] for name in known if name.startswith(f"{section}.")]
        hint = nearest(field, names) if names else "it has none"
        return f"the part that config.{schema.owner(section)} names has no such field; {hint}"
    siblings = {
        name.rpartition(".")[2]: name for name in known if section and name.rpartition(".")[0] == section
    }
    elsewhere = [name for name in known if name.rpartition(".")[2] == field]
    close = elsewhere or [
        siblings[near] for near in difflib.get_close_matches(field, siblings, n=1, cutoff=0.5)
    ]
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif siblings:
        hint = f"{section} has {', '.join(sorted(siblings))}"
    else:
        hint = nearest(key, known)
        if not hint.startswith("did you mean"):
            hint = nearest(key, {name.split(".")[0] for name in known})
    return f"no such field; {hint}"

"""Fields and values that had another name in earlier versions, so that a run saved by one of them can be read.

A saved config holds every field of its time, so a key that it does not hold says that it is older than that key.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Where a field that is no longer there went.

    Attributes:
      key: the field that holds its value now.
      merge: (its value, the value that the config has at `key` or None) -> the value of `key`.
    """

    key: str
    merge: Callable[[Any, Any], Any] = lambda old, now: old


@dataclasses.dataclass(frozen=True)
class RenamedValue:
    """Another name of a value, in configs that do not hold the field or section `before`."""

    before: str
    values: dict[str, str]


FIELDS: dict[str, Renamed] = {
    "mesh.gather_once": Renamed("sharding.gather_once"),
    "mesh.sparse_core": Renamed("sharding.sparse_core"),
    # A U-ViT hid padding where both were on.
    "backbone.mask_text": Renamed("text_mask", lambda old, now: old and now is not False),
}

VALUES: dict[str, RenamedValue] = {
    # `tifa` is the published metric since.
    "eval.metrics": RenamedValue("metrics", {"tifa": "shapes_tifa"}),
}


def upgrade(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config, nested dicts, with the names of this version; the argument stays as it is."""
    held = _copy(saved)
    for key, renamed_value in VALUES.items():
        section, _, name = key.rpartition(".")
        if _has(saved, key) and not _has(saved, renamed_value.before):
            names = renamed_value.values
            now = _section(held, section)
            now[name] = tuple(names.get(value, value) for value in now[name])
    for key, renamed in FIELDS.items():
        if not _has(saved, key):
            continue
        section, _, name = key.rpartition(".")
        old = _section(held, section).pop(name)
        section, _, name = renamed.key.rpartition(".")
        target = _section(held, section)
        target[name] = renamed.merge(old, target.get(name))
    return held


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A section by name, which is made if it is not there; "" is the config itself."""
    return config.setdefault(name, {}) if name else config


def _has(config: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    held = config.get(section, {}) if section else config
    return isinstance(held, dict) and name in held

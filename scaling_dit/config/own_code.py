"""Code of users' own that a config names, "package.module:Name", and whether this process may run it.

A config is resolved by importing what it names. What a user names on the command line, in an experiment or in a call is
theirs to run. The `config.json` of a workdir may come from a stranger: it runs only what the user of this
process has named otherwise, or what a flag allows.
"""

import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import files
from scaling_dit.config import metrics, schema
from scaling_dit.data.sources import SOURCES
from scaling_dit.diffusion.sampling_fields import PUBLISHED
from scaling_dit.errors import UserError

# Names that the user of this process gave. They grow only, for what runs once has run.
_TRUSTED: set[str] = set()
# Among them, it stands for all.
_ANY = "*"


def own_names(config: Mapping[str, Any] | ConfigDict) -> dict[str, str]:
    """Each "package.module:Name" of a config, resolved or not: by the field that holds it."""
    found: dict[str, str] = {}
    for section in schema.COMPONENTS:
        name = _value(config, f"{section}.name")
        if isinstance(name, str) and ":" in name and not (section == "source" and _has_a_place(name)):
            found[f"{section}.name"] = name
    for key in schema.OWN_PARTS:
        name = _value(config, key)
        # `import` writes samplers of the package so.
        if isinstance(name, str) and ":" in name and not name.startswith(PUBLISHED):
            found[key] = name
    for key in ("eval.metrics", "conditioning.names"):
        names = _value(config, key)
        for number, name in enumerate(names if isinstance(names, list | tuple) else ()):
            if isinstance(name, str) and ":" in name:
                found[f"{key}[{number}]"] = name
    return found


def _has_a_place(name: str) -> bool:
    """Whether this is a built-in source with its place, such as "folder:PATH"; `shapes` has none."""
    row = SOURCES.get(name.partition(":")[0])
    return row is not None and bool(row.form)


def judge_names(config: Mapping[str, Any] | ConfigDict) -> dict[str, str]:
    """Each judge of a user's own that the metrics of a config ask: by the field that names it.

    They are no `own_names`: nothing that is trained or made depends on who judges it.
    """
    sections = _value(config, "metrics")
    found = {}
    for section in sections if isinstance(sections, Mapping | ConfigDict) else ():
        for field in ("judge", "second_judge"):
            name = _value(config, f"metrics.{section}.{field}")
            if isinstance(name, str) and ":" in name and name.partition(":")[0] not in metrics.JUDGE_PLACES:
                found[f"metrics.{section}.{field}"] = name
    return found


def trust(config: Mapping[str, Any] | ConfigDict) -> None:
    """Notes that the user of this process gave this config, and with it what it names."""
    trust_names([*own_names(config).values(), *judge_names(config).values()])


def trust_names(names: Iterable[str]) -> None:
    """As `trust`, of names that are given without a config, such as the metrics of a study."""
    _TRUSTED.update(names)


def trust_folder() -> None:
    """Notes that the user of this process trusts whatever the folders name that it opens: --own_code of a study."""
    _TRUSTED.add(_ANY)


def check_trusted(saved: Mapping[str, Any] | ConfigDict, where: str) -> None:
    """Makes sure that a saved config names only code that the user of this process has named too.

    Args:
      saved: not resolved, for that would import it.
      where: the file it was read from.

    Raises:
      UserError: it does.
    """
    named = own_names(saved) | judge_names(saved)
    check_names({f"config.{key}": name for key, name in named.items()}, where)


def check_names(names: Mapping[str, str], where: str) -> None:
    """As `check_trusted`, of each name with a ":" among some: by the field that holds it."""
    foreign = {key: name for key, name in names.items() if ":" in name and name not in _TRUSTED}
    if foreign and _ANY not in _TRUSTED:
        named = ", ".join(f"{key} {name!r}" for key, name in foreign.items())
        raise UserError(
            f"{where} names code outside of scaling_dit, which would run here: {named}; if you trust it, add "
            "--own_code (own_code=True in Python)"
        )


def source_hashes(config: Mapping[str, Any] | ConfigDict) -> dict[str, str]:
    """sha256 of the source file behind each "package.module:Name" of a resolved config, by name; "" if there is none.

    What that file imports is not part of it.
    """
    found = {}
    for name in own_names(config).values():
        module = sys.modules.get(name.partition(":")[0])
        path = pathlib.Path(getattr(module, "__file__", None) or "")
        found[name] = files.sha256(path) if path.is_file() else ""
    return found


def changes(then: Any, now: Mapping[str, str]) -> list[str]:
    """The names whose source file is not the one of `source_hashes` at an earlier time."""
    return [
        name for name, digest in now.items() if isinstance(then, Mapping) and then.get(name, digest) != digest
    ]


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, Mapping | ConfigDict) or part not in config:
            return None
        config = config[part]
    return config

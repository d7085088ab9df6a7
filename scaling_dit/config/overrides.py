"""Overrides from the command line, `--config.section.field=value`, typed by the field they replace."""

from collections.abc import Container, Iterable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from scaling_dit.config.values import flatten, why_unknown
from scaling_dit.errors import UserError

_EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: "a tuple such as (1,2) or ('a','b')",
}


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields in place from `--config.key=value` arguments, typed as ml_collections.config_flags does.

    A field that holds a bool also takes `--config.key` and `--noconfig.key`; a tuple may be given whole or by
    repeating the argument.

    Raises:
      UserError: an unknown key, or a value that the field's type cannot take.
    """
    known = flatten(config)
    by_key: dict[str, list[str]] = {}
    for override in overrides:
        by_key.setdefault(override_key(override), []).append(override)
    for key, arguments in by_key.items():
        argument = arguments[-1]
        if key not in known:
            fields = [name.rpartition(".")[2] for name in known if name.startswith(key + ".")]
            if fields:
                raise UserError(
                    f"{argument}: config.{key} is a section; set one of its fields, {', '.join(sorted(fields))}"
                )
            raise UserError(f"{argument}: {why_unknown(key, known)}")
        parser = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=parser, sys_argv=arguments, lock_config=False
            )
            parser(["", *arguments])
        except (flags.Error, TypeError, ValueError):
            expected = _EXPECTED.get(config_path.get_type(key, config), "a Python literal")
            raise UserError(f"{argument}: config.{key} is {known[key]!r} and must stay {expected}") from None


def component_names(overrides: Iterable[str], sections: Container[str]) -> dict[str, str]:
    """The components that overrides such as `--config.backbone.name=uvit` choose, by section."""
    chosen = {}
    for override in overrides:
        section, _, field = override_key(override).partition(".")
        if section in sections and field == "name" and "=" in override:
            chosen[section] = override.partition("=")[2]
    return chosen


def own_part_names(overrides: Iterable[str], keys: Container[str]) -> dict[str, str]:
    """The parts that overrides such as `--config.diffusion.schedule=cosine` choose, by the field that names one."""
    return {
        override_key(override): override.partition("=")[2]
        for override in overrides
        if override_key(override) in keys and "=" in override
    }


def override_key(override: str) -> str:
    """`optim.clip_norm` of `--config.optim.clip_norm=1`."""
    return override.partition("=")[0].partition(".")[2]

"""One run as data: the declaration of every config field, and what is checked before anything starts.

    load(spec, overrides) -> ConfigDict       the config of an experiment, ready to run
    resolve(config, overrides) -> ConfigDict  the same from a config
    defaults() -> ConfigDict                  every field with its default, for experiments

`schema` declares the fields, and everything else follows from it.
"""

from scaling_dit.config.experiment_files import experiment_arguments, read_experiment
from scaling_dit.config.overrides import apply_overrides, component_names, override_key
from scaling_dit.config.own_code import check_names, check_trusted, own_names, trust_folder, trust_names
from scaling_dit.config.resolve import check_same_run, complete, differences, load, resolve
from scaling_dit.config.schema import FIELDS, FREE_SECTIONS, WIDEST_EMA_POWER, defaults, is_free, section
from scaling_dit.config.validate import check_choice, check_field, check_range, parse_group, validate
from scaling_dit.config.values import dump, flatten, from_json, from_saved, to_json, why_unknown

__all__ = [
    "FIELDS",
    "FREE_SECTIONS",
    "WIDEST_EMA_POWER",
    "apply_overrides",
    "check_choice",
    "check_field",
    "check_names",
    "check_range",
    "check_same_run",
    "check_trusted",
    "complete",
    "component_names",
    "defaults",
    "differences",
    "dump",
    "experiment_arguments",
    "flatten",
    "from_json",
    "from_saved",
    "is_free",
    "load",
    "override_key",
    "own_names",
    "parse_group",
    "read_experiment",
    "resolve",
    "section",
    "to_json",
    "trust_folder",
    "trust_names",
    "validate",
    "why_unknown",
]

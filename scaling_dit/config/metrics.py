"""The metrics that a config may name in `eval.metrics`, and the section `metrics.NAME` with the fields of each.

Here a metric is a name and the place of its class, which is imported when a config names it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Registry
from scaling_dit.errors import UserError, nearest
from scaling_dit.fields import BATCH, FROM_0, Field


def _check_class(candidate: Any, name: str) -> None:
    if not isinstance(candidate, type):
        raise UserError(f"metric {name} is no class but {type(candidate).__name__}; name a class")


REGISTRY = Registry(
    "metric",
    {
        "tifa": "scaling_dit.evaluation.metrics.tifa:Tifa",
        "soft_tifa": "scaling_dit.evaluation.metrics.soft_tifa:SoftTifa",
        "vqa_score": "scaling_dit.evaluation.metrics.vqa_score:VqaScore",
        "dpg": "scaling_dit.evaluation.metrics.dpg:Dpg",
        "shapes_tifa": "scaling_dit.evaluation.metrics.shapes_tifa:ShapesTifa",
        "digits": "scaling_dit.evaluation.metrics.digits:DigitAccuracy",
        "emoji": "scaling_dit.evaluation.metrics.emoji:EmojiAccuracy",
        "clip_score": "scaling_dit.evaluation.metrics.clip_score:ClipScore",
        "hpsv2": "scaling_dit.evaluation.metrics.hpsv2:Hpsv2",
        "pickscore": "scaling_dit.evaluation.metrics.pickscore:Pickscore",
        "image_reward": "scaling_dit.evaluation.metrics.image_reward:ImageReward",
        "aesthetic": "scaling_dit.evaluation.metrics.aesthetic:Aesthetic",
        "fid": "scaling_dit.evaluation.metrics.fid:Fid",
        "kid": "scaling_dit.evaluation.metrics.kid:Kid",
        "mind": "scaling_dit.evaluation.metrics.mind:Mind",
        "cmmd": "scaling_dit.evaluation.metrics.cmmd:Cmmd",
        "fd_dinov2": "scaling_dit.evaluation.metrics.fd_dinov2:FdDinov2",
    },
    check=_check_class,
    kind="class",
)

# Fields that every metric's section has. A metric that has one of them as a field of its own gives it another default,
# and is given the value.
COMMON: dict[str, Field] = {
    "every": Field(
        0,
        "steps between evaluations in training, a multiple of config.eval.every; 0 = the same",
        FROM_0,
    ),
    "prompts": Field(0, "prompts in training; 0 = config.eval.prompts", FROM_0),
    "batch": Field(64, "images that the metric is given at once", BATCH),
    "prompt_set": Field(
        "", "published prompts in place of the metric's own, such as tifa:FOLDER (evaluation.prompt_sets)"
    ),
    "prompt_transform": Field(
        "none", "what is done to prompts before they are sampled: none | repeat:N | rewrite:FILE.jsonl"
    ),
}


def section_of(name: str) -> str:
    """The name of a metric's section, and of its folder of results: of "package.module:Name" it is "Name"."""
    return name.rpartition(":")[2]


def metric_fields(name: str) -> dict[str, Any]:
    """The fields of a metric's section with their defaults.

    Raises:
      UserError: no such metric, or a field that no config can hold.
    """
    if ":" not in name and name not in REGISTRY.known:
        raise UserError(
            f"unknown metric {name!r}; {nearest(name, REGISTRY.known)} (or a class of your own: package.module:Class)"
        )
    return {key: field.default for key, field in COMMON.items()} | REGISTRY.fields(name)


def sections(names: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The sections of some metrics with their fields and defaults.

    Raises:
      UserError: as `metric_fields`; also names that are no texts, or two metrics with one section.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"config.eval.metrics is {names!r}; it must be a tuple of names of metrics")
        if section_of(name) in found:
            raise UserError(f"config.eval.metrics names two metrics {section_of(name)!r}; leave one out")
        found[section_of(name)] = metric_fields(name)
    return found


def rename_sections(config: ConfigDict, names: Iterable[str]) -> None:
    """Sets `eval.metrics` in place, and drops the sections of metrics that it does not name any more."""
    names = tuple(names)
    if "eval" not in config:
        config.eval = ConfigDict()
    config.eval.metrics = names
    kept = {section_of(str(name)) for name in names}
    if isinstance(config.get("metrics"), ConfigDict):
        config.metrics = ConfigDict({key: value for key, value in config.metrics.items() if key in kept})


def drop_untouched(config: ConfigDict, named: Iterable[str]) -> None:
    """Drops in place the sections of built-in metrics that are not `named` and hold their defaults only.

    They are left in a resolved config whose `eval.metrics` is then set from Python, and say nothing. A section with
    another value stays, so that it is refused.
    """
    for section, fields in list(config.get("metrics", ConfigDict()).items()):
        if section not in named and section in REGISTRY.known and fields.to_dict() == metric_fields(section):
            del config.metrics[section]


def check(config: ConfigDict) -> None:
    """Checks the fields that every metric has.

    Raises:
      UserError: names the first field at fault, its value and what would be right.
    """
    for section, fields in config.metrics.items():
        for key, field in COMMON.items():
            value = fields[key]
            fits = type(value) is type(field.default) and (field.check is None or field.check.fits(value))
            if not fits:
                right = field.check.right if field.check else "a text"
                raise UserError(f"config.metrics.{section}.{key} is {value!r}; it must be {right}")
        if config.eval.every and fields.every % config.eval.every:
            right = f"a multiple of config.eval.every, which is {config.eval.every}, or 0 for the same"
            raise UserError(f"config.metrics.{section}.every is {fields.every}; it must be {right}")

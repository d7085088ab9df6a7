"""What is checked of a complete config before anything is built from it."""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.config import conditions, metrics, schema
from scaling_dit.config.values import flatten
from scaling_dit.errors import UserError, nearest


def validate(config: ConfigDict) -> None:
    """Checks every field of a complete config, before anything is built from it.

    Raises:
      UserError: names the first field at fault, its value and what would be right.
    """
    # Loads numpy, which the flags of a verb, made of the schema, can do without.
    from scaling_dit.data.captions import CaptionPolicy, check_policy

    for key, value in flatten(config).items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"config.{key} is nan; it must be a number")
        # Of the fields of components, whose classes check the rest; no shape or count is larger.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"config.{key} is {value}; it must be an integer of 64 bits")
    for key in schema.FIELDS:
        check_field(key, config[key])
    check_policy(CaptionPolicy(**config.captions))
    if config.batch % config.optim.accumulate:
        right = f"a multiple of config.optim.accumulate, which is {config.optim.accumulate}"
        raise UserError(f"config.batch is {config.batch}; it must be {right}")
    if list(config.mesh.values()).count(-1) > 1:
        raise UserError("config.mesh has -1 on more than one axis; only one can take the remaining devices")
    reach = config.checkpoint.every * (config.checkpoint.keep_last - 1)
    if config.rewind.factor and config.rewind.back > reach:
        right = "at most config.checkpoint.every x (keep_last - 1), so that a checkpoint that old is kept"
        raise UserError(f"config.rewind.back is {config.rewind.back}; it must be {right}, here {reach}")
    if config.log.profile and config.log.profile[0] > config.steps:
        right = f"begin at most at config.steps, which is {config.steps}"
        raise UserError(f"config.log.profile is {config.log.profile}; it must {right}")
    if config.sample.ema not in (0, -1, *config.optim.ema):
        right = f"0 (raw weights), -1 (largest) or one of config.optim.ema, {config.optim.ema}"
        raise UserError(f"config.sample.ema is {config.sample.ema!r}; it must be {right}")
    if config.optim.text_encoder_rate != 1.0 and not config.train_text_encoder:
        right = "1.0 while config.train_text_encoder is False"
        raise UserError(
            f"config.optim.text_encoder_rate is {config.optim.text_encoder_rate}; it must be {right}"
        )
    for group in config.optim.groups:
        parse_group(group)
    check_adapter(config)
    metrics.check(config)
    conditions.check(config)


def check_adapter(config: ConfigDict) -> None:
    """Checks `config.adapter` and what does not go with adapters.

    Raises:
      UserError: names the field at fault.
    """
    targets = config.adapter.targets
    for target in targets:
        try:
            re.compile(target)
        except (TypeError, re.error) as error:
            raise UserError(f"config.adapter.targets holds {target!r}; it must be a regex: {error}") from None
    if not config.adapter.rank:
        return
    if not targets:
        raise UserError("config.adapter.targets is (); it must name the kernels that are adapted")
    for key, why in (
        ("sharding.gather_once", "which gathers all parameters and has no place for a base"),
        ("optim.mup_base", "which scales the learning rates of whole kernels"),
    ):
        section, _, field = key.partition(".")
        if config[section][field]:
            raise UserError(
                f"config.adapter.rank is {config.adapter.rank}; adapters do not go with config.{key}, {why}"
            )


def check_field(key: str, value: Any) -> None:
    """Checks a value against the choices and the range that `schema.FIELDS` declares for its field.

    Raises:
      UserError: names the field, its value and what would be right.
    """
    if schema.FIELDS[key].choices:
        check_choice(schema.FIELDS[key], f"config.{key}", value)
    check_range(key, value)


def check_range(key: str, value: Any) -> None:
    """Checks a value against the range of its field, if it has one.

    Raises:
      UserError: names the field, its value and what would be right.
    """
    check = schema.FIELDS[key].check
    if check is not None and (value is None or not check.fits(value)):
        raise UserError(f"config.{key} is {value!r}; it must be {check.right}")


def check_choice(field: schema.Field, what: str, value: Any) -> None:
    """Checks that a value is one of a field's choices or, if it takes these, a "package.module:Name".

    Args:
      field: its declaration.
      what: what the value was given to, for the error line.
      value: a name.

    Raises:
      UserError: it is neither.
    """
    if value in field.choices or (field.own and ":" in str(value)):
        return
    own = " (or package.module:Name, your own)" if field.own else ""
    raise UserError(f"{what} is {value!r}; {nearest(str(value), field.choices)}{own}")


def parse_group(group: Any) -> tuple[re.Pattern[str], float, float]:
    """One of `config.optim.groups`: compiled regex over parameter paths, learning-rate factor and weight decay.

    Raises:
      UserError: it is not made of these, or one of the numbers is negative.
    """
    try:
        pattern, factor, decay = group
        compiled, factor, decay = re.compile(pattern), float(factor), float(decay)
        if not (factor >= 0 and decay >= 0):
            raise ValueError("the numbers must be 0 or more")
    except (TypeError, ValueError, re.error) as error:
        right = "a group is (regex over parameter paths, learning-rate factor, weight decay)"
        raise UserError(f"config.optim.groups holds {group!r}; {right}: {error}") from None
    return compiled, factor, decay

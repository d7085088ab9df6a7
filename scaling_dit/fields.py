"""How a value that a user sets is declared: its default, one line about it, and which values are right."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
      right: in words, after "it must be".
      fits: the test; comparisons are false for nan.
    """

    right: str
    fits: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      default: its default value; overrides must be of the same type.
      doc: one line, for docs/config.md and for the flags made of it.
      check: the range of a value; None = any value of the default's type, or one that `validate` checks with others.
      choices: the names that a text may be.
      own: whether "package.module:Name", a class or function of the user's own, may stand in place of one of `choices`;
        `config.schema.OWN_PARTS` has the section of its fields.
      free: whether a run may be resumed with another value: it changes how the run runs, not what it computes.
    """

    default: Any
    doc: str
    check: Rule | None = None
    choices: tuple[str, ...] = ()
    own: bool = False
    free: bool = False


# Steps and sizes are 32-bit integers on the devices.
_END = 2**31


def each(rule: Rule) -> Rule:
    """The rule for one or several values, each of which keeps to `rule`."""
    return Rule(f"{rule.right}, or several separated by commas", lambda values: all(map(rule.fits, values)))


COUNT = Rule("at least 1, below 2**31", lambda x: 1 <= x < _END)
MANY = Rule("from 1 to 1,000,000", lambda x: 1 <= x <= 10**6)
FEW = Rule("from 1 to 1024", lambda x: 1 <= x <= 1024)
BATCH = Rule("from 1 to 2**20 = 1,048,576", lambda x: 1 <= x <= 2**20)
FROM_0 = Rule("0 or more, below 2**31", lambda x: 0 <= x < _END)
POSITIVE = Rule("more than 0, and finite", lambda x: 0 < x < math.inf)
SHARE = Rule("from 0 to 1", lambda x: 0 <= x <= 1)
SEED = Rule("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)

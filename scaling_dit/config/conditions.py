"""The image conditions that a config may name in `conditioning.names`, and the section `conditions.NAME` of each."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.config.named import NamedSections, section_of
from scaling_dit.data import conditions
from scaling_dit.data.conditions.contract import CONCAT, POSITIONS
from scaling_dit.errors import UserError
from scaling_dit.fields import SHARE, Field

# Fields that every condition's section has.
COMMON: dict[str, Field] = {
    "concat": Field(
        "token",
        "how a backbone reads it: as tokens of their own before those of the image, or as more input channels",
        choices=CONCAT,
    ),
    "positions": Field(
        "shared", "positions of its tokens: those of the image, or beside them", choices=POSITIONS
    ),
    "drop": Field(0.1, "share of rows without it in training; each condition is dropped on its own", SHARE),
}
SECTIONS = NamedSections("conditioning.names", "conditions", conditions.REGISTRY, COMMON)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A condition of a run.

    Attributes:
      name: of its section, and of its entry in batches and parameters.
      condition: what makes it.
      concat: one of CONCAT.
      positions: one of POSITIONS.
      drop: share of the rows without it.
    """

    name: str
    condition: conditions.Condition
    concat: str
    positions: str
    drop: float

    def row(self, channels: int) -> tuple[str, int, str, str]:
        """The row of a backbone's field `conditions`, for latents of so many channels."""
        return self.name, channels + self.condition.masks, self.concat, self.positions


def check(config: ConfigDict) -> None:
    """Checks the fields that every condition has.

    Raises:
      UserError: names the first field at fault, its value and what would be right.
    """
    SECTIONS.check(config)
    for section, fields in config[SECTIONS.group].items():
        if fields.concat == "channel" and fields.positions != "shared":
            raise UserError(
                f"config.conditions.{section}.positions is {fields.positions!r}, but channels have no positions; leave "
                "it out, or set concat to 'token'"
            )


def own_fields(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """What each condition of a resolved config is made with: section -> the fields that its class takes."""
    return {
        section_of(name): SECTIONS.own_fields(name, config.conditions[section_of(name)])
        for name in config.conditioning.names
    }


def classes(config: ConfigDict) -> dict[str, str]:
    """Section -> the entry of `conditioning.names` that it belongs to."""
    return {section_of(name): name for name in config.conditioning.names}


def chosen(config: ConfigDict) -> tuple[Chosen, ...]:
    """The conditions of a resolved config, in the order of `conditioning.names`.

    Raises:
      UserError: a class that is no condition.
    """
    found = []
    for name in config.conditioning.names:
        fields = config.conditions[section_of(name)]
        condition = conditions.create(name, SECTIONS.own_fields(name, fields))
        found.append(Chosen(section_of(name), condition, fields.concat, fields.positions, fields.drop))
    return tuple(found)

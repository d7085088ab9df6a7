"""What a backbone says of the diffusers class that computes the same: its arguments from our fields, and back.

Facts of diffusers 0.42.1, whose classes and files these are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

VERSION = "0.42.1"

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DiffusersClass:
    """One diffusers class, or one form of it, that computes what a backbone does.

    Attributes:
      class_name: of diffusers' model.
      defaults: every constructor argument with its default.
      to_arguments: (backbone, height and width of the latents) -> the arguments that differ from `defaults`.
      to_fields: all arguments -> fields of the backbone, `in_channels` and `text_dim` among them.
      free: arguments that change nothing in what the backbone computes.
      aliases: older names of the class in published files.
      matches: whether all arguments are of this form, where one class has several.
    """

    class_name: str
    defaults: Arguments
    to_arguments: Callable[[Any, tuple[int, int]], dict[str, Any]]
    to_fields: Callable[[Arguments], dict[str, Any]]
    free: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    matches: Callable[[Arguments], bool] = lambda arguments: True

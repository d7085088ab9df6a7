"""Image conditions by name: what a backbone may read beside the text, such as the given part of an image to inpaint.

A row and a file for each kind; "package.module:Class" is a user's own. `contract.py` says what a condition is.
"""

from collections.abc import Mapping
from typing import Any

from scaling_dit.components import Registry
from scaling_dit.data.conditions import contract
from scaling_dit.data.conditions.contract import Condition

__all__ = ["REGISTRY", "Condition", "create"]

REGISTRY = Registry(
    "condition",
    {
        "inpaint": "scaling_dit.data.conditions.inpaint:Inpaint",
        "edges": "scaling_dit.data.conditions.edges:Edges",
        "edit": "scaling_dit.data.conditions.edit:Edit",
    },
    check=contract.check_class,
    kind="class",
)


def create(name: str, fields: Mapping[str, Any]) -> Condition:
    """A condition with the given fields of its class.

    Raises:
      UserError: unknown name or field, or a class that is no condition.
    """
    condition: Condition = REGISTRY.create(name, fields)
    contract.check_condition(condition, repr(name))
    return condition

"""Conditions of records, as batches hold them: made or given, one array a name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_dit.data.conditions import contract
from scaling_dit.data.conditions.contract import Condition
from scaling_dit.errors import UserError


def image_of(record: Mapping[str, Any], name: str) -> np.ndarray:
    """The image of a record, uint8 [H, W, 3], from which condition `name` is to be made.

    Raises:
      UserError: a record of a prepared set, which has latents in its place.
    """
    if "image" not in record:
        raise UserError(
            f"record {record.get('key')!r} is of a prepared set without condition {name!r}; prepare the set "
            "with a config whose conditioning.names has it"
        )
    image: np.ndarray = record["image"]
    return image


def of_record(
    condition: Condition, name: str, record: Mapping[str, Any], generator: np.random.Generator
) -> np.ndarray:
    """Condition `name` of a record.

    Returns:
      uint8 [H, W, 3 + M] of the size of the image, which the record carries or the condition makes; of a record from a
      prepared set one of the kept kinds, bfloat16 [h, w, Mo + M], each with the same probability.

    Raises:
      UserError: as `contract.make`; or a prepared set that lacks the condition.
    """
    given = record.get("conditions", {}).get(name)
    if "latents" not in record:
        height, width = record["image"].shape[:2]
        return contract.make(condition, name, record, generator, (height, width))
    if given is None:
        image_of(record, name)
    chosen: np.ndarray = given[int(generator.integers(len(given)))]
    return chosen

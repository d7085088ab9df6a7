"""The weights of a backbone under the names of other code, in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from scaling_dit import trees
from scaling_dit.backbones import contract
from scaling_dit.backbones.conditions import condition_of, rows_of
from scaling_dit.backbones.declared import weight_table
from scaling_dit.errors import UserError
from scaling_dit.weights import state_dicts
from scaling_dit.weights.table import Row, Slices, Table


def load_state_dict(
    backbone: nn.Module, state_dict: Mapping[str, Any], *, inputs: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Upstream weights as variables of the backbone.

    Args:
      backbone: module whose class names its weight table (`WEIGHTS`, see `contract.py`), layers scanned or not.
      state_dict: upstream name -> array (numpy or anything `np.asarray` takes). The table of positions may have any
        length; it then fits inputs of that many tokens, or is resized for them.
      inputs: of a call, arrays or shapes as `contract.example_inputs` makes them. A backbone without the fields
        `in_channels` and `text_dim`, whose parameters follow from its inputs, needs them.

    Returns:
      {"params": tree} of numpy arrays in `param_dtype`, without logical axes.

    Raises:
      UserError: no weight table for this class, or one that does not fit it; or unknown, missing or misshapen entries,
        all in one message.
    """
    rows, abstract, what = table(backbone, inputs)
    if not isinstance(state_dict, Mapping):
        raise UserError(
            f"a state dict of {what} must map names to arrays, it is a {type(state_dict).__name__}"
        )
    return {"params": state_dicts.load(rows, abstract, state_dict, what, check_inverse=True)}


def held_conditions(
    backbone: nn.Module, state_dict: Mapping[str, Any], *, inputs: Sequence[Any] | None = None
) -> tuple[Any, ...]:
    """The rows of a backbone's field `conditions` of which a state dict has weights.

    One entry that holds several in parts has all of them if it is as wide as all, else none. Conditions whose
    parameters have other places than those of `conditions.py` count as held.
    """
    wanted = rows_of(backbone)
    rows = table(backbone, inputs)[0] if wanted else ()
    whole = {name: row for row in rows if isinstance(row, Slices) for name, _ in row.parts}

    def has(name: str) -> bool:
        if name not in whole:
            return name in state_dict
        row = whole[name]
        shape = np.shape(state_dict[row.upstream]) if row.upstream in state_dict else ()
        return len(shape) > row.axis and shape[row.axis] == sum(size for _, size in row.parts)

    names: dict[str | None, list[str]] = {}
    for row in rows:
        if isinstance(row, Row):
            # Of several layers the first stands for all.
            first = (name.replace("{i}", "0") for name in row.names)
            names.setdefault(condition_of(row.ours), []).extend(first)
    return tuple(tuple(one) for one in wanted if one.name not in names or any(map(has, names[one.name])))


def to_state_dict(
    backbone: nn.Module, variables: Mapping[str, Any], *, inputs: Sequence[Any] | None = None
) -> dict[str, np.ndarray]:
    """Variables {"params": tree} of the backbone, with logical axes or without, as upstream name -> array.

    `inputs` as in `load_state_dict`.

    Raises:
      UserError: no weight table for this class, or one that does not fit it; or parameters that do not fit the
        backbone, all in one message.
    """
    rows, abstract, what = table(backbone, inputs)
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise UserError(f"variables of {what} must be {{'params': ...}}, got {got}")
    return state_dicts.save(rows, abstract, trees.unbox(variables["params"]), what)


def table(backbone: nn.Module, inputs: Sequence[Any] | None) -> tuple[Table, dict[str, Any], str]:
    """The checked rows of a backbone, its abstract parameters, and its name for errors."""
    contract.check_backbone(backbone)
    what = type(backbone).__name__
    make_rows = weight_table(backbone)
    if inputs is None:
        channels, width = (getattr(backbone, field, None) for field in ("in_channels", "text_dim"))
        if channels is None or width is None:
            raise UserError(
                f"{what} lacks the field in_channels or text_dim, so its parameters follow from its inputs; give "
                "inputs=contract.example_inputs(backbone, (H, W, C), (L, D))"
            )
        # Sides of any latents that the backbone takes.
        side = 16 * getattr(backbone, "patch", 2)
        inputs = contract.example_inputs(backbone, (side, side, channels), (77, width))
    abstract = contract.abstract_variables(backbone, tuple(inputs))["params"]
    rows = make_rows(backbone)
    state_dicts.check(rows, abstract, f"the weight table of {what}")
    return rows, abstract, what

"""Linear layers without activations between them, as the heads of published predictors have them, folded into one."""

from collections.abc import Mapping, Sequence

import numpy as np

from scaling_dit.errors import UserError


def fold(
    tensors: Mapping[str, np.ndarray], layers: Sequence[str], width: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """The layers as one map to a number: kernel float32 [width] and bias, a float32 number, multiplied in float64.

    Args:
      tensors: entries by name, `LAYER.weight` [out, in] and `LAYER.bias` [out].
      layers: names of the layers in their order.
      width: number of inputs.
      where: the place of the weights, for errors.

    Raises:
      UserError: entries are missing, or their shapes do not follow each other.
    """
    missing = [f"{layer}.{end}" for layer in layers for end in ("weight", "bias")]
    missing = [name for name in missing if name not in tensors]
    if missing:
        raise UserError(f"{where} lacks entries of its linear layers: {', '.join(missing)}")
    kernel, bias = np.eye(width), np.zeros(width)
    for layer in layers:
        weight, offset = (tensors[f"{layer}.{end}"].astype(np.float64) for end in ("weight", "bias"))
        if weight.ndim != 2 or weight.shape[1] != kernel.shape[1] or offset.shape != weight.shape[:1]:
            raise UserError(
                f"{where}: {layer}.weight is {weight.shape}, its bias {offset.shape}; it has {kernel.shape[1]} inputs"
            )
        kernel, bias = kernel @ weight.T, bias @ weight.T + offset
    if kernel.shape[1] != 1:
        raise UserError(f"{where}: its last linear layer has {kernel.shape[1]} outputs, not 1")
    return kernel[:, 0].astype(np.float32), bias[0].astype(np.float32)

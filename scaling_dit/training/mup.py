"""muP: a learning rate that is tuned at one width and holds at any other (arXiv 2203.03466; for diffusion transformers
arXiv 2505.15270, which shows that U-ViT, DiT, PixArt and MMDiT obey the rules of plain transformers).

The base is the run's backbone at the width `optim.mup_base`, with as many blocks and heads of the same size. Every
parameter is compared with the base's: the axes that differ grow with width, and m is how often its fan-in is the
base's.

| parameter | axes that grow | initial values | learning rate | weight decay |
|---|---|---|---|---|
| hidden matrix | input and output | standard deviation of the base / sqrt(m) | / m | x m |
| input matrix, table | output | standard deviation of the base | as it is | as it is |
| output matrix | input | standard deviation of the base / m; zeros stay | / m | x m |
| bias, norm, gate | its only one | as they are | as it is | as it is |

Decay is multiplied where the rate is divided, so that their product stays (as in microsoft/mup's MuAdamW). Head sizes
do not grow, so attention needs no other scale. UNets are not covered: sweep their rate at each size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from scaling_dit import trees
from scaling_dit.errors import UserError
from scaling_dit.model.model import Model
from scaling_dit.trees import Params


def base_backbone(backbone: Any, width: int) -> Any:
    """The backbone at the base's width, with heads of the same size.

    Raises:
      UserError: a backbone without `hidden`, or a width that its head size does not divide.
    """
    if not hasattr(backbone, "hidden") or not hasattr(backbone, "widths"):
        raise UserError(
            f"config.optim.mup_base: muP is for transformers, and {type(backbone).__name__} has no hidden size; "
            "set it to 0 and tune the learning rate at each size"
        )
    hidden, _, heads = backbone.widths
    size = hidden // heads
    if width % size:
        right = max(size, round(width / size) * size)
        raise UserError(
            f"config.optim.mup_base is {width}, which is no multiple of the head size {size}; nearest: {right}"
        )
    return backbone.clone(hidden=width, heads=width // size)


def growth(shape: tuple[int, ...], base: tuple[int, ...]) -> tuple[str, float]:
    """("hidden" | "input" | "output" | "fixed", m) of a parameter by its shape and the base's.

    Kernels are [in, *features], [parts, in, *features], or have layers in front (`nn.layers.Dense`), so the first axis
    that differs is the fan-in where two or more do.
    """
    differ = [axis for axis, (now, then) in enumerate(zip(shape, base, strict=True)) if now != then]
    if not differ or len(shape) == 1:
        return "fixed", 1.0
    if len(differ) > 1:
        return "hidden", shape[differ[0]] / base[differ[0]]
    return ("output", shape[0] / base[0]) if differ == [0] else ("input", 1.0)


def fan_ins(params: Params, base: Params) -> Params:
    """m of each parameter, a tree of floats shaped like `params`: 1 for input matrices, vectors and the text encoder.

    Args:
      params: trained parameters, or their shapes. base: those of the base.
    """

    def ratio(now: Any, then: Any) -> float:
        return growth(tuple(now.shape), tuple(then.shape))[1]

    return jax.tree.map(ratio, params, base)


def initial(params: Params, base: Params) -> Params:
    """Initial parameters whose spread follows the table above; pure.

    Args:
      params: initial parameters of the run, unboxed. base: those of the base.
    """

    def rescaled(now: jax.Array, then: jax.Array) -> jax.Array:
        kind, m = growth(now.shape, then.shape)
        if kind == "fixed":
            return now
        wanted = then.std() / {"hidden": math.sqrt(m), "input": 1.0, "output": m}[kind]
        spread = now.std()
        # Constants, such as zeros and ones, have no spread and stay.
        return jnp.where(spread > 0, now * (wanted / jnp.where(spread > 0, spread, 1.0)), now)

    return jax.tree.map(rescaled, params, base)


def base_params(model: Model, width: int, key: jax.Array) -> Params:
    """Initial trained parameters of the run at the base's width, unboxed; for shapes call it in `jax.eval_shape`."""
    small = dataclasses.replace(model, backbone=base_backbone(model.backbone, width))
    return trees.unbox(small.init(key)[0])

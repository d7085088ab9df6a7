"""muP: a learning rate that is tuned at one width and holds at any other (arXiv 2203.03466; for diffusion transformers
arXiv 2505.15270, which shows that U-ViT, DiT, PixArt and MMDiT obey the rules of plain transformers).

The base is the run's backbone at the width `optim.mup_base`, with as many blocks and heads of the same size. m is how
often the fan-in of a parameter is the base's. Which of its axes grow with width is seen at FAR times the base's width:
at the run's own, an axis that a backbone rounds may be as long as the base's. Large-DiT's feed-forward has 256 units at
the widths 32 and 64, and its first matrix would pass for one whose fan-in stays.

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

# Width, in widths of the base, at which every axis that grows has grown.
FAR = 16


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


def growth(shape: tuple[int, ...], base: tuple[int, ...], far: tuple[int, ...]) -> tuple[str, float]:
    """("hidden" | "input" | "output" | "fixed", m) of a parameter by its shape, the base's, and that at FAR times it.

    Kernels are [in, *features], [parts, in, *features], or have layers in front (`nn.layers.Dense`), so the first axis
    that grows is the fan-in where two or more do, and a single one is the fan-in unless it is the last.
    """
    grows = [axis for axis, (then, later) in enumerate(zip(base, far, strict=True)) if then != later]
    if not grows or len(shape) == 1:
        return "fixed", 1.0
    if grows == [len(shape) - 1]:
        return "input", 1.0
    return "hidden" if len(grows) > 1 else "output", shape[grows[0]] / base[grows[0]]


def fan_ins(params: Params, base: Params, far: Params) -> Params:
    """m of each parameter, a tree of floats shaped like `params`: 1 for input matrices, vectors and the text encoder.

    Args:
      params: trained parameters, or their shapes. base: those of the base. far: those at FAR times its width.
    """

    def ratio(now: Any, then: Any, later: Any) -> float:
        return growth(tuple(now.shape), tuple(then.shape), tuple(later.shape))[1]

    return jax.tree.map(ratio, params, base, far)


def initial(params: Params, base: Params, far: Params) -> Params:
    """Initial parameters whose spread follows the table above; pure.

    Args:
      params: initial parameters of the run, unboxed. base: those of the base. far: shapes at FAR times its width.
    """

    def rescaled(now: jax.Array, then: jax.Array, later: Any) -> jax.Array:
        kind, m = growth(now.shape, then.shape, tuple(later.shape))
        if kind == "fixed":
            return now
        wanted = then.std() / {"hidden": math.sqrt(m), "input": 1.0, "output": m}[kind]
        spread = now.std()
        # Constants, such as zeros and ones, have no spread and stay.
        return jnp.where(spread > 0, now * (wanted / jnp.where(spread > 0, spread, 1.0)), now)

    return jax.tree.map(rescaled, params, base, far)


def base_params(model: Model, width: int, key: jax.Array) -> Params:
    """Initial trained parameters of the run at the base's width, unboxed; for shapes call it in `jax.eval_shape`."""
    small = dataclasses.replace(model, backbone=base_backbone(model.backbone, width))
    return trees.unbox(small.init(key)[0])

"""Moving averages of the parameters: their names, which of them a run keeps, how they start, one update of each."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from scaling_dit.config import WIDEST_EMA_POWER
from scaling_dit.errors import UserError
from scaling_dit.trees import Params

# Begins the names of averages with power-function profiles.
POWER = "power-"


def ema_name(decay: float) -> str:
    """The key of an average in `TrainState.emas`.

    >>> ema_name(0.999)
    '0.999'

    Raises:
      UserError: a decay outside [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise UserError(f"optim.ema: decay {decay} must be at least 0 and less than 1")
    return repr(float(decay))


def power_name(sigma_rel: float) -> str:
    """The key in `TrainState.emas` of an average with a power-function profile of that relative width.

    >>> power_name(0.05)
    'power-0.05'
    """
    return f"{POWER}{float(sigma_rel)!r}"


def kept_emas(config: ConfigDict) -> list[str]:
    """The names of all averages that a run keeps: the keys of `TrainState.emas`."""
    return [*map(ema_name, config.optim.ema), *power_names(config)]


def power_names(config: ConfigDict) -> list[str]:
    """The names of the power averages that a run keeps: those whose snapshots it stores."""
    return [power_name(width) for width in config.optim.ema_power]


def plain_name(ema: float | str | None) -> str | None:
    """The name that an average has in any run, however a user writes it; None for the raw weights.

    >>> plain_name("0.9990"), plain_name("power-.05"), plain_name("0")
    ('0.999', 'power-0.05', None)
    """
    text = str(ema)
    if ema is None or text == "none":
        return None
    try:
        number = float(text.removeprefix(POWER))
    except ValueError:
        # No name of any average.
        return text
    if text.startswith(POWER):
        return power_name(number)
    return repr(number) if number else None


def find_ema(config: ConfigDict, ema: float | str | None) -> str | None:
    """The name of an average that a run keeps or can rebuild: "0.999", "power-0.05"; None for the raw weights.

    Raises:
      UserError: no such average, or one that the run can neither read nor rebuild.
    """
    kept, name = kept_emas(config), plain_name(ema)
    if name is None:
        return None
    is_power = name.startswith(POWER)
    try:
        right = 0 < float(name.removeprefix(POWER)) < (WIDEST_EMA_POWER if is_power else 1)
    except ValueError:
        right = False
    if not right or (name not in kept and not config.optim.ema_power):
        also = "; with config.optim.ema_power it could rebuild others" if right else ""
        raise UserError(
            f"the run keeps no EMA of decay {ema}; it keeps {', '.join(kept) or 'none'} (0 = raw weights){also}"
        )
    return name


def average_of(params: Params) -> Params:
    """An average that begins with these parameters, float32.

    It is a copy: a state that is donated must not hold one buffer twice.
    """
    average: Params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return average


def update_emas(
    emas: dict[str, Params], params: Params, decays: Iterable[float], step: jax.Array
) -> dict[str, Params]:
    """Each average moved towards `params`, float32: ema <- d ema + (1 - d) params.

    d = min(decay, (1 + step) / (10 + step)), where `step` counts the updates before this one. Early on an average
    spans about a ninth of the run so far, so that in short runs too it leaves its starting point.
    """
    warm = warm_limit(step)
    return {
        ema_name(decay): _moved(emas[ema_name(decay)], params, 1.0 - jnp.minimum(decay, warm))
        for decay in decays
    }


def warm_limit(step: Any) -> Any:
    """The largest decay that `update_emas` uses after `step` updates: (1 + step) / (10 + step), elementwise."""
    return (1.0 + step) / (10.0 + step)


def update_power_emas(
    emas: dict[str, Params], params: Params, widths: Iterable[float], step: jax.Array
) -> dict[str, Params]:
    """Each power average moved towards `params`, float32 (arXiv 2312.02696, equation 127).

    ema <- b ema + (1 - b) params, b = (1 - 1 / t)^exponent, t = step + 1: after t updates, parameters before update
    j have the weight ((j - 1) / t)^exponent together. The first update replaces the starting point.
    """
    # -inf at step 0, where b is 0.
    log_ratio = jnp.log1p(-1.0 / (1.0 + step))
    return {
        power_name(width): _moved(
            emas[power_name(width)], params, -jnp.expm1(power_exponent(width) * log_ratio)
        )
        for width in widths
    }


def power_exponent(sigma_rel: float) -> float:
    """gamma + 1 of the power profile t^gamma on [0, 1] whose standard deviation is `sigma_rel`.

    sigma^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1 (arXiv 2312.02696, equation 126 and algorithm 2).

    Raises:
      UserError: not between 0 and 12^-1/2 = 0.2887, that of the plain mean.
    """
    if not 0.0 < sigma_rel < WIDEST_EMA_POWER:
        raise UserError(
            f"optim.ema_power: width {sigma_rel} must be above 0 and below 0.2887, that of the plain mean"
        )
    inverse = sigma_rel**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max()) + 1.0


def _moved(ema: Params, params: Params, rate: jax.Array) -> Params:
    """An average moved by the share `rate` [] of the way to `params`, float32."""
    return jax.tree.map(lambda mean, value: mean + rate * (value.astype(jnp.float32) - mean), ema, params)

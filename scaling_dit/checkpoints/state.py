"""Everything a run needs to continue, as one pytree."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from scaling_dit.checkpoints.ema import ema_name, power_name
from scaling_dit.trees import Params


@flax.struct.dataclass
class TrainState:
    """Step, parameters, optimiser state and averages. Frozen weights are not in it.

    step: int32 [], optimiser updates done or skipped, which is also the next step's position in the data.
    params: {"backbone": tree, "text_encoder": tree if it is trained}, float32.
    opt_state: of `optim.make_optimizer`; the moments have the structure of `params`, so they shard like them.
    emas: name (see `ema_name` and `power_name`) -> moving average with the structure of `params`, float32.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    emas: dict[str, Params]


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema_decays: Iterable[float] = (),
    ema_power: Iterable[float] = (),
) -> TrainState:
    """The state before the first step; every average starts at `params`. Pure: may be jitted or traced.

    Raises:
      UserError: a decay outside [0, 1), or what `optimizer.init` raises.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        emas={name: _average(params) for name in (*map(ema_name, ema_decays), *map(power_name, ema_power))},
    )


def start_from(state: TrainState, given: Params) -> TrainState:
    """A state of step 0 whose parameters, and every average, are `given` where that has them; pure.

    `given` holds whole entries of `params`, such as {"text_encoder": tree}.
    """
    params = state.params | given
    new: Any = state  # flax adds `replace`, unseen by type checkers
    return new.replace(params=params, emas={name: _average(params) for name in state.emas})


def _average(params: Params) -> Params:
    """An average that begins with these parameters: copies, for a donated state must not hold one buffer twice."""
    average: Params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return average

"""Everything a run needs to continue, as one pytree, and the state in which a run begins."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.checkpoints.ema import average_of, ema_name, power_name
from scaling_dit.model.model import Model
from scaling_dit.trees import Params


@flax.struct.dataclass
class TrainState:
    """Step, parameters, optimizer state and averages. Frozen weights are not in it.

    step: int32 [], optimizer updates done or skipped, which is also the next step's position in the data.
    params: {"backbone": tree, "text_encoder": tree if it is trained}, float32.
    opt_state: of `optim.make_optimizer`; the moments have the structure of `params`, so they shard like them.
    emas: name (see `ema_name` and `power_name`) -> moving average with the structure of `params`, float32.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    emas: dict[str, Params]


def init_state(
    model: Model, optimizer: optax.GradientTransformation, config: ConfigDict, key: jax.Array
) -> TrainState:
    """The state of a run before its first step, with fresh parameters; pure, without sharding names."""
    params, _ = model.init(key)
    return create_state(trees.unbox(params), optimizer, config.optim.ema, config.optim.ema_power)


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema_decays: Iterable[float] = (),
    ema_power: Iterable[float] = (),
) -> TrainState:
    """The state before the first step with these parameters, which every average starts at; pure.

    Raises:
      UserError: a decay outside [0, 1), or what `optimizer.init` raises.
    """
    names = (*map(ema_name, ema_decays), *map(power_name, ema_power))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        emas={name: average_of(params) for name in names},
    )


def start_from(state: TrainState, given: Params) -> TrainState:
    """A state of step 0 whose parameters, and every average, are `given` where that has them; pure.

    `given` holds whole entries of `params`, such as {"text_encoder": tree}.
    """
    params = state.params | given
    # flax adds `replace`, unseen by type checkers.
    new: Any = state
    return new.replace(params=params, emas={name: average_of(params) for name in state.emas})

"""Steps of an optimizer on a few small parameters, and comparisons of their bits."""

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.checkpoints.state import create_state
from scaling_dit.config import defaults
from scaling_dit.training import optim as optim_lib


def section(**fields):
    optim = defaults().optim
    optim.update({"warmup_steps": 0, "learning_rate": 0.1, "ema": (), **fields})
    return optim


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "backbone": {"dense": {"kernel": (4, 3), "bias": (3,)}, "pos_embed": (5, 4)},
        "text_encoder": {"embed": {"embedding": (6, 4)}, "out": {"kernel": (4, 4), "bias": (2, 4)}},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make_grads(seed, scale=1.0):
    return jax.tree.map(lambda p: jnp.asarray(np.float32(scale) * np.asarray(p)), make_params(1000 + seed))


# Fields of an optimizer and the steps of its run -> the functions compiled for them.
_COMPILED = {}


def compiled(optim, total_steps):
    """(parameters -> state, (state, loss, gradients) -> state), compiled once for equal settings."""
    key = str(optim), total_steps
    if key not in _COMPILED:
        optimizer, emas = optim_lib.make_optimizer(optim, total_steps), tuple(optim.ema)
        _COMPILED[key] = (
            jax.jit(lambda params: create_state(params, optimizer, emas)),
            jax.jit(
                lambda state, loss, grads: optim_lib.apply_gradients(state, loss, grads, optimizer, emas)
            ),
        )
    return _COMPILED[key]


def run(optim, gradients, params=None, losses=None, total_steps=100):
    """States before and after each step."""
    create, step = compiled(optim, total_steps)
    states = [create(make_params() if params is None else params)]
    for index, grads in enumerate(gradients):
        loss = 1.0 if losses is None else losses[index]
        states.append(step(states[-1], jnp.float32(loss), grads))
    return states


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

"""The training state: what it holds, and that it can be traced, donated and sharded like its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_dit.checkpoints.ema import ema_name
from scaling_dit.checkpoints.state import create_state
from scaling_dit.config import defaults
from scaling_dit.errors import UserError
from scaling_dit.training.optim import apply_gradients, make_optimizer


def make_params(rng):
    return {
        "backbone": {"proj": {"kernel": jax.random.normal(rng, (4, 3)), "bias": jnp.zeros(3)}},
        "text_encoder": {"embed": {"embedding": jnp.ones((7, 4))}},
    }


def test_averages_start_at_the_parameters_in_float32_and_own_their_memory():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params(jax.random.key(0)))
    state = create_state(params, optax.sgd(0.1), (0.99, 0.9999))
    assert int(state.step) == 0 and state.step.dtype == jnp.int32 and state.step.shape == ()
    assert list(state.emas) == ["0.99", "0.9999"]
    for ema in state.emas.values():
        assert jax.tree.structure(ema) == jax.tree.structure(params)
        for mean, value in zip(jax.tree.leaves(ema), jax.tree.leaves(params), strict=True):
            assert mean.dtype == jnp.float32
            np.testing.assert_array_equal(mean, value.astype(jnp.float32))
    assert create_state(params, optax.sgd(0.1)).emas == {}


def test_moments_have_the_structure_of_the_parameters():
    params = make_params(jax.random.key(0))
    optim = defaults().optim
    optim.groups = (("^text_encoder/", 0.0, 0.0), ("bias$", 2.0, 0.1))
    state = create_state(params, make_optimizer(optim, 10), ())
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state.opt_state, name)
        assert jax.tree.structure(moments) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, params)
    others = len(jax.tree.leaves(state.opt_state)) - 2 * len(jax.tree.leaves(params))
    # Scalars: two Adam and schedule counters, three of the guard.
    assert others == 5


@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_a_new_state_can_be_donated(wrap):
    optimizer = make_optimizer(defaults().optim, 10)
    decays = (0.9, 0.99)
    state = wrap(lambda rng: create_state(make_params(rng), optimizer, decays))(jax.random.key(0))
    before = jax.tree.map(np.array, state)
    step = jax.jit(
        lambda state: apply_gradients(state, jnp.float32(1), state.params, optimizer, decays),
        donate_argnums=0,
    )
    after = step(step(state))
    assert int(after.step) == 2
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert not np.array_equal(
        after.params["backbone"]["proj"]["kernel"], before.params["backbone"]["proj"]["kernel"]
    )


def test_state_can_be_traced_abstractly():
    optimizer = make_optimizer(defaults().optim, 10)
    abstract = jax.eval_shape(
        lambda rng: create_state(make_params(rng), optimizer, (0.5,)), jax.random.key(0)
    )
    assert abstract.emas["0.5"]["backbone"]["proj"]["kernel"].shape == (4, 3)
    assert abstract.step.dtype == jnp.int32


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(UserError, match="optim.ema: decay .* must be at least 0 and less than 1"):
        create_state(make_params(jax.random.key(0)), optax.sgd(0.1), (0.9, decay))


def test_names_of_averages_tell_decays_apart():
    assert len({ema_name(decay) for decay in (0.999, 0.9999, 0.99999, 0.999999, 0)}) == 5

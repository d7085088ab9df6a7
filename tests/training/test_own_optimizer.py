"""An optimizer of a user's own takes Adam's place, and what is around it stays; mistakes are one line."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from scaling_dit.errors import UserError
from scaling_dit.training import optim as optim_lib
from tests.support.optimizer_steps import assert_trees_equal, make_grads, make_params, run, section


def own(name, **fields):
    return {"name": name if ":" in name else f"{__name__}:{name}", "fields": ConfigDict(fields)}


def linear(total_steps, start=1.0):
    """A direction whose length falls to zero over the run."""
    return optax.scale_by_schedule(optax.linear_schedule(start, 0.0, total_steps))


def no_optimizer():
    return 3


def uphill():
    return optax.lion(1e-3)


def flat():
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.ravel, updates))


def growing():
    return optax.GradientTransformation(lambda params: (), lambda u, s, params=None: (u, (s, 1)))


def failing():
    return optax.stateless(lambda updates, params: updates["missing"])


def test_lion_equals_optaxs():
    optim = section(
        **own("optax:scale_by_lion", b1=0.95, b2=0.98), learning_rate=0.03, weight_decay=0.2, clip_norm=0.0
    )
    params, gradients = make_params(), [make_grads(index) for index in range(6)]
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    reference = optax.lion(0.03, b1=0.95, b2=0.98, weight_decay=0.2, mask=kernels)

    @jax.jit
    def step(grads, state, params):
        updates, state = reference.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state, expected = jax.jit(reference.init)(params), params
    for grads in gradients:
        state, expected = step(grads, state, expected)
    found = run(optim, gradients)[-1].params
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_the_guard_the_groups_and_the_clip_stay():
    groups = (("text_encoder", 0.0, 0.0), ("pos_embed", 2.0, 0.0))
    optim = section(**own("optax:identity"), groups=groups, weight_decay=0.0, clip_norm=1e-3)
    good = make_grads(0)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), good)
    first, second, third = run(optim, [broken, good])
    assert_trees_equal(first.params, second.params)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), second.params, third.params)
    assert_trees_equal(second.params["text_encoder"], third.params["text_encoder"])
    norm = optax.global_norm(good["backbone"])
    for name, factor in (("dense", 1.0), ("pos_embed", 2.0)):
        for step, grad in zip(
            *map(jax.tree.leaves, (moved["backbone"][name], good["backbone"][name])), strict=True
        ):
            np.testing.assert_allclose(step, 0.1 * factor * 1e-3 * grad / norm, atol=1e-7)


def test_the_length_of_the_run_is_given_to_one_that_asks():
    optim = section(**own("linear", start=2.0), weight_decay=0.0, clip_norm=0.0)
    states = run(optim, [make_grads(0)] * 3, total_steps=4)
    bias = [np.asarray(state.params["backbone"]["dense"]["bias"]) for state in states]
    steps = [a - b for a, b in itertools.pairwise(bias)]
    np.testing.assert_allclose(steps[1] / steps[0], 0.75, rtol=1e-4)
    np.testing.assert_allclose(steps[2] / steps[0], 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_optimizer", r"it has no method init\(params\); it is a int"),
        ("uphill", r"update\(\) leads uphill; .* as optax.scale_by_lion does and optax.lion does not"),
        ("flat", r"update\(\) returned other shapes or dtypes than the gradients"),
        ("growing", r"update\(\) returned a state of other structure"),
        (
            "failing",
            r"init\(\) or update\(\) raised KeyError: 'missing' \(.*test_own_optimizer.py, line \d+\)",
        ),
        ("optax:lion", "config.optim.name 'optax:lion' needs a value for learning_rate"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(UserError, match=message) as error:
        optim_lib.make_optimizer(section(**own(name)), 10)
    assert str(error.value).startswith("config.optim.name '") and "\n" not in str(error.value)

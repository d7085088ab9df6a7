"""Tests remember the shapes that an initialiser makes; flax's check of a parameter finds what it found before."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.core import scope
from flax.errors import ScopeParamShapeError


def shape_of(function):
    (leaf,) = jax.tree.leaves(scope.jax.eval_shape(function))
    return leaf.shape


def test_shapes_are_remembered_by_what_a_function_computes_with(monkeypatch):
    def of(side, *more, extra=1):
        def inner(key=3, *, extra=extra):
            return jnp.zeros((side, key, extra, *more))

        return inner

    assert scope.jax.eval_shape is not jax.eval_shape
    assert shape_of(of(2)) == (2, 3, 1) and shape_of(of(4)) == (4, 3, 1)
    assert shape_of(of(2, extra=5)) == (2, 3, 5) and shape_of(of(2, 7)) == (2, 3, 1, 7)
    assert shape_of(functools.partial(of(2), 6)) == (2, 6, 1)
    # The same line of two programs, with other globals.
    for side in (8, 9):
        names = {"jnp": jnp, "side": side}
        exec("make = lambda: jnp.zeros((side,))", names)
        assert shape_of(names["make"]) == (side,)
    monkeypatch.setattr(jax, "eval_shape", lambda *_: pytest.fail("traced again"))
    assert shape_of(of(4)) == (4, 3, 1)


def test_a_parameter_of_another_shape_is_refused():
    layer, x = nn.Dense(3), jnp.zeros((1, 4))
    params = layer.init(jax.random.key(0), x)
    for _ in range(2):
        layer.apply(params, x)
        with pytest.raises(ScopeParamShapeError):
            nn.Dense(5).apply(params, x)

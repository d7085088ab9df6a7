"""A model at the resolution of its base is the base, whatever it does with positions beyond that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones
from scaling_dit.backbones import contract, uvit
from scaling_dit.errors import UserError
from tests.support.uvit_golden import fill, initial, run

TINY = {"size": "h16-d1-n2", "text_dim": 6}
# The base has 4 x 4 tokens. What each family's larger run may set.
CHOICES = [
    ("uvit", {}, {"table_side": 4}),
    pytest.param("pixart", {"base_size": 4, "caption_embedding": True}, {}, marks=pytest.mark.slow),
    pytest.param("large_dit", {}, {"base_size": 4, "rope_scaling": "grid"}, marks=pytest.mark.slow),
    pytest.param("next_dit", {}, {"base_size": 4, "rope_scaling": "ntk"}, marks=pytest.mark.slow),
    *(
        pytest.param(name, {}, {"base_size": 4, "rope_scaling": scaling}, marks=pytest.mark.slow)
        for name in ("large_dit", "next_dit")
        for scaling in ("linear", "centred")
    ),
]


def inputs(side, length=3):
    rng = np.random.default_rng(side)
    return (
        rng.normal(size=(1, side, side, 4)).astype("f4"),
        np.array([300.0], "f4"),
        rng.normal(size=(1, length, 6)).astype("f4"),
    )


@pytest.mark.parametrize("name, fields, changes", CHOICES, ids=lambda x: x if isinstance(x, str) else None)
def test_at_the_old_resolution_it_is_the_base_bit_for_bit(name, fields, changes):
    base = backbones.create(name, **TINY, **fields)
    larger = base.clone(**changes)
    variables = fill(contract.abstract_variables(base, inputs(8)))
    made = contract.abstract_variables(larger, inputs(16))
    # A run at the larger size has the same parameters.
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(
        run(larger.apply, variables, *inputs(8)), run(base.apply, variables, *inputs(8))
    )
    beyond = np.asarray(run(larger.apply, variables, *inputs(16)))
    assert np.isfinite(beyond).all()
    if "rope_scaling" in changes:
        assert np.abs(beyond - run(base.apply, variables, *inputs(16))).max() > 1e-5


def test_a_table_for_more_text_and_a_larger_grid():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1 + 3 + 16, 8)).astype("f4")

    def resized(text, image):
        return run(lambda table: uvit.resize_table(table, text, image), table)

    same = resized((3, 3), (16, 16))
    np.testing.assert_array_equal(same, table)
    longer = resized((3, 7), (16, 16))
    np.testing.assert_array_equal(longer[:4], table[:4])
    np.testing.assert_array_equal(longer[4:8], table[np.array([1, 2, 3, 1])])
    np.testing.assert_array_equal(longer[8:], table[4:])
    shorter = resized((3, 2), (16, 16))
    np.testing.assert_array_equal(shorter, table[np.r_[0:3, 4:20]])
    larger = resized((3, 3), (16, 64))
    grid = run(lambda grid: uvit.resize_grid(grid, 8, 8), table[4:].reshape(4, 4, 8))
    np.testing.assert_array_equal(larger[4:], grid.reshape(64, 8))
    for text, image in (((4, 4), (16, 16)), ((3, 3), (16, 32)), ((20, 20), (-1, 16))):
        with pytest.raises(UserError, match="the position table holds 20 tokens"):
            uvit.resize_table(table, text, image)


def test_a_kept_table_is_resized_in_the_call_and_checked():
    base = backbones.create("uvit", **TINY)
    kept, own = base.clone(table_side=4), base
    variables = fill(contract.abstract_variables(base, inputs(8)))
    table = run(lambda table: uvit.resize_table(table, (3, 3), (16, 64)), variables["params"]["pos_embed"])
    resized = {"params": variables["params"] | {"pos_embed": table}}
    found, wanted = run(kept.apply, variables, *inputs(16)), run(own.apply, resized, *inputs(16))
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(UserError, match="table_side=4 and 5 tokens of text need 22"):
        kept.apply(variables, *inputs(8, length=5))
    # As many tokens as the square, in another shape.
    wide = np.zeros((1, 4, 16, 4), "f4"), *inputs(8)[1:]
    difference = np.asarray(run(kept.apply, variables, *wide)) - run(base.apply, variables, *wide)
    assert np.abs(difference).max() > 1e-4
    fresh = initial(base.clone(table_side=4, positions="sincos_init"), inputs(16), "pos_embed")
    assert fresh["pos_embed"].shape == (20, 16)


@pytest.mark.parametrize(
    "name, field, value, line",
    [
        ("uvit", "table_side", -1, "table_side must be an integer of at least 0, got -1"),
        (
            "next_dit",
            "rope_scaling",
            "grid",
            "unknown rope_scaling 'grid'; known: centred, linear, none, ntk",
        ),
        ("large_dit", "rope_scaling", "liner", "did you mean 'linear'"),
        ("large_dit", "base_size", 0, "base_size must be an integer of at least 1, got 0"),
    ],
)
def test_mistakes_in_fields(name, field, value, line):
    with pytest.raises(UserError, match=line):
        backbones.create(name, **TINY, **{field: value})

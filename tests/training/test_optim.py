"""The optimizer against torch and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from scaling_dit.checkpoints.ema import update_emas
from scaling_dit.checkpoints.state import create_state
from scaling_dit.errors import UserError
from scaling_dit.training import optim as optim_lib
from tests.support.optimizer_steps import assert_trees_equal, make_grads, make_params, run, section


def differs(first, second):
    return [
        not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    ]


def test_twenty_steps_equal_torch_adamw():
    optim = section(
        learning_rate=0.03,
        weight_decay=0.2,
        clip_norm=2.0,
        b2=0.95,
        warmup_steps=5,
        decay="cosine",
        final_fraction=0.1,
    )
    params = make_params()
    tensors = jax.tree.map(lambda p: torch.nn.Parameter(torch.tensor(np.array(p))), params)
    decayed = [tensors["backbone"]["dense"]["kernel"], tensors["text_encoder"]["out"]["kernel"]]
    others = [t for t in jax.tree.leaves(tensors) if all(t is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.03, betas=(0.9, 0.95), eps=1e-8)
    rate = optim_lib.learning_rate_schedule(optim, 20)
    gradients = [make_grads(index, scale=0.1 + 0.1 * index) for index in range(20)]
    for index, grads in enumerate(gradients):
        for tensor, grad in zip(jax.tree.leaves(tensors), jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(np.array(grad))
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(tensors), 2.0)
        for group in reference.param_groups:
            group["lr"] = float(rate(index))
        reference.step()
    ours = run(optim, gradients, params, total_steps=20)[-1].params
    for value, tensor in zip(jax.tree.leaves(ours), jax.tree.leaves(tensors), strict=True):
        np.testing.assert_allclose(value, tensor.detach().numpy(), rtol=0, atol=3e-6)


def test_schedules():
    constant = optim_lib.learning_rate_schedule(section(learning_rate=2.0, warmup_steps=4), 100)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 2, 4, 50, 1000)], [0, 0.5, 1, 2, 2, 2])
    cosine_fields = {"learning_rate": 2.0, "decay": "cosine", "final_fraction": 0.25}
    cosine = optim_lib.learning_rate_schedule(section(**cosine_fields, warmup_steps=10), 110)
    np.testing.assert_allclose(
        [cosine(step) for step in (5, 10, 60, 110, 200)], [1, 2, 1.25, 0.5, 0.5], rtol=1e-6
    )
    no_warmup = optim_lib.learning_rate_schedule(section(**cosine_fields), 100)
    np.testing.assert_allclose([no_warmup(step) for step in (0, 50, 100)], [2, 1.25, 0.5], rtol=1e-6)


def test_weight_decay_goes_to_kernels_only():
    gradients = [jax.tree.map(jnp.zeros_like, make_params())]
    before, after = run(section(weight_decay=0.5), gradients)
    changed = jax.tree.unflatten(jax.tree.structure(before.params), differs(before.params, after.params))
    assert changed == {
        "backbone": {"dense": {"kernel": True, "bias": False}, "pos_embed": False},
        "text_encoder": {"embed": {"embedding": False}, "out": {"kernel": True, "bias": False}},
    }
    kernel = before.params["backbone"]["dense"]["kernel"]
    np.testing.assert_allclose(
        after.params["backbone"]["dense"]["kernel"], kernel * (1 - 0.1 * 0.5), rtol=1e-6
    )


def test_the_first_matching_group_sets_rate_and_decay():
    groups = (("^text_encoder/.*kernel$", 0.5, 0.3), ("^text_encoder/", 0.25, 0.0), ("pos_embed", 2.0, 0.1))
    factors, decays = optim_lib.parameter_settings(make_params(), groups, 0.01)
    assert factors["text_encoder"] == {"embed": {"embedding": 0.25}, "out": {"kernel": 0.5, "bias": 0.25}}
    assert decays["text_encoder"] == {"embed": {"embedding": 0.0}, "out": {"kernel": 0.3, "bias": 0.0}}
    assert factors["backbone"] == {"dense": {"kernel": 1.0, "bias": 1.0}, "pos_embed": 2.0}
    assert decays["backbone"] == {"dense": {"kernel": 0.01, "bias": 0.0}, "pos_embed": 0.1}

    gradients = [make_grads(0)]
    start, plain = run(section(weight_decay=0.0), gradients)
    _, grouped = run(section(groups=(("^text_encoder/", 0.25, 0.0),), weight_decay=0.0), gradients)
    moved = (
        plain.params["text_encoder"]["embed"]["embedding"]
        - start.params["text_encoder"]["embed"]["embedding"]
    )
    expected = start.params["text_encoder"]["embed"]["embedding"] + 0.25 * moved
    np.testing.assert_allclose(grouped.params["text_encoder"]["embed"]["embedding"], expected, atol=1e-6)
    assert_trees_equal(grouped.params["backbone"], plain.params["backbone"])


def test_a_text_encoder_has_a_rate_of_its_own_and_groups_come_first():
    groups = (("embed/embedding$", 0.5, 0.3),)
    factors, decays = optim_lib.parameter_settings(make_params(), groups, 0.01, 0.1)
    assert factors["text_encoder"] == {"embed": {"embedding": 0.5}, "out": {"kernel": 0.1, "bias": 0.1}}
    assert factors["backbone"] == {"dense": {"kernel": 1.0, "bias": 1.0}, "pos_embed": 1.0}
    # Of the decay it says nothing.
    assert decays == optim_lib.parameter_settings(make_params(), groups, 0.01)[1]
    gradients = [make_grads(0)]
    start, plain = run(section(weight_decay=0.0), gradients)
    _, slower = run(section(text_encoder_rate=0.1, weight_decay=0.0), gradients)
    moved = [
        state.params["text_encoder"]["out"]["bias"] - start.params["text_encoder"]["out"]["bias"]
        for state in (plain, slower)
    ]
    np.testing.assert_allclose(moved[1], 0.1 * moved[0], rtol=1e-4, atol=1e-7)
    assert_trees_equal(slower.params["backbone"], plain.params["backbone"])


def test_factor_zero_freezes_and_leaves_the_norm_alone():
    frozen = (("^text_encoder/", 0.0, 0.5),)
    small = make_grads(0)
    large = {**small, "text_encoder": jax.tree.map(lambda g: 1e3 * g, small["text_encoder"])}
    start, with_small = run(section(groups=frozen), [small])
    _, with_large = run(section(groups=frozen), [large])
    assert_trees_equal(with_small.params["text_encoder"], start.params["text_encoder"])
    assert all(differs(with_small.params["backbone"], start.params["backbone"]))
    assert_trees_equal(with_small.params, with_large.params)
    assert_trees_equal(with_small.opt_state, with_large.opt_state)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("text_encodr/", 0.1, 0.0),), "'text_encodr/' matches no parameter .*did you mean 'text_encoder'"),
        (
            (("^text_encoder/", 0.1, 0.0), ("embedding", 0.2, 0.0)),
            "'embedding' matches no parameter that an earlier",
        ),
        ((("backbone", "fast", 0.1),), "could not convert string to float: 'fast'"),
    ],
)
def test_a_wrong_group_is_reported_when_the_state_is_made(groups, message):
    optimizer = optim_lib.make_optimizer(section(groups=groups), 10)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: create_state(make_params(), optimizer))


def test_a_wrong_schedule_is_reported():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        optim_lib.make_optimizer(section(decay="cosin"), 10)
    with pytest.raises(UserError, match="optim.warmup_steps=10 leaves nothing of steps=10"):
        optim_lib.make_optimizer(section(decay="cosine", warmup_steps=10), 10)


def test_clipping_by_the_global_norm():
    grads = make_grads(0)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))
    clipped = run(section(clip_norm=0.5), [grads])[-1]
    scaled = jax.tree.map(lambda g: jnp.asarray(np.asarray(g) * np.float32(0.5 / norm)), grads)
    by_hand = run(section(clip_norm=0.0), [scaled])[-1]
    untouched = run(section(clip_norm=0.0), [grads])[-1]
    first_moment = [optax.tree_utils.tree_get(s.opt_state, "mu") for s in (clipped, by_hand, untouched)]
    for ours, expected, other in zip(*map(jax.tree.leaves, first_moment), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        np.testing.assert_allclose(other, expected * norm / 0.5, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "loss"])
def test_a_nonfinite_update_changes_nothing_and_is_counted(bad):
    good = make_grads(0)
    broken = jax.tree.map(jnp.copy, good)
    if bad != "loss":
        broken["backbone"]["dense"]["bias"] = broken["backbone"]["dense"]["bias"].at[1].set(bad)
    optim = section(ema=(0.9,), max_nonfinite=1)
    losses = [1.0, *([np.inf] * 3 if bad == "loss" else [1.0] * 3), 1.0]
    states = run(optim, [good, broken, broken, broken, good], losses=losses)
    counts = [tuple(map(int, optim_lib.nonfinite_count(state.opt_state))) for state in states]
    assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3), (0, 3)]
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
    for skipped in states[2:5]:
        assert_trees_equal(skipped.params, states[1].params)
        assert_trees_equal(skipped.emas, states[1].emas)
        for name in ("mu", "nu"):
            get = optax.tree_utils.tree_get
            assert_trees_equal(get(skipped.opt_state, name), get(states[1].opt_state, name))
    assert all(differs(states[5].params, states[4].params))
    assert all(differs(states[5].emas, states[4].emas))


def test_the_learning_rate_follows_the_step_over_skipped_updates():
    """Adam's first update is lr * sign(grad); here it happens at step 3 of a warm-up of 10."""
    good = make_grads(0)
    bad = jax.tree.map(lambda g: g * jnp.nan, good)
    states = run(section(warmup_steps=10, weight_decay=0.0), [bad, bad, bad, good])
    step = states[-1].params["backbone"]["dense"]["kernel"] - states[0].params["backbone"]["dense"]["kernel"]
    np.testing.assert_allclose(step, -0.03 * np.sign(good["backbone"]["dense"]["kernel"]), rtol=1e-3)


def test_averages_follow_their_closed_form():
    values = [np.float32(value) for value in np.random.default_rng(0).normal(size=30)]
    decays = (0.5, 0.7, 0.9999)
    emas = {str(decay): {"x": jnp.float32(3.0)} for decay in decays}
    update = jax.jit(lambda emas, value, step: update_emas(emas, {"x": value}, decays, step))
    for step, value in enumerate(values):
        emas = update(emas, jnp.bfloat16(value), jnp.int32(step))
    for decay in decays:
        rates = [min(decay, (1 + step) / (10 + step)) for step in range(len(values))]
        expected = 3.0 * np.prod(rates)
        for step, value in enumerate(values):
            rounded = float(jnp.bfloat16(value))
            expected += (1 - rates[step]) * np.prod(rates[step + 1 :]) * rounded
        np.testing.assert_allclose(emas[str(decay)]["x"], expected, rtol=1e-5)
        assert emas[str(decay)]["x"].dtype == jnp.float32


def test_a_step_moves_averages_towards_the_new_parameters():
    before, after = run(section(ema=(0.999, 0.05)), [make_grads(0)])
    # At step 0 the warm-up's 1 / 10 caps the decay.
    for decay, rate in (("0.999", 0.1), ("0.05", 0.05)):
        for old, new, mean in zip(
            *map(jax.tree.leaves, (before.params, after.params, after.emas[decay])), strict=True
        ):
            np.testing.assert_allclose(mean, rate * old + (1 - rate) * new, rtol=1e-5, atol=1e-6)

"""Conditions of items: brought to the run's size, hashed, checked against the run, and sampled batch by batch."""

import types

import jax
import numpy as np
import pytest

from scaling_dit.errors import UserError
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation.metric import Item, Items
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.options import SamplingOptions

SIDE = 8


def item(number, side=SIDE, **more):
    rng = np.random.default_rng(number)
    edit = rng.integers(0, 256, (side, side, 3), np.uint8)
    return Item(f"i{number}", f"p{number}", conditions={"edit": edit, **more})


def test_conditions_are_stacked_by_name():
    items = [item(i) for i in range(3)]
    stacked = conditioned.stack(items, SIDE)
    assert set(stacked) == {"edit"} and stacked["edit"].shape == (3, SIDE, SIDE, 3)
    np.testing.assert_array_equal(stacked["edit"][2], items[2].conditions["edit"])
    assert conditioned.stack([Item("a", "b")], SIDE) == {} == conditioned.stack([], SIDE)
    with pytest.raises(UserError, match="item 'a' has the conditions none, 'i0' has edit"):
        conditioned.stack([item(0), Item("a", "b")], SIDE)


def test_scaling_keeps_what_is_masked_out_of_what_is_given():
    condition = np.full((32, 32, 4), 200, np.uint8)
    condition[..., 3] = 0
    # Odd edges, so that cells of the smaller image are half masked.
    condition[3:13, 5:19, :3], condition[3:13, 5:19, 3] = 0, 255
    small = conditioned.fitted(condition, SIDE)
    missing = small[..., 3] == 255
    assert small.shape == (SIDE, SIDE, 4) and set(np.unique(small[..., 3])) == {0, 255}
    assert missing[1, 2] and not missing[5:].any()
    assert (small[missing][:, :3] == 128).all()
    # No given pixel is darkened by the black that is masked.
    assert small[~missing][:, :3].min() >= 199
    assert conditioned.fitted(condition, 32) is condition


def test_the_hash_is_of_names_ids_and_pixels():
    base = conditioned.digest([item(0), item(1)])
    assert base == conditioned.digest(Items(2, item)) and len(base) == 64
    assert len({base, conditioned.digest([item(0)]), conditioned.digest([item(1), item(0)])}) == 3
    assert conditioned.digest([Item("a", "b")]) == "" == conditioned.digest([])


def test_items_without_conditions_are_not_all_read():
    made = []
    items = Items(5, lambda number: made.append(number) or Item(f"i{number}", "p"))
    assert conditioned.digest(items) == "" and set(made) == {0}


def test_a_run_without_the_condition_is_one_line():
    conditioned.check([item(0)], ("edit", "edges"), "edits")
    conditioned.check([Item("a", "b")], (), "shapes_tifa")
    with pytest.raises(
        UserError, match="metric 'edits' gives condition 'edit', and the run reads edges; train"
    ):
        conditioned.check([item(0)], ("edges",), "edits")
    with pytest.raises(UserError, match="the run reads none"):
        conditioned.check([item(0)], (), "edits")


def test_options_that_act_on_no_item_are_one_line():
    masked = types.SimpleNamespace(name="inpaint", condition=types.SimpleNamespace(masks=1))
    sampler = types.SimpleNamespace(
        model=types.SimpleNamespace(conditions=(masked,)), options=SamplingOptions(keep=True)
    )
    conditioned.check_options([item(0, inpaint=np.zeros((SIDE, SIDE, 4), np.uint8))], sampler)
    for items in ([item(0)], []):
        with pytest.raises(UserError, match="keep needs a condition with a mask.*; give inpaint"):
            conditioned.check_options(items, sampler)


class _Sampler:
    """Gives back what it was asked to make: the condition's first pixel, the number and the batch."""

    model = types.SimpleNamespace(image_size=SIDE)
    options = types.SimpleNamespace(batch=4)
    mesh = make_mesh(devices=jax.devices()[:1])

    def __init__(self):
        self.calls = []

    def batches(self, params, frozen, prompts, seed=0, numbers=None, batch=None, *, conditions=None):
        self.calls.append((list(prompts), numbers, batch))
        yield (
            np.stack([one[:1, :1] for one in conditions["edit"]])
            if conditions
            else np.zeros((len(prompts), 1, 1, 3))
        )


def test_items_are_sampled_with_their_conditions_in_the_batches_of_one_request():
    sampler, items = _Sampler(), Items(10, item)
    prompts = [f"say {i}" for i in range(10)]
    images = np.concatenate(list(conditioned.sampled(sampler, {}, {}, items, prompts, 3)))
    np.testing.assert_array_equal(images[:, 0, 0], [item(i).conditions["edit"][0, 0] for i in range(10)])
    assert [call[1] for call in sampler.calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    # A short last batch has the compiled size.
    assert {call[2] for call in sampler.calls} == {4}
    bare = _Sampler()
    list(conditioned.sampled(bare, {}, {}, [Item("a", "b")], ["c"], 3))
    assert bare.calls == [(["c"], None, None)]


def test_slices_of_items_make_no_item():
    made = []
    items = Items(6, lambda number: made.append(number) or item(number))
    part = items[2:5]
    assert len(part) == 3 and not made
    assert part[-1].id == "i4" and part[1:][0].id == "i3" and made == [4, 3]

"""Which differences between a run's config and its base's are refused, and which are said."""

import types

import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError
from scaling_dit.model.build import build_model, countable_tokenizer
from scaling_dit.training import stage_configs


def config_of(*changes):
    return config_lib.load("experiments/shapes.py:smoke", [f"--config.{change}" for change in changes])


def check(there, here):
    """`check_configs` of two configs, of which neither is trained."""
    base = types.SimpleNamespace(start="base", config=there, trains_text=there.train_text_encoder)
    stage_configs.check_configs(base, here, build_model(here, countable_tokenizer(here)))


TWO = "conditioning.names=('inpaint','edit')"


@pytest.mark.parametrize(
    "there, here, line",
    [
        ((), ("conditions.edit.positions=shifted",), "conditions.edit.positions is 'shared' there and 'shifted' here"),
        (("conditions.edit.concat=channel",), (), "conditions.edit.concat is 'channel' there and 'token' here"),
        (
            ("conditions.edit.positions=shifted",),
            ("conditions.edit.positions=shifted", "conditions.inpaint.positions=shifted"),
            "conditions.inpaint.positions is 'shared' there and 'shifted' here",
        ),
    ],
)  # fmt: skip
def test_conditions_of_both_runs_are_read_alike(there, here, line):
    with pytest.raises(UserError, match=line):
        check(config_of(TWO, *there), config_of(TWO, *here))


def test_a_new_condition_leaves_the_others_where_they_are():
    shifted = ("conditions.inpaint.positions=shifted", "conditions.edit.positions=shifted")
    base = config_of("conditioning.names=('edit',)", shifted[1])
    check(base, config_of("conditioning.names=('edit','inpaint')", *shifted))
    with pytest.raises(UserError, match="puts edit beside the image as number 1 there and 2 here"):
        check(base, config_of(TWO, *shifted))


@pytest.mark.parametrize(
    "change, line",
    [
        ("diffusion.prediction=eps", "config.diffusion.prediction is '.*' there and 'eps' here"),
        ("diffusion.schedule=cosine", "config.diffusion.schedule is '.*' there and 'cosine' here"),
        ("diffusion.resolution_shift=2.0", "config.diffusion.resolution_shift is 1.0 there and 2.0 here"),
        ("text_mask=False", "config.text_mask is True there and False here"),
    ],
)
def test_adapters_keep_the_diffusion_of_their_base_and_stages_say_what_they_change(change, line):
    base, stage = config_of(), config_of(change)
    check(base, stage)
    key = change.partition("=")[0]
    different = stage_configs.changed(base, stage)
    assert f"; {key} is {different[key][0]!r} there and {different[key][1]!r} here" in (
        stage_configs.in_words(different, "start.json")
    )
    with pytest.raises(UserError, match=line):
        check(base, config_of(change, "adapter.rank=2"))


def test_other_differences_are_counted_and_allowed_for_adapters():
    base = config_of()
    here = config_of("adapter.rank=2", "optim.learning_rate=0.5")
    check(base, here)
    different = stage_configs.changed(base, here)
    said = stage_configs.in_words(different, "start.json")
    assert said == f"; {len(different)} fields differ, see start.json"
    assert stage_configs.in_words({}, "start.json") == ""


def rope(side, *changes, name="next_dit"):
    """A family, Next-DiT by default, on scenes of `side` px in patches of 8."""
    config = config_of()
    with config.unlocked():
        config.backbone = ConfigDict({"name": name, "hidden": 32, "depth": 1, "heads": 2, "patch": 8})
        config.source.preset = f"grid{side}"
    dotted = (change if "adapter" in change else f"backbone.{change}" for change in changes)
    return config_lib.resolve(config, [f"--config.{change}" for change in dotted])


def test_scaled_rotary_positions_begin_from_the_grid_of_the_base():
    base = rope(24)
    check(base, rope(48))
    check(base, rope(48, "rope_scaling=linear", "base_size=3"))
    with pytest.raises(UserError, match="backbone.base_size is 16, and the base's grid 3x3; set it to 3"):
        check(base, rope(48, "rope_scaling=ntk"))
    # Already scaled: its positions follow from its own base_size, whatever its grid is.
    scaled = rope(48, "rope_scaling=ntk", "base_size=3")
    check(scaled, rope(48, "rope_scaling=ntk", "base_size=3"))
    with pytest.raises(
        UserError, match="base_size is 8, and 3 in the base, whose positions are scaled already"
    ):
        check(scaled, rope(48, "rope_scaling=ntk", "base_size=8"))


def test_adapters_leave_the_positions_of_their_base_where_they_are():
    base = rope(24, "base_size=3", name="pixart")
    check(base, rope(48, "base_size=6", name="pixart"))
    with pytest.raises(UserError, match="config.backbone.base_size is 3 there and 6 here"):
        check(base, rope(48, "base_size=6", "adapter.rank=2", name="pixart"))
    # Scaled from the base's grid on, they are the base's there.
    check(rope(24), rope(48, "rope_scaling=ntk", "base_size=3", "adapter.rank=2"))
    scaled = rope(48, "rope_scaling=ntk", "base_size=3")
    with pytest.raises(UserError, match="config.backbone.rope_scaling is 'ntk' there and 'linear' here"):
        check(scaled, rope(48, "rope_scaling=linear", "base_size=3", "adapter.rank=2"))

"""Conditions in a config: their sections, checks, and what a run builds of them."""

import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.config import conditions, own_code
from scaling_dit.errors import UserError

SPEC = "experiments/shapes.py:smoke"
NAMED = "--config.conditioning.names=('inpaint','edit')"


def test_every_named_condition_has_a_section_with_common_and_own_fields():
    config = config_lib.load(
        SPEC, [NAMED, "--config.conditions.edit.concat=channel", "--config.conditions.edit.drop=0.5"]
    )
    assert set(config.conditions) == {"inpaint", "edit"}
    first, second = conditions.chosen(config)
    assert (first.name, first.concat, first.positions, first.drop) == ("inpaint", "token", "shared", 0.1)
    assert (second.name, second.concat, second.drop) == ("edit", "channel", 0.5)
    assert first.row(4) == ("inpaint", 5, "token", "shared") and second.row(4)[1] == 4
    assert "smallest" in config.conditions.inpaint
    # Read back from a saved config, and resumed with it alone.
    again = config_lib.resolve(config_lib.from_json(config_lib.to_json(config)))
    config_lib.check_same_run(again, config)
    other = config_lib.load(SPEC, [NAMED, "--config.conditions.inpaint.drop=0.2"])
    with pytest.raises(
        UserError, match="conditions.edit.concat is .* conditions.inpaint.drop is 0.1 there and 0.2"
    ):
        config_lib.check_same_run(config, other)


def test_a_run_without_conditions_has_no_section():
    config = config_lib.load(SPEC)
    assert config.conditioning.names == () and not config.conditions.to_dict()
    assert conditions.chosen(config) == ()


def test_renaming_drops_the_sections_of_others():
    config = config_lib.load(SPEC, [NAMED])
    fewer = config_lib.resolve(config, ["--config.conditioning.names=('edit',)"])
    assert list(fewer.conditions) == ["edit"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.conditioning.names=('inpant',)"], "unknown condition 'inpant'; did you mean 'inpaint'"),
        (["--config.conditioning.names=('edit','edit')"], "names two conditions 'edit'; leave one out"),
        (["--config.conditioning.names=(3,)"], "it must be a tuple of names of conditions"),
        (
            [NAMED, "--config.conditions.edit.concat=tokens"],
            "config.conditions.edit.concat is 'tokens'; did you mean 'token'",
        ),
        (
            [NAMED, "--config.conditions.edit.positions=own"],
            "config.conditions.edit.positions is 'own'; known: shared, shifted",
        ),
        (
            [NAMED, "--config.conditions.edit.concat=channel", "--config.conditions.edit.positions=shifted"],
            "config.conditions.edit.positions is 'shifted', but channels have no positions; leave it out",
        ),
        (
            [NAMED, "--config.conditions.edit.drop=1.5"],
            "config.conditions.edit.drop is 1.5; it must be from 0 to 1",
        ),
        (["--config.conditions.edit.drop=0.5"], "no such field"),
        (["--config.backbone.conditions=()"], "config.conditioning.names"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        config_lib.load(SPEC, overrides)
    assert "\n" not in str(error.value)


def test_a_section_that_the_list_does_not_name_is_refused():
    config = ConfigDict({"conditions": {"edit": {"drop": 0.5}}})
    with pytest.raises(
        UserError, match="config.conditions.edit: config.conditioning.names names no condition 'edit'"
    ):
        config_lib.resolve(config)


def test_own_conditions_count_as_own_code():
    saved = {"conditioning": {"names": ("inpaint", "mine:Depth")}}
    assert own_code.own_names(saved) == {"conditioning.names[1]": "mine:Depth"}

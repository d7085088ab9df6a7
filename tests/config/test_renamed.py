"""Configs that earlier versions saved: every key and value that was renamed is read under its new name."""

import json
import re

import pytest

from scaling_dit import config as config_lib
from scaling_dit.config import renamed
from scaling_dit.errors import UserError


def saved(fields=None):
    """A config as an earlier version saved it: with the old names at the values of `fields`."""
    values = json.loads(config_lib.to_json(config_lib.load("experiments/shapes.py:smoke")))
    del values["sharding"], values["metrics"]
    values["mesh"] |= {"gather_once": False, "sparse_core": False}
    values["backbone"]["mask_text"] = True
    values["eval"]["metrics"] = ["tifa"]
    for key, value in (fields or {}).items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def read(values):
    return config_lib.resolve(config_lib.from_json(json.dumps(values)))


def test_a_config_of_an_earlier_version_is_the_same_run():
    now = config_lib.load("experiments/shapes.py:smoke")
    then = read(saved())
    config_lib.check_same_run(then, now)
    assert then.eval.metrics == ("shapes_tifa",)
    assert set(config_lib.flatten(then)) == set(config_lib.flatten(now))


def test_every_renamed_field_is_in_the_old_config_of_these_tests():
    values = saved()
    for key in renamed.FIELDS:
        section, _, name = key.rpartition(".")
        assert name in values[section]
        assert key not in config_lib.flatten(read(values))


@pytest.mark.parametrize("name", ["gather_once", "sparse_core"])
def test_switches_left_the_mesh(name):
    config = read(saved({f"mesh.{name}": True}))
    assert config.sharding[name] is True
    assert name not in config.mesh


@pytest.mark.parametrize(
    "mask_text, text_mask, hidden",
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_padding_was_hidden_where_both_switches_were_on(mask_text, text_mask, hidden):
    config = read(saved({"backbone.mask_text": mask_text, "text_mask": text_mask}))
    assert config.text_mask is hidden


def test_a_renamed_value_is_that_of_earlier_versions_alone():
    values = json.loads(config_lib.to_json(config_lib.load("experiments/shapes.py:smoke")))
    values["eval"]["metrics"] = ["tifa"]
    assert config_lib.from_json(json.dumps(values)).eval.metrics == ("tifa",)
    assert read(saved({"eval.metrics": ["digits", "tifa"]})).eval.metrics == ("digits", "shapes_tifa")


def test_reading_changes_nothing_of_a_config_of_this_version():
    values = json.loads(config_lib.to_json(config_lib.load("experiments/shapes.py:smoke")))
    before = json.dumps(values)
    assert renamed.upgrade(values) == values
    renamed.upgrade(saved())
    assert json.dumps(values) == before


@pytest.mark.parametrize("key", sorted(renamed.FIELDS))
def test_an_old_name_is_refused_elsewhere_with_the_new_one(key):
    message = f"--config.{key}=true: it is config.{renamed.FIELDS[key].key} now"
    with pytest.raises(UserError, match=re.escape(message)):
        config_lib.load("experiments/shapes.py:smoke", [f"--config.{key}=true"])


def test_new_names_are_fields():
    config = config_lib.load("experiments/shapes.py:smoke")
    known = {*config_lib.flatten(config), *config.to_dict()}
    assert {entry.key for entry in renamed.FIELDS.values()} <= known
    assert {entry.before for entry in renamed.VALUES.values()} <= known


def test_a_config_of_this_version_without_metrics_is_no_earlier_one():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.eval.metrics=()"])
    values = json.loads(config_lib.to_json(config))
    assert values["metrics"] == {}
    values["eval"]["metrics"] = ["tifa"]
    assert config_lib.from_json(json.dumps(values)).eval.metrics == ("tifa",)

"""Fields that name a part of a user's own, and the sections that its fields stand in."""

import sys

import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.config import schema
from scaling_dit.errors import UserError

PARTS = """
import dataclasses


@dataclasses.dataclass(frozen=True)
class First:
    power: float = 2.0
    shapes: tuple = (1, 2)
    label: str = "a"
    anything: object = None


def second(power=3.0, count=4):
    return power, count


def third(power="high", shapes=(5,)):
    return power, shapes
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_config_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_config_parts", None)


def resolve(*overrides, config=None):
    start = config_lib.defaults() if config is None else config
    return config_lib.resolve(start, [f"--config.{override}" for override in overrides])


def fails(message, *overrides, config=None):
    with pytest.raises(UserError, match=message) as error:
        resolve(*overrides, config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", schema.OWN_PARTS)
def test_every_field_that_takes_a_part_takes_its_fields(key):
    section = schema.OWN_PARTS[key].section
    config = resolve(f"{key}=own_config_parts:First", f"{section}.power=0.5", f"{section}.shapes=(7,)")
    assert config[section].to_dict() == {"power": 0.5, "shapes": (7,), "label": "a", "anything": None}
    assert config_lib.resolve(config_lib.from_json(config_lib.to_json(config))) == config
    assert config_lib.dump(config).count("power = 0.5\n") == 1


@pytest.mark.parametrize("key", schema.OWN_PARTS)
def test_a_built_in_part_has_no_fields(key):
    section = schema.OWN_PARTS[key].section
    assert schema.owner(section) == key and schema.owner(key) == ""
    assert resolve()[section].to_dict() == {}
    fails(f"the part that config.{key} names has no such field; it has none", f"{section}.power=1.0")


def test_another_part_has_its_own_defaults():
    first = resolve("diffusion.schedule=own_config_parts:First", "diffusion.schedule_fields.power=0.5")
    second = resolve("diffusion.schedule=own_config_parts:second", config=first)
    assert second.diffusion.schedule_fields.to_dict() == {"power": 3.0, "count": 4}
    third = resolve("diffusion.schedule=own_config_parts:third", config=first)
    assert third.diffusion.schedule_fields.to_dict() == {"power": "high", "shapes": (5,)}
    assert resolve("diffusion.schedule=linear", config=first).diffusion.schedule_fields.to_dict() == {}


def test_an_experiment_sets_them():
    config = config_lib.defaults()
    config.sample.sampler = "own_config_parts:second"
    config.sample.sampler_fields = ConfigDict({"count": 9})
    assert resolve(config=config).sample.sampler_fields.to_dict() == {"power": 3.0, "count": 9}
    assert resolve("sample.sampler_fields.power=1.5", config=config).sample.sampler_fields.count == 9
    config.sample.sampler_fields.cuont = 1
    fails(
        "config.sample.sampler_fields.cuont: the part .* has no such field; did you mean 'count'",
        config=config,
    )


def test_mistakes_are_one_line():
    own = "diffusion.weighting=own_config_parts:second"
    fails("no such field; did you mean 'power'", own, "diffusion.weighting_fields.powr=1.0")
    fails("config.diffusion.weighting_fields.count is 4 and must stay an integer", own,
          "diffusion.weighting_fields.count=a")  # fmt: skip
    fails("weighting 'own_config_parts:Frst': .* has no class or function 'Frst'; did you mean 'First'",
          "diffusion.weighting=own_config_parts:Frst")  # fmt: skip
    fails("no module 'nowhere' in .* or elsewhere on the Python path", "optim.name=nowhere:Name")
    fails("config.optim.name is 'adam'; did you mean 'adamw'", "optim.name=adam")
    fails("config.diffusion.schedule_fields", "diffusion.schedule_fields=3")


def test_a_run_is_resumed_with_the_same_parts_but_may_sample_with_others():
    saved = resolve("diffusion.schedule=own_config_parts:First", "sample.sampler=own_config_parts:second")
    other = resolve("diffusion.schedule_fields.power=9.0", config=saved)
    with pytest.raises(UserError, match="diffusion.schedule_fields.power is 2.0 there and 9.0 here"):
        config_lib.check_same_run(saved, other)
    config_lib.check_same_run(saved, resolve("sample.sampler_fields.count=2", config=saved))
    config_lib.check_same_run(saved, resolve("sample.sampler=ddim", config=saved))


def test_a_config_saved_before_there_were_parts_has_the_built_in_ones():
    before = config_lib.from_json(config_lib.to_json(resolve()))
    for key, part in schema.OWN_PARTS.items():
        section, _, field = part.section.rpartition(".")
        del before[section][field]
        if key in ("optim.name", "sample.guidance_method"):
            del before[section][key.rpartition(".")[2]]
    assert config_lib.dump(config_lib.resolve(before)) == config_lib.dump(resolve())

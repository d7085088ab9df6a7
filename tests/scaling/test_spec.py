"""A study file is read and checked before anything runs."""

import dataclasses
import json

import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.spec import StudySpec, point_steps
from tests.support import simulated_study

FILE = """
from scaling_dit import config as config_lib
from scaling_dit.scaling import ladder
from scaling_dit.scaling.spec import StudySpec
ARGUMENTS = ("two",)
def get_study(arg=""):
    config = config_lib.load("experiments/shapes.py:smoke")
    names = ("a", "b") if arg else ("a",)
    return StudySpec("Does it run?", tuple(ladder.derive(config, {}, name) for name in names))
"""


@pytest.fixture(scope="module")
def members():
    return simulated_study.members(2)


def made(chosen, **fields):
    return StudySpec(**{"question": "Is a better?", "members": chosen} | fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"question": " "}, "needs a question"),
        ({"members": ()}, "needs members"),
        ({"seeds": ()}, r"seeds is \(\); give at least one"),
        ({"seeds": (0, 0)}, "seeds 0 is there twice"),
        ({"seeds": (-1,)}, "whole number from 0"),
        ({"points": 0}, "points is 0"),
        ({"guidances": (0.5,)}, "guidance scales are 1 or more"),
        (
            {"claims": (Claim("c", "uvit-000", "pixrt-001"),)},
            "names member 'pixrt-001'; did you mean 'pixart-001'",
        ),
        ({"claims": (Claim("c", "uvit-000", "uvit-000"),)}, "compares uvit-000 with itself"),
        (
            {"claims": (Claim("c", "uvit-000", "pixart-001", metric="fid"),)},
            "no metric 'fid'; the study measures loss",
        ),
        ({"claims": (Claim("c", "uvit-000", "pixart-001"),), "seeds": (0,)}, "at least 2 training seeds"),
        ({"claims": (Claim("c", "uvit-000", "pixart-001"),), "metrics": ()}, 'give its claims metric="loss"'),
        ({"claims": (Claim("c", "uvit-000", "pixart-001"),) * 2}, "claim 'c' is there twice"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(members, fields, message):
    with pytest.raises(UserError, match=message):
        made(members, **fields)


def test_names_are_folders_and_one_of_a_kind(members):
    with pytest.raises(UserError, match="'a/b': a name has letters"):
        made((dataclasses.replace(members[0], name="a/b"),))
    other = config_lib.resolve(members[1].config, ["--config.eval.loss_images=32"])
    with pytest.raises(UserError, match="members differ in config.eval.loss_images"):
        made((members[0], dataclasses.replace(members[1], config=other)))
    with pytest.raises(UserError, match="member 'uvit-000' is there twice"):
        made((members[0], members[0]))


@pytest.mark.parametrize(
    "steps, points, expected",
    [(100, 4, [25, 50, 75, 100]), (10, 4, [3, 6, 9, 10]), (3, 5, [1, 2, 3]), (7, 1, [7])],
)
def test_points_are_spread_evenly_and_end_with_the_run(steps, points, expected):
    assert point_steps(steps, points) == expected


def test_a_run_has_its_seed_and_saves_at_the_points(members):
    spec = made(members, points=4)
    config = spec.run_config(members[0], 7)
    assert (
        config.seed == 7
        and config.eval.every == config.checkpoint.every == config.checkpoint.keep_every == 250
    )
    # Seeds of one member are one config, another batch or sampler is another.
    assert spec_lib.config_hash(config) == spec_lib.config_hash(members[0].config)
    for change in ("--config.batch=4", "--config.sample.guidance=3.0", "--config.eval.loss_images=32"):
        other = config_lib.resolve(members[0].config, [change])
        assert spec_lib.config_hash(other) != spec_lib.config_hash(members[0].config)


def test_a_spec_is_read_back_from_its_json(members):
    spec = made(
        members, claims=(Claim("c", "uvit-000", "pixart-001", 0.1, True, "loss"),), guidances=(1.0, 3.0)
    )
    read = spec_lib.from_json(json.loads(json.dumps(spec_lib.to_json(spec))))
    assert spec_lib.to_json(read)["members"][1]["hash"] == spec_lib.config_hash(members[1].config)
    assert read.claims == spec.claims and read.guidances == spec.guidances
    for one, other in zip(read.members, spec.members, strict=True):
        assert config_lib.dump(one.config) == config_lib.dump(other.config)
    with pytest.raises(UserError, match=r"study\.json is damaged"):
        spec_lib.from_json({"question": "?"})


def test_a_member_begins_from_one_before_it(members):
    stage = dataclasses.replace(members[0], name="stage", base="uvit-000")
    spec = made((*members, stage))
    read = spec_lib.from_json(json.loads(json.dumps(spec_lib.to_json(spec))))
    assert [member.base for member in read.members][-1] == "uvit-000"
    # The same config from nothing is another member.
    assert (
        spec_lib.member_hash(stage) != spec_lib.member_hash(members[0]) == spec_lib.config_hash(stage.config)
    )
    for wrong in ((stage, *members), (*members, dataclasses.replace(stage, base="stage"))):
        with pytest.raises(UserError, match="member 'stage' begins from '.*', which is no member before it"):
            made(wrong)


def test_a_file_gives_its_study(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert [member.name for member in spec_lib.load(f"{path}:two").members] == ["a", "b"]
    assert len(spec_lib.load(str(path)).members) == 1


@pytest.mark.parametrize(
    "text, place, message",
    [
        (FILE, "mine.py:three", "has no argument 'three'; known: two"),
        ("x = 1", "mine.py", r"has no get_study\(arg=''\) function"),
        ("def get_study():\n    return 3", "mine.py", "returned int; it must return a StudySpec"),
        ("def get_study():\n    return 1 / 0", "mine.py", "mine.py, line 2: ZeroDivisionError"),
        ("def get_study():\n    return 3", "mine.py:x", "takes no argument; leave out ':x'"),
        ("", "shapes_cor", "no study 'shapes_cor'; did you mean 'shapes_core'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, place, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        spec_lib.load(str(tmp_path / place) if place.startswith("mine") else place)
    assert "\n" not in str(error.value)

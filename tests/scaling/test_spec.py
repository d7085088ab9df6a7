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
        ({"question": 3}, "question is 3; give a text"),
        ({"metrics": "shapes_tifa"}, "metrics is 'shapes_tifa'; give a tuple of names, such as"),
        ({"metrics": (3,)}, "metrics holds 3; give a tuple of names"),
        ({"metrics": {"fid": 1}}, "metrics is a dict; give a tuple of names"),
        ({"items": 4.5}, "items is 4.5; give a whole number"),
        ({"items": True}, "items is True; give a whole number"),
        ({"points": 1.5}, "points is 1.5; give a whole number"),
        ({"points": "4"}, "points is '4'; give a whole number"),
        ({"seeds": 3}, "seeds is 3; give a tuple of whole numbers"),
        ({"seeds": (0.5,)}, "seeds holds 0.5; give a tuple of whole numbers"),
        ({"generation_seeds": (True,)}, "generation_seeds holds True"),
        ({"guidances": 3.0}, "guidances is 3.0; give a tuple of numbers"),
        ({"guidances": ("3",)}, "guidances holds '3'; give a tuple of numbers"),
        ({"guidances": (float("nan"),)}, "guidance scales are 1 or more"),
        ({"claims": ("a beats b",)}, "claims holds 'a beats b'; give a tuple of claims"),
        ({"members": ("uvit",)}, "members holds 'uvit'; give a tuple of members"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(members, fields, message):
    with pytest.raises(UserError, match=message):
        made(members, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": ""}, "a claim has the name ''; give what it claims"),
        ({"name": 5}, "a claim has the name 5; give what it claims"),
        ({"b": None}, "claim 'c': b is None; give a text"),
        ({"margin": "0.1"}, "claim 'c': margin is '0.1'; give a finite number"),
        ({"margin": float("nan")}, "claim 'c': margin is nan; give a finite number"),
        ({"margin": float("inf")}, "margin is inf"),
        ({"margin": True}, "margin is True"),
        ({"paired": 1}, "claim 'c': paired is 1; give True or False"),
        ({"metric": None}, "claim 'c': metric is None; give a text"),
    ],
)
def test_a_mistake_in_a_claim_is_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        Claim(**{"name": "c", "a": "x", "b": "y"} | fields)


def test_lists_are_taken_for_tuples(members):
    claims = [Claim("c", "uvit-000", "pixart-001")]
    spec = made(list(members), seeds=range(2), metrics=["fid"], claims=claims, guidances=[3])
    assert (spec.seeds, spec.metrics, spec.claims, spec.guidances) == ((0, 1), ("fid",), (claims[0],), (3,))
    assert spec.members == members and hash(spec.metrics)


@pytest.mark.parametrize(
    "field, value", [("config", {}), ("name", 3), ("base", None), ("groups", "x"), ("changes", 3)]
)
def test_a_member_of_other_types_is_one_line(members, field, value):
    with pytest.raises(UserError, match=f"its {field} is "):
        made((dataclasses.replace(members[0], **{field: value}),))


# What is right by chance.
RIGHT = (
    (("question",), "x"), (("generation_seeds",), [3]), (("guidances",), [3]), (("claims", 0, "name"), "x"),
)  # fmt: skip


def _damaged(saved, place, value):
    *path, last = place
    for key in path:
        saved = saved[key]
    saved[last] = value


@pytest.mark.parametrize("value", [None, "x", [3]])
@pytest.mark.parametrize(
    "place",
    [
        ("question",), ("members",), ("seeds",), ("metrics",), ("claims",), ("items",), ("points",),
        ("generation_seeds",), ("guidances",), ("members", 0), ("members", 0, "config"), ("members", 0, "name"),
        ("members", 0, "changes"), ("members", 0, "groups"), ("members", 0, "base"), ("claims", 0),
        ("claims", 0, "margin"), ("claims", 0, "name"), ("members", 0, "config", "steps"),
    ],
)  # fmt: skip
def test_a_damaged_study_file_is_one_line(saved, place, value):
    changed = json.loads(saved)
    _damaged(changed, place, value)
    if (place, value) in RIGHT:
        assert spec_lib.from_json(changed)
        return
    with pytest.raises(UserError, match=r"study\.json") as error:
        spec_lib.from_json(changed, "there/study.json")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(members):
    claims = (Claim("c", "uvit-000", "pixart-001"),)
    return json.dumps(spec_lib.to_json(made(members, claims=claims)))


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
    monkeypatch.setenv("STUDIES", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("$STUDIES/mine.py:two", "${STUDIES}/mine.py:two", "~/mine.py:two"):
        assert len(spec_lib.load(place).members) == 2


@pytest.mark.parametrize(
    "text, place, message",
    [
        (FILE, "mine.py:three", "has no argument 'three'; known: two"),
        ("x = 1", "mine.py", r"has no get_study\(arg=''\) function"),
        ("def get_study():\n    return 3", "mine.py", "returned int; it must return a StudySpec"),
        ("def get_study():\n    return 1 / 0", "mine.py", "mine.py, line 2: ZeroDivisionError"),
        ("def get_study():\n    return 3", "mine.py:x", "takes no argument; leave out ':x'"),
        ("def get_study():\n    return 3", "mine.py", "get_study of .*mine.py returned int"),
        ("", "shapes_cor", "no study 'shapes_cor'; did you mean 'shapes_core'"),
        ("", "a.b", "--config=a.b: not a study; give a name such as shapes_core, or path/to/file.py"),
        ("", "..", "--config=..: not a study; give a name"),
        ("", "", "--config=: not a study; give a name"),
        ("", "$NOPE_NONE/s.py", r"\$NOPE_NONE/s.py: the environment variable NOPE_NONE is not set"),
        ("", "~nobody_there/s.py", "there is no home folder of '~nobody_there'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, place, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        spec_lib.load(str(tmp_path / place) if place.startswith("mine") else place)
    assert "\n" not in str(error.value)

"""Sampling options that name a sampler or guidance of a user's own, with the fields of those parts."""

import json

import pytest
from ml_collections import ConfigDict

from scaling_dit import config
from scaling_dit.errors import UserError
from scaling_dit.sampling.options import SamplingOptions, tag


def settings(**changes):
    found = config.defaults().sample.unlock()
    found.update(changes)
    return found


OWN = {"sampler": "my:Ancestral", "sampler_fields": ConfigDict({"eta": 0.5, "rows": (1, 2)})}


def test_the_fields_come_from_the_config():
    options = SamplingOptions.of(settings(**OWN))
    assert options.sampler_fields == (("eta", 0.5), ("rows", (1, 2))) and options.guidance_method_fields == ()
    assert hash(options) == hash(SamplingOptions.of(settings(**OWN))) and options == SamplingOptions.of(
        settings(**OWN)
    )
    assert SamplingOptions.of(settings(**OWN), steps=3).sampler_fields == options.sampler_fields
    assert (
        SamplingOptions.of(settings(**OWN), sampler="my:Ancestral").sampler_fields == options.sampler_fields
    )


def test_another_part_has_its_own_defaults():
    assert SamplingOptions.of(settings(**OWN), sampler="ddim").sampler_fields == ()
    assert SamplingOptions.of(settings(**OWN), sampler="my:Other").sampler_fields == ()
    given = SamplingOptions.of(settings(**OWN), sampler="my:Other", sampler_fields={"order": [2, 3]})
    assert given.sampler_fields == (("order", (2, 3)),)
    with pytest.raises(UserError, match="sampler_fields is 3; it must be a mapping from fields to values"):
        SamplingOptions.of(settings(**OWN), sampler_fields=3)
    with pytest.raises(UserError, match="guidance_method is 'cgf'; did you mean 'cfg'"):
        SamplingOptions.of(settings(), guidance_method="cgf")


def test_manifests_and_folders_name_them_and_nothing_of_built_in_ones():
    about = SamplingOptions.of(settings(**OWN), guidance_method="my:Ramp").about
    assert about["sampler_fields"] == {"eta": 0.5, "rows": [1, 2]} and about["guidance_method"] == "my:Ramp"
    assert json.loads(json.dumps(about)) == about
    whole = tag({"step": 4, "ema": "none", **about}, seed=1)
    assert whole == "step4-emanone-my.Ancestral50-guidance7.5-guidance_methodmy.Ramp-eta0.5-rows1-2-seed1"
    assert set(SamplingOptions.of(settings()).about) == {"sampler", "steps", "guidance"}

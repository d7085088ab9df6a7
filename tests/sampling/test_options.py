"""The options of sampling: checked, and noted in manifests and folder names as before."""

import dataclasses
import json

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.cli.main import VERBS
from scaling_dit.cli.options import declared
from scaling_dit.diffusion import guidance, samplers
from scaling_dit.diffusion.sampling_fields import SamplingFields
from scaling_dit.errors import UserError
from scaling_dit.sampling.options import SamplingOptions, tag

NAMES = [field.name for field in dataclasses.fields(SamplingFields)]


def test_one_declaration_gives_the_config_the_flags_and_the_options():
    assert [name for name in config_lib.section("sample") if name != "ema"] == NAMES
    assert SamplingOptions.of(config_lib.defaults().sample) == SamplingOptions()
    for verb in ("sample", "evaluate"):
        flags = {one.name: one for one in declared(VERBS[verb])}
        for field in dataclasses.fields(SamplingFields):
            assert flags[field.name].help.startswith(field.metadata["declared"].doc)
            assert config_lib.defaults().sample[field.name] == field.default


def test_the_defaults_are_those_of_the_code_they_go_to():
    assert SamplingOptions().guidance_interval == guidance.EVERYWHERE
    choices = {field.name: field.metadata["declared"].choices for field in dataclasses.fields(SamplingFields)}
    assert set(choices["sampler"]) == set(samplers.SAMPLERS)
    doc = SamplingFields.__dataclass_fields__["sampler"].metadata["declared"].doc
    assert all(name in doc for name in samplers.SAMPLERS)


def test_values_have_the_types_of_the_defaults():
    made = SamplingOptions().replace(
        steps=np.int64(3), guidance=2, guidance_interval=[100, 900.0], batch=None
    )
    assert (made.steps, made.guidance, made.guidance_interval, made.batch) == (3, 2.0, (100, 900.0), 64)
    assert type(made.steps) is int and type(made.guidance) is float
    assert hash(made) == hash(SamplingOptions().replace(steps=3, guidance=2.0, guidance_interval=(100, 900)))


def test_what_is_not_changed_is_the_runs():
    run = config_lib.defaults().sample
    run.update({"steps": 7, "guidance": 2.0})
    made = SamplingOptions.of(run, steps=None, guidance=3.0)
    assert (made.steps, made.guidance) == (7, 3.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guidance_interval": (800.0, 200.0)},
            "guidance_interval is .* two timesteps .low, high. from 0 to 1000",
        ),
        ({"guidance_interval": (500.0,)}, "two timesteps"),
        ({"guidance_interval": 5}, "guidance_interval is 5; it must be two timesteps"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be from 0 to 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan; it must be from 0 to 1"),
        ({"guidance": -1.0}, "guidance is -1.0; it must be 0 or more"),
        ({"guidance": "high"}, "guidance is 'high'; it must be 0 or more"),
        ({"guidance": True}, "guidance is True"),
        ({"steps": 1000}, "steps is 1000; it must be from 1 to 999"),
        ({"steps": 2.5}, "steps is 2.5; it must be from 1 to 999"),
        ({"sampler": 3}, "sampler is 3; it must be a name"),
        ({"sampler": "ddmi"}, "sampler is 'ddmi'; did you mean 'ddim'"),
        ({"batch": 0}, "batch is 0; it must be from 1 to 2"),
        ({"guidence": 1.0}, "sampling has no option 'guidence'; did you mean 'guidance'"),
    ],
)
def test_a_mistake_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions.of(config_lib.defaults().sample, **changes)


@pytest.mark.parametrize(
    ("changes", "noted", "name"),
    [
        ({}, {}, ""),
        ({"batch": 3}, {}, ""),
        ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}, "-rescale0.7"),
        ({"guidance_interval": (0.0, 400.0)}, {"guidance_interval": [0.0, 400.0]}, "-interval0.0-400.0"),
        ({"guidance_interval": (0, 1000)}, {}, ""),
        (
            {"guidance_rescale": 1.0, "guidance_interval": (1.5, 400.0)},
            {"guidance_rescale": 1.0, "guidance_interval": [1.5, 400.0]},
            "-rescale1.0-interval1.5-400.0",
        ),
    ],
)
def test_manifests_and_folder_names_note_what_changes_images(changes, noted, name):
    about = SamplingOptions().replace(steps=2, guidance=40.0, **changes).about
    assert about == {"sampler": "ddim", "steps": 2, "guidance": 40.0} | noted
    # As a manifest's line gives it back.
    assert json.loads(json.dumps(about)) == about
    whole = {"step": 4, "ema": "none"} | about
    assert tag(whole, 0) == f"step4-emanone-ddim2-guidance40.0{name}-seed0"

"""docs/extending.md, "A sampling option": a copy of the package, changed as the page says, has it everywhere."""

import json
import shutil

import pytest

from tests.support import extending

# The option in the config, the flags, the sampler's options, a manifest's lines and a folder's name.
USE = """
import json
import shlex
from scaling_dit import config
from scaling_dit.cli.main import VERBS
from scaling_dit.sampling.options import SamplingOptions, tag

run = config.load("experiments/shapes.py:smoke", ["--config.sample.noise_scale=0.9"])
options = SamplingOptions.of(run.sample)
changed = options.replace(**VERBS["sample"].parse(shlex.split(COMMAND)[2:]).options)
about = {"step": 4, "ema": "none"} | changed.about
print("used", json.dumps([options.noise_scale, changed.about, tag(about, 0), SamplingOptions().about]))
"""
# Noise of scale 0 is the same for every prompt's number; of scale 1 it is not.
SAMPLE = """
import numpy as np
from scaling_dit import config
from scaling_dit.model.build import build_model, make_tokenizer
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler
import jax

run = config.load("experiments/shapes.py:smoke", ["--config.sample.steps=2", "--config.backbone.depth=1"])
model, mesh = build_model(run, make_tokenizer(run)), make_mesh(devices=jax.devices()[:1])
params, frozen = model.init(jax.random.key(0))
for scale in (0, 1):
    sampler = Sampler(model, mesh, SamplingOptions.of(run.sample, noise_scale=scale))
    first, second = sampler(params, frozen, ["a red circle"] * 2)
    print("drawn", "same" if (first == second).all() else "other")
"""


@pytest.fixture(scope="module")
def away(smoke_run, tmp_path_factory):
    """Where the command of the page is given."""
    folder = tmp_path_factory.mktemp("away")
    shutil.copytree(smoke_run, folder / "runs/shapes")
    return folder


@pytest.fixture(scope="module")
def copy(away, tmp_path_factory):
    """In its process all that the tests ask for."""

    def code(copy):
        (command,) = copy.commands
        return "\n".join((f"COMMAND = {command!r}", USE, SAMPLE, extending.typed([command], away)))

    made = extending.carry_out("A sampling option", tmp_path_factory.mktemp("copy"), code)
    assert made.code == 0, made.printed
    return made


def printed(copy, word):
    """What follows a word, on each line that begins with it."""
    return [line.partition(" ")[2] for line in copy.printed.splitlines() if line.startswith(f"{word} ")]


CHANGED = {"scaling_dit/diffusion/sampling_fields.py", "scaling_dit/sampling/sampler.py"}


def test_its_steps_touch_two_files(tmp_path):
    assert extending.carry_out("A sampling option", tmp_path, commands=False).touched == CHANGED


@pytest.mark.slow
def test_it_touches_two_files_and_the_page_of_fields(copy):
    assert copy.touched == CHANGED | {"docs/config.md"}


@pytest.mark.slow
def test_it_is_a_field_a_flag_and_noted_where_it_is_used(copy):
    (used,) = printed(copy, "used")
    of_run, about, name, plain = json.loads(used)
    assert of_run == 0.9
    assert about["noise_scale"] == 0.8 and "noise_scale" not in plain
    assert "-noise0.8-" in name
    assert "`sample.noise_scale`" in (copy.folder / "docs/config.md").read_text()


@pytest.mark.slow
def test_images_depend_on_it(copy):
    assert printed(copy, "drawn") == ["same", "other"]


@pytest.mark.slow
def test_the_command_of_the_page_runs(copy, away):
    assert list(away.rglob("*-noise0.8-*"))

"""docs/extending.md, "A sampling option": a copy of the package, changed as the page says, has it everywhere."""

import json
import re
import subprocess
import sys

import pytest

from tests.support import extending, page_edits

# The option in the config, the flags, the sampler's options, a manifest's lines and a folder's name.
USE = """
import json
from scaling_dit import config
from scaling_dit.cli.main import VERBS
from scaling_dit.sampling.options import SamplingOptions, tag

run = config.load("experiments/shapes.py:smoke", ["--config.sample.noise_scale=0.9"])
command = ["--workdir=w", "--noise_scale=0.8", "a red circle"]
options = SamplingOptions.of(run.sample)
changed = options.replace(**VERBS["sample"].parse(command).options)
about = {"step": 4, "ema": "none"} | changed.about
print(json.dumps([options.noise_scale, changed.about, tag(about, 0), SamplingOptions().about]))
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

run = config.load("experiments/shapes.py:smoke", ["--config.sample.steps=2"])
model, mesh = build_model(run, make_tokenizer(run)), make_mesh(devices=jax.devices()[:1])
params, frozen = model.init(jax.random.key(0))
for scale in (0, 1):
    sampler = Sampler(model, mesh, SamplingOptions.of(run.sample, noise_scale=scale))
    first, second = sampler(params, frozen, ["a red circle"] * 2)
    print("same" if (first == second).all() else "other")
"""


HEADING = "A sampling option"


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """(the copy, the files touched by hand)."""
    folder = page_edits.copy_repository(tmp_path_factory.mktemp("copy"))
    touched = page_edits.carry_out(HEADING, folder)
    (command,) = re.findall(r"```sh\n(.*)\n```", extending.section(HEADING))
    program, *arguments = command.split()
    assert program == "python"
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    return folder, touched


@pytest.fixture
def copy(carried_out):
    return carried_out[0]


def python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_touches_three_files(carried_out):
    folder, touched = carried_out
    assert touched == ["scaling_dit/diffusion/sampling_fields.py", "scaling_dit/sampling/sampler.py"]
    written = [
        path.name for path in (folder / "docs").rglob("*.md") if path.read_bytes() != same_here(path, folder)
    ]
    assert written == ["config.md"]


def same_here(path, folder):
    return (page_edits.ROOT / path.relative_to(folder)).read_bytes()


def test_it_is_a_field_a_flag_and_noted_where_it_is_used(copy):
    of_run, about, name, plain = json.loads(python(USE, copy))
    assert of_run == 0.9
    assert about["noise_scale"] == 0.8 and "noise_scale" not in plain
    assert "-noise0.8-" in name
    assert "`sample.noise_scale`" in (copy / "docs/config.md").read_text()


def test_images_depend_on_it(copy):
    assert python(SAMPLE, copy).split() == ["same", "other"]

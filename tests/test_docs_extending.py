"""docs/extending.md, carried out section by section in a copy of the repository; each touches at most three files."""

import os
import subprocess
import sys

import pytest

from tests.support.page_edits import carry_out, copy_repository
from tests.support.paths import ROOT

SAMPLER = """
import jax, jax.numpy as jnp, numpy as np
import scaling_dit
from scaling_dit import config
from scaling_dit.diffusion import contract, samplers
from scaling_dit.diffusion.schedules import make_schedule

assert scaling_dit.__file__.startswith({folder!r}), scaling_dit.__file__
assert config.load("shapes:smoke", ["--config.sample.sampler=ddpm"]).sample.sampler == "ddpm"
schedule = make_schedule("scaled_linear")
contract.check_sampler(samplers.SAMPLERS["ddpm"], schedule, 20, "ddpm")

# For data that are normal with mean 0.5 and deviation 0.1 the exact model is known, and so is what must come out.
def exact(noisy, times):
    alpha, sigma = schedule.alpha(times)[0], schedule.sigma(times)[0]
    return 0.5 + alpha * 0.01 * (noisy - alpha * 0.5) / (0.01 * alpha**2 + sigma**2)

noise = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))
made = samplers.sample(exact, noise, schedule, sampler="ddpm", steps=250, prediction="x0")
first = samplers.sample(exact, noise, schedule, sampler="ddim", steps=250, prediction="x0")
print(float(made.mean()), float(made.std()), float(jnp.corrcoef(made.ravel(), noise.ravel())[0, 1]),
      float(jnp.corrcoef(first.ravel(), noise.ravel())[0, 1]))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, and a function that runs code with it and returns what it prints."""
    folder = copy_repository(tmp_path)

    def run(code):
        environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        made = subprocess.run(
            [sys.executable, "-c", code.format(folder=str(folder))], cwd=folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return made.stdout

    return folder, run


@pytest.mark.slow
def test_a_sampler(copy):
    folder, run = copy
    files = carry_out("A sampler", folder)
    assert len(files) <= 3 and all((ROOT / file).exists() for file in files)
    mean, deviation, own, deterministic = map(float, run(SAMPLER).split())
    assert abs(mean - 0.5) < 0.01 and abs(deviation - 0.1) < 0.02
    # Fresh noise: what comes out is not a function of what went in, as with DDIM.
    assert abs(own) < 0.2 and deterministic > 0.8

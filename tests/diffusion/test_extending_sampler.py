"""A sampler added as docs/extending.md says: two files, and its samples have the right distribution."""

import pytest

from tests.support import extending

# For data that are normal with mean 0.5 and deviation 0.1 the exact model is known, and so is what must come out.
CHECK = """
import jax
import jax.numpy as jnp

from scaling_dit import config
from scaling_dit.diffusion import contract, samplers
from scaling_dit.diffusion.schedules import make_schedule

assert config.load("shapes:smoke", ["--config.sample.sampler=ddpm"]).sample.sampler == "ddpm"
schedule = make_schedule("scaled_linear")
contract.check_sampler(samplers.SAMPLERS["ddpm"], schedule, 20, "ddpm")


def exact(noisy, times):
    alpha, sigma = schedule.alpha(times)[0], schedule.sigma(times)[0]
    return 0.5 + alpha * 0.01 * (noisy - alpha * 0.5) / (0.01 * alpha**2 + sigma**2)


noise = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))
for name in ("ddpm", "ddim"):
    made = samplers.sample(exact, noise, schedule, sampler=name, steps=250, prediction="x0")
    print(made.mean(), made.std(), jnp.corrcoef(made.ravel(), noise.ravel())[0, 1])
"""


@pytest.mark.slow
def test_the_page_adds_a_sampler(tmp_path):
    small = (
        "--config.steps=2",
        "--config.eval.metrics=()",
        "--config.eval.grid=2",
        "--config.eval.loss_images=8",
        "--config.sample.steps=2",
        "--config.backbone.depth=1",
        "--config.log.tensorboard=false",
    )
    (tmp_path / "away").mkdir()

    def check_and_train(copy):
        assert len(copy.commands) == 1
        return f"{CHECK}\n{extending.typed(copy.commands, tmp_path / 'away', *small)}"

    copy = extending.carry_out("A sampler", tmp_path / "copy", check_and_train)
    assert copy.code == 0, copy.printed
    assert copy.touched == {
        "scaling_dit/diffusion/samplers.py",
        "scaling_dit/diffusion/sampling_fields.py",
        "docs/config.md",
    }
    ddpm, ddim = copy.printed.splitlines()[:2]
    mean, deviation, ours = map(float, ddpm.split())
    assert abs(mean - 0.5) < 0.01 and abs(deviation - 0.1) < 0.02
    # With fresh noise the samples do not depend on the initial noise alone, as they do with DDIM.
    assert abs(ours) < 0.2 < 0.8 < float(ddim.split()[2])
    assert (tmp_path / "away/runs/ddpm/checkpoints/2").is_dir()

"""The checks of a user's own parts: every built-in part passes, and each mistake is one line that names it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.diffusion import contract
from scaling_dit.diffusion.guidance import classifier_free
from scaling_dit.diffusion.predictions import PREDICTIONS, X0, V, find_prediction
from scaling_dit.diffusion.sampler_tables import ddim_table
from scaling_dit.diffusion.samplers import SAMPLERS
from scaling_dit.diffusion.schedules import SCHEDULES, RectifiedFlow, make_schedule
from scaling_dit.diffusion.time_sampling import sample_timesteps
from scaling_dit.diffusion.weightings import SPACES
from scaling_dit.errors import UserError

WHERE = "config.diffusion.schedule 'my:Part'"
VP, FLOW = make_schedule("scaled_linear"), make_schedule("flow")


def fails(message, check, *arguments):
    """The check refuses, in one line that begins with the part's name."""
    with pytest.raises(UserError, match=message) as error:
        check(*arguments, WHERE)
    assert str(error.value).startswith(WHERE) and "\n" not in str(error.value)


# Built-in parts


@pytest.mark.parametrize("name", SCHEDULES)
def test_built_in_schedules_pass(name):
    contract.check_schedule(make_schedule(name), WHERE)
    if name != "flow":
        contract.check_schedule(make_schedule(name, zero_snr=True), WHERE)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_built_in_predictions_pass(name):
    contract.check_prediction(find_prediction(name), WHERE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_built_in_samplers_pass(name):
    for schedule in (VP, FLOW):
        contract.check_sampler(SAMPLERS[name], schedule, 7, WHERE)


def test_built_in_guidance_and_time_samplings_pass():
    contract.check_guidance(classifier_free, WHERE)
    for name in ("uniform", "stratified", "logit_normal"):
        contract.check_time_sampling(
            lambda rng, batch, schedule, name=name: sample_timesteps(rng, batch, name, schedule), VP, WHERE
        )


# Schedules


@dataclasses.dataclass(frozen=True)
class Changed:
    """A flow schedule of which some parts are others."""

    changes: dict[str, Any]

    def __getattr__(self, name):
        changes = object.__getattribute__(self, "changes")
        if changes.get(name, "") is None:
            raise AttributeError(name)
        return changes[name] if name in changes else getattr(RectifiedFlow(), name)


def _raises(timesteps):
    raise ValueError("no\nsuch table")


def test_a_schedule_of_ones_own_passes():
    contract.check_schedule(Changed({}), WHERE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timesteps_of": None}, r"it has no method timesteps_of\(noise_to_signal\); it is a Changed"),
        ({"alpha": lambda: 1.0}, r"alpha has the call \(\); it must take \(timesteps\)"),
        ({"num_timesteps": 500}, "num_timesteps is 500; it must be 1000, which backbones expect"),
        ({"continuous": None}, "continuous is None; it must be of type bool"),
        ({"coefficients": _raises}, r"coefficients\(\) raised ValueError: no \(.*test_contract.py, line \d+\)"),
        ({"coefficients": lambda t: 1 - t / 1000}, r"returned a ndarray; it must return \(alpha, sigma\)"),
        ({"coefficients": lambda t: (t[:3], t)}, r"coefficients\(\) returned shape \(3,\) for timesteps of"),
        ({"coefficients": lambda t: (1 + t * 0, t / 10)}, r"sigma from 0 to 99.9; it must lie within \[0, 1\]"),
        ({"coefficients": lambda t: (t / 1000, 1 - t / 1000)}, "does not rise from timestep 0 to 1"),
        ({"coefficients": lambda t: (1 - t / 2000, t / 2000)}, "sigma is 0.4995 at timestep 999; .* at least 0.9"),
        ({"zero_terminal_snr": False}, "zero_terminal_snr is False, and alpha is 0 at timestep 1000"),
        ({"alpha": lambda t: 1 - t.mean() / 1000}, r"alpha\(\) returned shape \(\) for timesteps float32 of shape"),
        ({"sigma": lambda t: t // 1000}, r"sigma\(\) is 0.999 away from what coefficients\(\) gives"),
        ({"sigma": lambda t: (t / 1000).astype(jnp.bfloat16)}, "returned bfloat16 .*; it must return float32"),
        ({"timesteps_of": lambda r: 999 / (1 + r)}, r"timesteps_of\(\) gives 999 .* of timestep 0; .* the inverse"),
        ({"timesteps_of": lambda r: np.where(r > 9e3, np.inf, 1000 * r / (1 + r))}, r"within \[0, 1000\]"),
    ],
)  # fmt: skip
def test_mistakes_of_a_schedule(changes, message):
    fails(message, contract.check_schedule, Changed(changes))


def test_a_class_is_no_part():
    fails(
        "it has no method coefficients.*it is the class RectifiedFlow", contract.check_schedule, RectifiedFlow
    )


def test_options_of_built_in_schedules_are_refused_for_ones_own():
    own = f"{__name__}:RectifiedFlow"
    assert make_schedule(own, fields={"time_shift": 2.0}) == RectifiedFlow(2.0)
    with pytest.raises(UserError, match=r"zero_snr=True is for built-in schedules, not '.*:RectifiedFlow'"):
        make_schedule(own, zero_snr=True)
    with pytest.raises(UserError, match=r"time_shift=3.0 is for built-in schedules"):
        make_schedule(own, time_shift=3.0)


# Objectives


class Wrong(V):
    def __init__(self, **changes):
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "part, message",
    [
        (Wrong(needs_signal=1), "needs_signal is 1; it must be True if"),
        (Wrong(from_x0_eps=lambda x0, eps: x0), r"from_x0_eps has the call \(x0, eps\); it must take"),
        (Wrong(from_x0_eps=lambda x0, eps, a, s: x0[..., :1]), r"from_x0_eps\(\) returned shape \(4, 3, 3, 1\)"),
        (Wrong(to_x0_eps=lambda v, n, a, s: n - v), r"returned a .*; it must return \(x0, eps\)"),
        (Wrong(to_x0_eps=X0().to_x0_eps), "away from the x0 it was given; each must be the inverse"),
    ],
)  # fmt: skip
def test_mistakes_of_a_prediction(part, message):
    fails(message, contract.check_prediction, part)


class Weigh:
    space: ClassVar[str] = "x0"

    def __init__(self, call, space="x0"):
        self.call, self.space = call, space

    def __call__(self, alpha, sigma, timesteps):
        return self.call(alpha, sigma, timesteps)


@pytest.mark.parametrize(
    "part, message",
    [
        (Weigh(lambda a, s, t: a, space="snr"), "space is 'snr'; it must name .*: prediction, eps, x0, v, flow"),
        (lambda alpha, sigma: alpha, r"call \(alpha, sigma\); it must take \(alpha, sigma, timesteps\)"),
        (Weigh(lambda a, s, t: a.mean()), r"the call returned shape \(\) for alpha of shape \(4,\)"),
        (Weigh(lambda a, s, t: 1 / (1 - a)), "a value that is not finite for alpha"),
        (Weigh(lambda a, s, t: a - s), "they must be 0 or more, and not all 0"),
        (Weigh(lambda a, s, t: 0 * a), "they must be 0 or more, and not all 0"),
    ],
)  # fmt: skip
def test_mistakes_of_a_weighting(part, message):
    with pytest.raises(UserError, match=message):
        contract.check_weighting(part, SPACES, WHERE)


@pytest.mark.parametrize(
    "part, message",
    [
        (lambda rng: rng, r"it must take \(rng, batch, schedule\)"),
        (lambda rng, batch, schedule: jax.random.uniform(rng, ()), r"returned shape \(\) for batch 16"),
        (lambda rng, batch, schedule: 2e3 * jax.random.uniform(rng, (batch,)), r"must lie within \[0, 1000\)"),
        (lambda rng, batch, schedule: jnp.arange(float(batch)), "the same timesteps for two keys"),
        (lambda rng, batch, schedule: np.random.default_rng(0).uniform(size=batch), "a ndarray|the same timesteps"),
    ],
)  # fmt: skip
def test_mistakes_of_a_time_sampling(part, message):
    with pytest.raises(UserError, match=message):
        contract.check_time_sampling(part, VP, WHERE)


# Samplers and guidance


class Sampling:
    """DDIM of which some parts are others."""

    def __init__(self, **changes):
        for name, value in changes.items():
            setattr(self, name, value)

    def table(self, schedule, steps):
        return ddim_table(schedule, steps)

    def init(self, noise, keys):
        return keys

    def step(self, denoise, latents, carry, row):
        x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
        return row.alpha_next * x0 + row.sigma_next * eps, carry


def _one_key(denoise, latents, keys, row):
    after, keys = Sampling().step(denoise, latents, keys, row)
    return after + 0.01 * jax.random.normal(keys[0], latents.shape), keys


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init": lambda noise: ()}, r"init has the call \(noise\); it must take \(noise, keys\)"),
        ({"table": lambda schedule, steps: ()}, r"table\(\) returned columns of shapes \[\]"),
        ({"table": lambda s, steps: (np.ones(steps), np.ones(2))}, "each must have one entry a step"),
        ({"table": lambda s, steps: np.full(steps, np.inf)}, "an entry that is not finite, for 6 steps"),
        ({"step": lambda d, x, c, row: x}, r"step\(\) returned a .*; it must return \(latents, carry\)"),
        ({"step": lambda d, x, c, row: (x[..., :1], c)}, r"step\(\) was given latents of .* shape and dtype must"),
        ({"step": lambda d, x, c, row: (x, (c, c))}, r"step\(\) was given carry of"),
        ({"step": lambda d, x, c, row: (x / row, c)}, r"init\(\) and step\(\) raised TypeError"),
        ({"step": lambda d, x, c, row: (x - x.mean(), c)}, "changes row 0 by .* each image must depend on its own"),
        ({"step": _one_key}, "changes a row by .* draw the noise of each row from its own of the keys"),
        ({"step": lambda d, x, c, row: (0.9 * x, c)}, "sure of the clean latents 0.5, 6 steps end .* away"),
    ],
)  # fmt: skip
def test_mistakes_of_a_sampler(changes, message):
    fails(message, contract.check_sampler, Sampling(**changes), VP, 6)


def test_a_sampler_of_ones_own_passes():
    contract.check_sampler(Sampling(), VP, 6, WHERE)


@pytest.mark.parametrize(
    "part, message",
    [
        (lambda positive, negative, scale: negative, "it must take .positive, negative, latents, timesteps, scale."),
        (lambda p, n, x, t, scale: (p - n)[..., 0], r"returned shape \(4, 3, 3\) for predictions of shape"),
        (lambda p, n, x, t, scale: (p * scale).astype(jnp.bfloat16), "returned bfloat16"),
        (lambda p, n, x, t, scale: n + scale * (p - n) / jnp.std(p - n), "changes row 0 by"),
    ],
)  # fmt: skip
def test_mistakes_of_a_guidance(part, message):
    fails(message, contract.check_guidance, part)

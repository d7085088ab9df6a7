"""The samplers of published pipelines against their diffusers schedulers, latents for latents, from the same noise.

The model is a closed form of latents and time. Every scheduler is read back as `import` reads it.
"""

import functools
import importlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scaling_dit.diffusion import samplers
from scaling_dit.diffusion.predictions import to_x0_eps
from scaling_dit.diffusion.schedules import make_schedule
from scaling_dit.errors import UserError
from scaling_dit.interop.diffusers import schedulers

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PIXART = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **TRAILING, **V}
CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
NO_CLIP = {"clip_sample": False}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}
BETA = {"use_beta_sigmas": True}
MIN = {"final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
OLD = {"algorithm_type": "dpmsolver", **MIN}
OLD_SDE = {"algorithm_type": "sde-dpmsolver", **MIN}
CASES = {
    "DDIMScheduler": [
        SD, SD | NO_CLIP, SD | NO_CLIP | LEADING | {"set_alpha_to_one": False}, SD | NO_CLIP | LEADING,
        SD | CLIP | V,
        SD | THRESHOLD, SD | NO_CLIP | TRAILING, SD | NO_CLIP | LINSPACE, PIXART | NO_CLIP | X0,
        SD | NO_CLIP | ZERO_SNR,
    ],
    "DDIMParallelScheduler": [SD | NO_CLIP | LEADING],
    "DDPMScheduler": [
        SD, SD | NO_CLIP | LEADING, SD | CLIP | V, SD | THRESHOLD, SD | NO_CLIP | TRAILING, SD | NO_CLIP | LINSPACE,
        SD | NO_CLIP | {"variance_type": "fixed_large"}, SD | NO_CLIP | {"variance_type": "fixed_small_log"},
        PIXART | NO_CLIP | X0, SD | NO_CLIP | ZERO_SNR,
    ],
    "DDPMParallelScheduler": [SD | NO_CLIP],
    "PNDMScheduler": [
        SD | {"skip_prk_steps": True} | more
        for more in ({}, LEADING, LEADING | {"set_alpha_to_one": True}, TRAILING, LINSPACE, LEADING | V)
    ],
    "EulerDiscreteScheduler": [
        SD, SD | LEADING, SD | TRAILING, SD | {"timestep_spacing": "leading"}, SD | KARRAS, SD | LEADING | KARRAS | V,
        SD | EXPONENTIAL, SD | BETA, SD | MIN, SD | LEADING | KARRAS | {"sigma_min": 0.1, "sigma_max": 9.0},
        SD | X0 | LEADING, SD | ZERO_SNR, PIXART | V,
    ],
    "EulerAncestralDiscreteScheduler": [SD, SD | LEADING, SD | TRAILING | V, SD | ZERO_SNR],
    "HeunDiscreteScheduler": [
        SD, SD | LEADING, SD | TRAILING, SD | KARRAS, SD | EXPONENTIAL | V, SD | LEADING | CLIP, SD | LEADING | X0,
    ],
    "DPMSolverMultistepScheduler": [
        SD | more
        for more in (
            {}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}, KARRAS, KARRAS | {"solver_order": 3},
            {"use_lu_lambdas": True}, EXPONENTIAL, BETA, LEADING, TRAILING, ZERO_SNR, V, X0, THRESHOLD, MIN, SDE,
            SDE | {"solver_order": 3}, SDE | KARRAS, SDE | {"solver_type": "heun"}, OLD, OLD | {"solver_order": 3},
            OLD | {"solver_type": "heun"}, OLD | THRESHOLD, OLD_SDE, OLD_SDE | {"solver_type": "heun"},
            {"lower_order_final": False, **MIN, "solver_order": 3}, {"euler_at_final": True, **MIN},
            COSINE | {"lambda_min_clipped": -5.1},
        )
    ],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchHeunDiscreteScheduler": [{"shift": 3.0}],
}  # fmt: skip
LISTED = [(name, case) for name, cases in CASES.items() for case in cases]
NOISE = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
KEYS = jax.vmap(jax.random.key)(jnp.arange(len(NOISE)))


@functools.cache
def fresh(number):
    """What a sampler adds at step `number`, from the keys of the rows."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(KEYS)
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, NOISE.shape[1:]))(keys))


def theirs(scheduler, steps, monkeypatch):
    """Timesteps and final latents of diffusers, sampled as its pipelines do."""
    numbers = iter(range(10_000))
    module = importlib.import_module(type(scheduler).__module__)
    draw = lambda *args, **kwargs: torch.tensor(fresh(next(numbers)))  # noqa: E731
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(steps)
    x = torch.tensor(NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    seen = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen.append(float(t))
        x = scheduler.step(0.3 * scaled + 0.1 * torch.sin(3 * scaled + seen[-1] / 100), t, x).prev_sample
    end = getattr(scheduler, "sigmas", torch.zeros(1))[-1] if "Flow" not in type(scheduler).__name__ else 0.0
    in_ratio = type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
    return seen, (x / ((end**2 + 1) ** 0.5 if in_ratio else 1.0)).numpy()


def ours(described, steps):
    """Timesteps and final latents of the sampler and schedule that the scheduler's config becomes."""
    diffusion, options = schedulers.read(described, "here")
    schedule = make_schedule(
        diffusion["schedule"], zero_snr=diffusion["zero_snr"], time_shift=diffusion.get("time_shift", 1.0)
    )
    sampler = samplers.create_sampler(options["sampler"], options.get("sampler_fields", {}), schedule, steps)
    seen = []

    def denoise(latents, timestep, alpha, sigma):
        seen.append(float(timestep))
        value = 0.3 * latents + 0.1 * jnp.sin(3 * latents + timestep / 100)
        return to_x0_eps(diffusion["prediction"], value, latents, alpha, sigma)

    rows = jax.tree.map(lambda column: np.asarray(column, np.float32), sampler.table(schedule, steps))
    latents, carry = jnp.asarray(NOISE), sampler.init(jnp.asarray(NOISE), KEYS)
    for i in range(len(rows.timesteps)):
        row = jax.tree.map(lambda column, i=i: column[i], rows)
        latents, carry = sampler.step(denoise, latents, carry, row)
    return seen, np.asarray(latents)


def check(name, settings, steps, monkeypatch):
    scheduler = getattr(diffusers, name)(**settings)
    their_times, expected = theirs(scheduler, steps, monkeypatch)
    our_times, found = ours(dict(scheduler.config) | {"_class_name": name}, steps)
    # diffusers cuts the times of these curves to whole numbers, where rounding errors decide.
    cut = name == "DPMSolverMultistepScheduler" and settings.keys() & {*EXPONENTIAL, *BETA}
    np.testing.assert_allclose(our_times[: len(their_times)], their_times, atol=1.0 if cut else 2e-2)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"), LISTED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(LISTED)]
)
def test_latents_equal_diffusers(name, settings, monkeypatch):
    check(name, settings, 5, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), LISTED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(LISTED)]
)
def test_latents_of_more_steps_equal_diffusers(name, settings, monkeypatch):
    for steps in (1, 2, 16, 30):
        check(name, settings, steps, monkeypatch)


@pytest.mark.parametrize(
    ("sampler", "fields", "line"),
    [
        ("Ddim", {"timestep_spacing": "middle"}, "timestep_spacing is 'middle'; it must be one of leading"),
        ("DpmSolver", {"solver_order": 4}, "solver_order is 4; it must be one of 1, 2, 3"),
        ("DpmSolver", {"algorithm_type": "dpmsolver"}, "needs final_sigmas_type sigma_min"),
        (
            "Euler",
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas",
        ),
        ("Heun", {"order": 2}, "has no field 'order'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(sampler, fields, line):
    name = f"scaling_dit.diffusion.published_samplers:{sampler}"
    with pytest.raises(UserError, match=line):
        samplers.create_sampler(name, fields, make_schedule("linear"), 20)
    with pytest.raises(UserError, match="needs a schedule that preserves variance"):
        samplers.create_sampler(name.replace(sampler, "Euler"), {}, make_schedule("flow"), 20)

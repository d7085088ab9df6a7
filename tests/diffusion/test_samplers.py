"""Every sampler against diffusers on an analytic model, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from scaling_dit.diffusion.samplers import SAMPLERS, check_strength, make_denoise, sample
from scaling_dit.diffusion.schedules import VariancePreserving, make_schedule
from scaling_dit.errors import UserError

KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = functools.partial(DDIMScheduler, clip_sample=False, set_alpha_to_one=False)
REFERENCES = {
    "ddim": functools.partial(DDIM, **LEADING),
    "euler": functools.partial(EulerDiscreteScheduler, **LEADING),
    "heun": functools.partial(HeunDiscreteScheduler, **LEADING),
    "dpmpp_2m": functools.partial(DPMSolverMultistepScheduler, timestep_spacing="linspace"),
}
FLOW_REFERENCES = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    "dpmpp_2m": lambda shift: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ),
}
STEPS = [10, 20, 50]
NOISE = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
VP = make_schedule("scaled_linear")


def model(x, t):
    """A smooth function of latents and time, in jax."""
    return 0.3 * x + 0.1 * jnp.sin(3 * x + t[:, None, None, None] / 100)


def reference_trajectory(scheduler, steps, clip=False, dtype=torch.float32):
    """Timesteps the model saw, and the latents after each whole step, in the scale of the schedule."""
    scheduler.set_timesteps(steps)
    sigma_form = isinstance(scheduler, EulerDiscreteScheduler | HeunDiscreteScheduler)

    def scale(index):
        return (scheduler.sigmas[index] ** 2 + 1) ** 0.5 if sigma_form else 1.0

    x, seen, trajectory = torch.tensor(NOISE, dtype=dtype) * scale(0), [], []
    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        # The flow form of DPM-Solver++ cuts its timesteps to integers, which its model would not want.
        flow = getattr(scheduler.config, "use_flow_sigmas", False)
        seen.append(float(scheduler.sigmas[index] * 1000 if flow else t))
        output = 0.3 * scaled + 0.1 * torch.sin(3 * scaled + seen[-1] / 100)
        options = {"use_clipped_model_output": clip} if isinstance(scheduler, DDIMScheduler) else {}
        x = scheduler.step(output, t, x, **options).prev_sample
        # The first of Heun's two calls ends no step, but for the last step, which has no second one.
        if getattr(scheduler, "state_in_first_order", True) or index + 1 == len(scheduler.timesteps):
            trajectory.append((x / scale(index + 1)).numpy())
    return np.array(seen), np.stack(trajectory)


@functools.cache
def one_step(sampler, prediction, clip):
    """The jitted step (latents, carry, row) -> (latents, carry), which is one for any schedule and number of steps."""
    denoise = make_denoise(model, prediction=prediction, clip=clip)
    return jax.jit(lambda *held: SAMPLERS[sampler].step(denoise, *held))


@functools.cache
def start_of(sampler):
    keys = jax.vmap(jax.random.key)(jnp.arange(len(NOISE)))
    return jnp.asarray(NOISE), SAMPLERS[sampler].init(jnp.asarray(NOISE), keys)


def our_trajectory(schedule, sampler, steps, prediction, clip=False):
    """Every latent on the way, from the same table and step that `sample` scans."""
    table = SAMPLERS[sampler].table(schedule, steps)
    rows = jax.tree.map(lambda column: np.asarray(column, np.float32), table)
    step, held, trajectory = one_step(sampler, prediction, clip), start_of(sampler), []
    for i in range(steps):
        held = step(*held, jax.tree.map(lambda column, i=i: column[i], rows))
        trajectory.append(held[0])
    seen = table.timesteps
    if sampler == "heun":
        seen = np.stack([table.timesteps, table.timesteps_next], axis=1).ravel()[:-1]
    return seen, np.asarray(trajectory)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectory_equals_diffusers(sampler, steps, prediction):
    scheduler = REFERENCES[sampler](**SCALED_LINEAR, prediction_type=KINDS[prediction])
    expected_times, expected = reference_trajectory(scheduler, steps)
    times, trajectory = our_trajectory(VP, sampler, steps, prediction)
    np.testing.assert_array_equal(times, expected_times)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_with_zero_terminal_snr_equals_diffusers(steps, prediction):
    scheduler = DDIM(
        **SCALED_LINEAR,
        prediction_type=KINDS[prediction],
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    expected_times, expected = reference_trajectory(scheduler, steps)
    schedule = make_schedule("scaled_linear", zero_snr=True)
    times, trajectory = our_trajectory(schedule, "ddim", steps, prediction)
    np.testing.assert_array_equal(times, expected_times)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


class AlmostZero(VariancePreserving):
    """Zero terminal SNR as diffusers' sigma forms have it: a signal of 2^-12 stays, so that sigma / alpha is finite."""

    zero_terminal_snr = True


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_sigma_form_with_zero_terminal_snr_equals_diffusers(sampler, prediction):
    scheduler = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[sampler](
        **SCALED_LINEAR,
        prediction_type=KINDS[prediction],
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    expected_times, expected = reference_trajectory(scheduler, 20)
    zero = make_schedule("scaled_linear", zero_snr=True)
    almost = AlmostZero(np.append(zero.alphas_cumprod[:-1], 2.0**-24))
    times, trajectory = our_trajectory(almost, sampler, 20, prediction)
    np.testing.assert_array_equal(times, expected_times)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=5e-5)
    # Ours has no signal at all there, which is as near as the signal they keep is small.
    times, trajectory = our_trajectory(zero, sampler, 20, prediction)
    np.testing.assert_array_equal(times, expected_times)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", FLOW_REFERENCES)
def test_flow_trajectory_equals_diffusers(sampler, steps, shift):
    expected_times, expected = reference_trajectory(FLOW_REFERENCES[sampler](shift), steps)
    times, trajectory = our_trajectory(make_schedule("flow", time_shift=shift), sampler, steps, "flow")
    np.testing.assert_allclose(times, expected_times, rtol=2e-6)
    # What a backbone may see; the reference starts at 1000.
    assert times.max() < 1000
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


def test_flow_with_ddim_is_euler_at_equal_steps():
    schedule = make_schedule("flow", time_shift=2.0)
    table = SAMPLERS["ddim"].table(schedule, 4)
    shares = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(table.sigma, 2 * shares / (1 + shares))
    np.testing.assert_allclose(table.sigma_next, [*table.sigma[1:], 0.0])
    x = jnp.asarray(NOISE)
    for s, s_next in zip(table.sigma, table.sigma_next, strict=True):
        x = x + (s_next - s) * model(x, jnp.full(2, min(1000 * s, 999.99994)))
    final = sample(model, jnp.asarray(NOISE), schedule, sampler="ddim", steps=4, prediction="flow")
    np.testing.assert_allclose(final, x, atol=2e-6)


def test_sample_ends_where_the_trajectory_does():
    for sampler in SAMPLERS:
        _, trajectory = our_trajectory(VP, sampler, 20, "v")
        final = sample(model, jnp.asarray(NOISE), VP, sampler=sampler, steps=20, prediction="v")
        np.testing.assert_allclose(final, trajectory[-1], rtol=0, atol=1e-6)


def test_clipped_trajectory_equals_diffusers():
    scheduler = functools.partial(REFERENCES["ddim"], **SCALED_LINEAR)
    _, expected = reference_trajectory(scheduler(clip_sample=True), 20, clip=True)
    _, free = reference_trajectory(scheduler(), 20)
    assert np.abs(expected[-1] - free[-1]).max() > 0.1
    _, trajectory = our_trajectory(VP, "ddim", 20, "eps", clip=True)
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


def test_clipped_heun_equals_diffusers():
    scheduler = REFERENCES["heun"](**SCALED_LINEAR, clip_sample=True)
    _, expected = reference_trajectory(scheduler, 20)
    _, trajectory = our_trajectory(VP, "heun", 20, "eps", clip=True)
    assert np.abs(expected[-1]).max() <= 1.0
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


def test_cosine_trajectory_of_a_clean_prediction_equals_diffusers():
    # In float64: with so little noise near t = 0, float32 costs the reference two digits of 1 - alpha_bar.
    scheduler = REFERENCES["ddim"](beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    _, expected = reference_trajectory(scheduler, 20, dtype=torch.float64)
    _, trajectory = our_trajectory(make_schedule("cosine"), "ddim", 20, "x0")
    np.testing.assert_allclose(trajectory, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 7, 30, 600, 999])
def test_timesteps_equal_diffusers_where_steps_do_not_divide(steps, sampler):
    scheduler = REFERENCES[sampler](**SCALED_LINEAR)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.numpy()
    if sampler == "heun":
        expected = np.append(expected[:1], expected[1::2])
    np.testing.assert_array_equal(SAMPLERS[sampler].table(VP, steps).timesteps, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["scaled_linear", "zero", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 30, 999])
def test_tables_are_finite_and_lead_to_the_data(sampler, name, steps):
    schedule = make_schedule("cosine", zero_snr=True) if name == "zero" else make_schedule(name)
    table = SAMPLERS[sampler].table(schedule, steps)
    assert all(
        column.dtype == np.float64 and column.shape == (steps,) and np.isfinite(column).all()
        for column in table
    )
    np.testing.assert_array_equal(table.alpha_next[:-1], table.alpha[1:])
    np.testing.assert_array_equal(table.timesteps_next[:-1], table.timesteps[1:])
    assert (np.diff(table.timesteps) < 0).all() and (np.diff(table.alpha) > 0).all()
    assert (table.timesteps >= 0).all() and (table.timesteps < 1000).all()
    assert table.correction[-1] == 0
    if schedule.zero_terminal_snr and sampler != "dpmpp_2m":
        assert table.alpha[0] == 0
    if sampler == "ddim" and name == "scaled_linear":
        np.testing.assert_allclose(table.alpha_next[-1] ** 2, schedule.alphas_cumprod[0])
    elif sampler != "ddim":
        assert (table.alpha_next[-1], table.sigma_next[-1]) == (1, 0)


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_orders_of_convergence(name):
    """The data are one Gaussian, so the best x0 is known and so is the end of the exact trajectory."""
    spread, schedule = 0.5, make_schedule(name)

    def best_x0(x, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        return x * alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)

    errors = {}
    for sampler in ("euler", "heun", "dpmpp_2m"):
        for steps in (20, 40):
            table = SAMPLERS[sampler].table(schedule, steps)
            # Latents keep their quantile, so the standard deviation at the start gives the factor to the end.
            exact = NOISE * spread / np.sqrt((table.alpha[0] * spread) ** 2 + table.sigma[0] ** 2)
            final = sample(
                best_x0, jnp.asarray(NOISE), schedule, sampler=sampler, steps=steps, prediction="x0"
            )
            errors[sampler, steps] = np.abs(final - exact).max()
    assert 1.6 < errors["euler", 20] / errors["euler", 40] < 2.4
    assert errors["heun", 20] / errors["heun", 40] > 3.5
    assert errors["heun", 20] < errors["euler", 20] / 10
    # Its last step, of first order, is what remains.
    assert errors["dpmpp_2m", 40] < errors["euler", 40]


def test_heun_calls_the_model_twice_but_in_its_last_step():
    calls = []

    def counting(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return model(x, t)

    for schedule, first_order in (
        (VP, 1),
        (make_schedule("flow"), 1),
        (make_schedule("linear", zero_snr=True), 2),
    ):
        calls.clear()
        jax.block_until_ready(
            jax.jit(lambda n: sample(counting, n, schedule, sampler="heun", steps=5, prediction="v"))(NOISE)  # noqa: B023
        )
        jax.effects_barrier()
        assert len(calls) == 2 * 5 - first_order


def test_a_perfect_model_ends_at_the_data():
    data = jnp.tanh(jnp.asarray(NOISE[::-1]))
    for sampler in SAMPLERS:
        final = sample(
            lambda x, t: data,
            jnp.asarray(NOISE),
            make_schedule("cosine"),
            sampler=sampler,
            steps=10,
            prediction="x0",
        )
        # What is left is the noise of timestep 0, where DDIM's last step ends.
        np.testing.assert_allclose(final, data, atol=0.05 if sampler == "ddim" else 1e-6)


def test_predictions_use_the_first_channels_and_see_a_time_per_row():
    seen = []

    def wide(x, t):
        seen.append((t.shape, t.dtype))
        output = model(x, t).astype(jnp.bfloat16)
        return jnp.concatenate([output, jnp.full_like(output, jnp.nan)], axis=-1)

    final = sample(wide, jnp.asarray(NOISE), VP, steps=5)
    # Traced once, whatever the number of steps.
    assert seen == [((2,), jnp.float32)]
    assert final.dtype == jnp.float32
    assert bool(jnp.isfinite(final).all())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mistakes_are_told_in_one_line(sampler):
    for steps in (0, 1000):
        with pytest.raises(UserError, match=f"sample.steps={steps}: {sampler} needs 1 to 999 steps"):
            sample(model, jnp.asarray(NOISE), VP, sampler=sampler, steps=steps)
    with pytest.raises(UserError, match=f"did you mean '{sampler}'"):
        sample(model, jnp.asarray(NOISE), VP, sampler=sampler[:-1])
    with pytest.raises(UserError, match="did you mean 'eps'"):
        sample(model, jnp.asarray(NOISE), VP, sampler=sampler, prediction="epsi")
    with pytest.raises(UserError, match="'eps' does not determine the latents"):
        sample(model, jnp.asarray(NOISE), make_schedule("linear", zero_snr=True), sampler=sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_strength_below_one_is_what_diffusers_image_to_image_does(sampler):
    """Its pipelines skip steps - int(steps * strength), and noise the latents to the first timestep left."""
    image, steps, strength = np.tanh(2 * NOISE[::-1].copy()), 20, 0.58
    scheduler = REFERENCES[sampler](**SCALED_LINEAR)
    scheduler.set_timesteps(steps)
    first = (steps - int(steps * strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    times = scheduler.timesteps[first:]
    x = scheduler.add_noise(torch.tensor(image), torch.tensor(NOISE), times[:1].repeat(2))
    for t in times:
        scaled = scheduler.scale_model_input(x, t)
        output = 0.3 * scaled + 0.1 * torch.sin(3 * scaled + float(t) / 100)
        x = scheduler.step(output, t, x).prev_sample
    found = sample(
        model,
        jnp.asarray(NOISE),
        VP,
        sampler=sampler,
        steps=steps,
        image=jnp.asarray(image),
        strength=strength,
    )
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=2e-5)


def test_strength_is_refused_where_it_cannot_be():
    noise = jnp.asarray(NOISE)
    with pytest.raises(UserError, match="strength is 0.5: give the image to start from"):
        sample(model, noise, VP, strength=0.5)
    with pytest.raises(UserError, match="strength is 0.1: of 5 steps it leaves none"):
        sample(model, noise, VP, steps=5, strength=0.1, image=noise)
    with pytest.raises(UserError, match="sampler 'my:Own' cannot begin in the middle; choose one of ddim, "):
        check_strength("my:Own", 50, 0.5)
    # 0.58 of 50 is 29 although its product in floating point is less.
    assert check_strength("ddim", 50, 0.58) == 29
    assert check_strength("my:Own", 50, 1.0) == 50


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_clean_latents_are_what_sampling_ends_at(sampler):
    where = jnp.asarray(NOISE[..., :1] > 0)
    clean = jnp.tanh(jnp.asarray(NOISE[::-1]))
    found = sample(model, jnp.asarray(NOISE), VP, sampler=sampler, steps=10, known=(clean, where))
    held = np.broadcast_to(where, clean.shape)
    # What is left is the noise of timestep 0, where DDIM's last step ends.
    atol = 0.1 if sampler == "ddim" else 1e-5
    np.testing.assert_allclose(found[held], clean[held], atol=atol)
    free = sample(model, jnp.asarray(NOISE), VP, sampler=sampler, steps=10)
    np.testing.assert_allclose(found[~held], free[~held], atol=1e-5)

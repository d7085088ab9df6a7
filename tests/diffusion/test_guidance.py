"""Classifier-free guidance: formula, number of calls, forms of the negative condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from scaling_dit.diffusion.guidance import guided, rescaled
from scaling_dit.diffusion.samplers import sample
from scaling_dit.diffusion.schedules import make_schedule

RNG = np.random.default_rng(0)
LATENTS = jnp.asarray(RNG.normal(size=(3, 2, 2, 4)).astype(np.float32))
TIMES = jnp.array([1.0, 500.0, 999.0])


def text_of(seed, batch):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(batch, 5, 6)).astype(np.float32)
    return {"text": jnp.asarray(tokens), "text_mask": jnp.asarray(rng.random((batch, 5)) < 0.6)}


class Backbone:
    """Output depends on every input, row by row; remembers the batch of each call."""

    def __init__(self):
        self.batches = []

    def __call__(self, latents, timesteps, condition):
        self.batches.append((len(latents), len(timesteps), *map(len, jax.tree.leaves(condition))))
        pooled = jnp.sum(condition["text"].mean(-1) * condition["text_mask"], axis=1)
        return latents * jnp.sin(timesteps / 300)[:, None, None, None] + pooled[:, None, None, None]


@pytest.mark.parametrize("negative_batch", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.5, 7.5])
def test_formula_in_one_call_of_twice_the_batch(scale, negative_batch):
    backbone = Backbone()
    condition, negative = text_of(1, 3), text_of(2, negative_batch)
    output = guided(backbone, scale, condition, negative)(LATENTS, TIMES)
    assert backbone.batches == [(6, 6, 6, 6)]

    everywhere = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape[1:])), negative)
    positive_half = backbone(LATENTS, TIMES, condition)
    negative_half = backbone(LATENTS, TIMES, everywhere)
    expected = negative_half + scale * (positive_half - negative_half)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_scale_one_runs_the_conditional_half_alone():
    backbone = Backbone()
    condition = text_of(1, 3)
    output = guided(backbone, 1.0, condition, text_of(2, 1))(LATENTS, TIMES)
    assert backbone.batches == [(3, 3, 3, 3)]
    np.testing.assert_array_equal(output, Backbone()(LATENTS, TIMES, condition))


def test_conditions_may_lack_a_mask_and_low_precision_is_combined_in_float32():
    def backbone(latents, timesteps, condition):
        assert condition["text_mask"] is None
        return (latents + condition["text"].mean((1, 2))[:, None, None, None]).astype(jnp.bfloat16)

    condition = {"text": text_of(1, 3)["text"], "text_mask": None}
    negative = {"text": text_of(2, 1)["text"], "text_mask": None}
    output = guided(backbone, 3.0, condition, negative)(LATENTS, TIMES)
    assert output.dtype == jnp.float32
    halves = [
        backbone(LATENTS, TIMES, {"text": half, "text_mask": None}).astype(jnp.float32)
        for half in (jnp.repeat(negative["text"], 3, axis=0), condition["text"])
    ]
    np.testing.assert_array_equal(output, halves[0] + 3.0 * (halves[1] - halves[0]))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_equals_diffusers(phi):
    backbone, condition, negative = Backbone(), text_of(1, 3), text_of(2, 3)
    output = guided(backbone, 6.0, condition, negative, rescale=phi)(LATENTS, TIMES)
    positive = backbone(LATENTS, TIMES, condition)
    plain = guided(backbone, 6.0, condition, negative)(LATENTS, TIMES)
    expected = rescale_noise_cfg(torch.tensor(np.array(plain)), torch.tensor(np.array(positive)), phi)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    if phi == 1.0:
        np.testing.assert_allclose(
            np.std(output, axis=(1, 2, 3)), np.std(positive, axis=(1, 2, 3)), rtol=1e-5
        )


def test_rescaling_is_finite_without_spread_and_heeds_the_first_channels_alone():
    assert (rescaled(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)), 0.7) == 0).all()

    def learns_sigma(latents, timesteps, condition):
        output = Backbone()(latents, timesteps, condition)
        return jnp.concatenate([output, 100 * latents], axis=-1)

    condition, negative = text_of(1, 3), text_of(2, 1)
    outputs = [
        guided(backbone, 6.0, condition, negative, rescale=0.7)(LATENTS, TIMES)
        for backbone in (learns_sigma, Backbone())
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_keeps_to_its_interval(rescale):
    backbone, condition, negative = Backbone(), text_of(1, 3), text_of(2, 1)
    options = {"rescale": rescale}
    everywhere = guided(backbone, 5.0, condition, negative, **options)(LATENTS, TIMES)
    nowhere = guided(backbone, 1.0, condition, negative)(LATENTS, TIMES)
    for interval, inside in {
        (0.0, 1000.0): [True, True, True],
        # Both ends belong to it.
        (1.0, 500.0): [True, True, False],
        (500.5, 1000.0): [False, False, True],
        (2.0, 400.0): [False, False, False],
    }.items():
        output = guided(backbone, 5.0, condition, negative, interval=interval, **options)(LATENTS, TIMES)
        expected = np.where(np.array(inside)[:, None, None, None], everywhere, nowhere)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_one_program_serves_inside_and_outside_the_interval():
    backbone = Backbone()
    predict = guided(backbone, 5.0, text_of(1, 3), text_of(2, 1), interval=(300.0, 700.0))
    sample(predict, LATENTS, make_schedule("scaled_linear"), sampler="dpmpp_2m", steps=8)
    # Traced once.
    assert backbone.batches == [(6, 6, 6, 6)]


def test_guided_sampling_does_not_mix_the_rows_of_a_batch():
    schedule = make_schedule("scaled_linear")
    condition, negative = text_of(1, 3), text_of(2, 1)

    def run(rows):
        chosen = jax.tree.map(lambda x: x[rows], condition)
        return sample(guided(Backbone(), 4.0, chosen, negative), LATENTS[rows], schedule, steps=4)

    together = run(np.arange(3))
    np.testing.assert_allclose(run(np.array([1]))[0], together[1], rtol=1e-5, atol=1e-5)


def test_a_method_of_ones_own_replaces_the_formula_alone():
    """Rescaling, the interval and scale 1 act on what it returns."""

    def doubled(positive, negative, latents, timesteps, scale):
        return 2 * positive + scale * timesteps[:, None, None, None] + latents

    condition, negative = text_of(1, 3), text_of(2, 1)
    positive = Backbone()(LATENTS, TIMES, condition)
    expected = 2 * positive + 4.0 * TIMES[:, None, None, None] + LATENTS
    plain = guided(Backbone(), 4.0, condition, negative, method=doubled)(LATENTS, TIMES)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    scaled = guided(Backbone(), 4.0, condition, negative, method=doubled, rescale=0.5)(LATENTS, TIMES)
    np.testing.assert_allclose(scaled, rescaled(expected, positive, 0.5), rtol=1e-4)
    inside = guided(Backbone(), 4.0, condition, negative, method=doubled, interval=(400.0, 600.0))
    np.testing.assert_allclose(inside(LATENTS, TIMES)[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(inside(LATENTS, TIMES)[0], positive[0], rtol=1e-5)
    np.testing.assert_array_equal(
        guided(Backbone(), 1.0, condition, negative, method=doubled)(LATENTS, TIMES), positive
    )


def of_images(latents, timesteps, condition):
    """Reads text and an image condition, each row by itself."""
    pooled = condition["text"].mean((1, 2)) + jnp.tanh(2 * condition["image"])
    return latents * pooled[:, None, None, None] + jnp.sin(timesteps)[:, None, None, None]


@pytest.mark.parametrize("text_scale, image_scale", [(7.5, 1.5), (1.0, 2.0), (3.0, 0.0)])
def test_guidance_on_images_is_instruct_pix2pix(text_scale, image_scale):
    """eps(0, 0) + s_c (eps(c, 0) - eps(0, 0)) + s_t (eps(c, t) - eps(c, 0)) of three separate calls."""
    text, empty = (text_of(seed, 3)["text"] for seed in (1, 2))
    image, none = jnp.array([0.3, -1.0, 2.0]), jnp.zeros(3)
    batches = []

    def predict(latents, timesteps, condition):
        batches.append(len(latents))
        return of_images(latents, timesteps, condition)

    output = guided(
        predict,
        text_scale,
        {"text": text, "image": image},
        {"text": empty, "image": image},
        bare={"text": empty, "image": none},
        bare_scale=image_scale,
    )(LATENTS, TIMES)
    assert batches == [9]
    both, image_alone, neither = (
        of_images(LATENTS, TIMES, {"text": t, "image": i})
        for t, i in ((text, image), (empty, image), (empty, none))
    )
    wanted = neither + image_scale * (image_alone - neither) + text_scale * (both - image_alone)
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)


def test_without_guidance_on_images_there_is_no_third_call():
    condition = {"text": text_of(1, 3)["text"], "image": jnp.ones(3)}
    for scale, calls in ((1.0, 3), (4.0, 6)):
        batches = []

        def predict(latents, timesteps, condition, batches=batches):
            batches.append(len(latents))
            return of_images(latents, timesteps, condition)

        guided(predict, scale, condition, condition, bare=condition)(LATENTS, TIMES)
        assert batches == [calls]


def test_outside_of_the_interval_nothing_is_guided():
    condition = {"text": text_of(1, 3)["text"], "image": jnp.ones(3)}
    negative, bare = condition | {"text": text_of(2, 3)["text"]}, condition | {"image": jnp.zeros(3)}
    output = guided(of_images, 5.0, condition, negative, bare=bare, bare_scale=3.0, interval=(400.0, 600.0))
    found, plain = output(LATENTS, TIMES), of_images(LATENTS, TIMES, condition)
    np.testing.assert_array_equal(found[::2], plain[::2])
    assert np.abs(found[1] - plain[1]).max() > 0.1

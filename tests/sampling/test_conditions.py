"""Sampling with image conditions: they act, options act on them, what is kept is kept, and mistakes are one line."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from scaling_dit.errors import UserError
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.given import Given
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.pipeline import Pipeline
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.trees import unbox
from tests.support.runs import tiny
from tests.support.uvit_golden import fill

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16, 1), np.uint8)
MASK[:8] = 255
CONDITION = np.concatenate([np.where(MASK > 0, np.uint8(128), IMAGE), MASK], axis=-1)
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def pipe():
    """A run that reads "inpaint" as channels and "edit" as tokens; random weights, so that everything acts."""
    config = tiny(
        conditioning__names=("inpaint", "edit"), sample__steps=2, sample__guidance=1.5, sample__batch=2
    )
    with config.copy_and_resolve_references().unlocked() as config:
        config.conditions.inpaint.concat = "channel"
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    params, frozen = fill(unbox(jax.eval_shape(model.init, jax.random.key(0))))
    mesh = make_mesh(devices=jax.devices()[:1])
    return Pipeline(config=config, model=model, params=params, frozen=frozen, mesh=mesh, step=0)


def test_conditions_act_and_what_is_given_is_kept(pipe):
    given = {"inpaint": CONDITION}
    base = pipe.sample(PROMPTS)
    conditioned = pipe.sample(PROMPTS, conditions=given)
    assert (base != conditioned).any()
    # Of every row its own: the second alone is the second of two.
    other = np.stack([CONDITION, CONDITION[::-1]])
    apart = pipe.sample(PROMPTS, conditions={"inpaint": other})
    np.testing.assert_array_equal(apart[0], conditioned[0])
    assert (apart[1] != conditioned[1]).any()
    # Nothing of the given half is kept by itself; with `keep` all of it is, to the last bit.
    assert (conditioned[:, 8:] != IMAGE[8:]).any()
    kept = pipe.sample(PROMPTS, conditions=given, keep=True)
    np.testing.assert_array_equal(kept[:, 8:], np.broadcast_to(IMAGE[8:], (2, 8, 16, 3)))
    assert (kept[:, :8] != IMAGE[:8]).any()


def test_conditions_of_a_prepared_set_are_sampled_as_the_pixels_they_were_made_of(pipe):
    """As the grid of a run from a prepared set is, which has no pixels."""
    # The codec's latents are pixels; both ends of the scale and 0 and 1 of masks are exact in bfloat16.
    assert pipe.model.codec.moments_shape(16) == (16, 16, 3)
    pixels = np.stack([np.where(CONDITION > 127, np.uint8(255), np.uint8(0))] * 2)
    pixels[..., :3][pixels[..., 3] > 0] = 128
    stored = np.concatenate([pixels[..., :3] / 127.5 - 1, pixels[..., 3:] / 255], axis=-1)
    sampler = pipe.sampler()
    wanted = sampler(pipe.params, pipe.frozen, PROMPTS, conditions={"inpaint": pixels})
    found = sampler(pipe.params, pipe.frozen, PROMPTS, conditions={"inpaint": stored.astype(jnp.bfloat16)})
    # Grey, 128, is 0.0039 and rounded.
    assert np.abs(found.astype(int) - wanted).max() <= 2
    assert (found != sampler(pipe.params, pipe.frozen, PROMPTS)).any()
    for name, array, message in (
        (
            "edit",
            stored,
            r"condition 'edit' of a prepared set is bfloat16 \[2, 16, 16, 4\]; it must be \[2, 16, 16, 3\]",
        ),
        ("other", stored, "the run reads no condition 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            sampler(pipe.params, pipe.frozen, PROMPTS, conditions={name: array.astype(jnp.bfloat16)})


def test_latents_of_a_prepared_set_are_not_pasted_as_pixels(pipe):
    sampler = pipe.sampler(keep=True)
    length = pipe.model.text_encoder.length
    shapes = {"ids": ((2, length), jnp.int32), "mask": ((2, length), bool), "numbers": ((2,), jnp.int32)}
    inputs = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    inputs["conditions"] = {"inpaint": jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.bfloat16)}
    found = jax.eval_shape(sampler._images, pipe.params, pipe.frozen, inputs, jnp.uint32(0))
    assert (found.shape, found.dtype) == ((2, 16, 16, 3), np.uint8)


@pytest.mark.slow
def test_guidance_on_the_condition_and_a_start_from_an_image_act(pipe):
    given = {"inpaint": CONDITION}
    plain = pipe.sample(PROMPTS, conditions=given)
    np.testing.assert_array_equal(pipe.sample(PROMPTS, conditions=given, condition_guidance=1.0), plain)
    assert (pipe.sample(PROMPTS, conditions=given, condition_guidance=4.0) != plain).any()
    half = pipe.sample(PROMPTS, image=IMAGE, strength=0.5)
    assert (half != pipe.sample(PROMPTS, image=255 - IMAGE, strength=0.5)).any()


@pytest.mark.slow
def test_conditions_are_sampled_on_a_mesh_as_on_one_device(pipe):
    """Each row's images lie where its latents do; guided, and kept outside of the mask."""
    given = {"inpaint": np.stack([CONDITION, CONDITION[::-1]])}
    one = pipe.sampler(keep=True, condition_guidance=2.0)
    mesh = make_mesh(data=2, fsdp=4)
    weights = jax.device_put((pipe.params, pipe.frozen), NamedSharding(mesh, PartitionSpec()))
    wanted = one(pipe.params, pipe.frozen, PROMPTS, conditions=given)
    found = Sampler(pipe.model, mesh, one.options)(*weights, PROMPTS, conditions=given)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(found[0, 8:], IMAGE[8:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"conditions": {"inpant": CONDITION}}, "the run reads no condition 'inpant'; did you mean 'inpaint'"),
        ({"conditions": {"inpaint": CONDITION[:8]}}, "condition 'inpaint' is 8x16x4 uint8; it must be uint8 .16, 16"),
        ({"conditions": {"inpaint": IMAGE}}, "condition 'inpaint' is 16x16x3 uint8; .*: RGB and a mask"),
        ({"conditions": {"inpaint": np.stack([CONDITION] * 3)}}, "condition 'inpaint' has 3 rows for 2 prompts"),
        ({"conditions": {"inpaint": CONDITION / 255}}, "condition 'inpaint' is 16x16x4 float64"),
        ({"conditions": [CONDITION]}, "conditions is a list; it must be a mapping from names to images"),
        ({"keep": True}, "keep needs a condition with a mask, which says what is kept; give inpaint"),
        ({"keep": True, "conditions": {"edit": IMAGE}}, "keep needs a condition with a mask"),
        ({"condition_guidance": 2.0}, "condition_guidance is 2.0, but no condition is given"),
        ({"strength": 0.5}, "strength is 0.5, but no image is given to start from"),
        ({"image": IMAGE}, "an image to start from is given, but strength is 1"),
        ({"image": IMAGE[:8], "strength": 0.5}, "image is 8x16x3 uint8"),
        ({"image": IMAGE, "strength": 0.1}, "strength is 0.1: of 2 steps it leaves none"),
        ({"strength": 0.0}, "strength is 0.0; it must be above 0, at most 1"),
        ({"keep": 1}, "keep is 1; it must be true or false"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(pipe, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        pipe.sample(PROMPTS, **arguments)
    assert "\n" not in str(error.value)


def test_what_is_asked_for_must_act_on_something_before_a_folder_is_made(pipe):
    options = SamplingOptions()
    # Prompts may have conditions of their own, as those of a prompt set do.
    Given().check(options.replace(keep=True, condition_guidance=2.0), pipe.model, ("inpaint",))
    Given().check(options.replace(condition_guidance=2.0), pipe.model, ("edit",))
    for changes, more, message in (
        ({"keep": True}, ("edit",), "keep needs a condition with a mask"),
        ({"condition_guidance": 2.0}, (), "condition_guidance is 2.0, but no condition is given"),
        ({"strength": 0.5}, ("inpaint",), "strength is 0.5, but no image is given to start from"),
    ):
        with pytest.raises(UserError, match=message):
            Given().check(options.replace(**changes), pipe.model, more)
    bare = dataclasses.replace(pipe.model, codec=types.SimpleNamespace())
    with pytest.raises(UserError, match=r"codec SimpleNamespace has no mean\(params, moments\)"):
        Given(image=IMAGE).check(options.replace(strength=0.5), bare)


def test_arrays_show_nothing_of_what_is_to_be_generated(pipe):
    whole = np.concatenate([IMAGE, MASK], axis=-1)
    for array, count in ((whole, None), (np.stack([whole] * 2), 2)):
        found = Given.of(pipe.model, {"inpaint": array}, None, count).conditions["inpaint"]
        np.testing.assert_array_equal(found, np.broadcast_to(CONDITION, array.shape))


def test_files_are_read_and_hashed(pipe, tmp_path):
    files = {"image": CONDITION[..., :3], "mask": CONDITION[..., 3], "small": IMAGE[:8, :8]}
    for name, pixels in files.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    image, mask, small = (str(tmp_path / f"{name}.png") for name in files)
    found = Given.read(pipe.model, [f"inpaint:{image},{mask}", f"edit:{image}"], None)
    np.testing.assert_array_equal(found.conditions["inpaint"], CONDITION)
    np.testing.assert_array_equal(found.conditions["edit"], CONDITION[..., :3])
    np.testing.assert_array_equal(found.rows([4, 7])["conditions"]["inpaint"], np.stack([CONDITION] * 2))
    about = found.about()
    assert sorted(about["conditions"]) == ["edit", "inpaint"] and len(set(about["conditions"].values())) == 2
    changed = dataclasses.replace(found, conditions={"inpaint": CONDITION[::-1]})
    assert changed.about()["conditions"]["inpaint"] != about["conditions"]["inpaint"]
    assert Given().about() == {} and Given().rows([0]) == {}
    for wrong, message in (
        ([image], "write NAME:FILE, or NAME:IMAGE,MASK"),
        ([f"inpaint:{image}"], "it needs an image and a mask: write NAME:IMAGE,MASK"),
        ([f"edges:{image}"], "the run reads no condition 'edges'"),
        (
            [f"edit:{small}"],
            r"condition 'edit' in .*small.png is 8x8x3 uint8; it must be uint8 \[16, 16, 3\]",
        ),
        ([f"edit:{image}", f"edit:{image}"], "condition 'edit' is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            Given.read(pipe.model, wrong, None)
    with pytest.raises(UserError, match=r"image is 8x8x3 uint8; it must be uint8 \[16, 16, 3\]"):
        Given.read(pipe.model, [], small)
    with pytest.raises(UserError, match="no file 'none.png'"):
        Given.read(pipe.model, [], str(tmp_path / "none.png"))

"""Sampling: pictures depend on (seed, number, prompt) alone; folders are resumable."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import scaling_dit
from scaling_dit.errors import UserError
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.folder import iterate, sample_to_folder
from scaling_dit.sampling.options import tag
from scaling_dit.sampling.sample import sample_prompts
from scaling_dit.sampling.sampler import Sampler

PROMPTS = [
    "a large red circle",
    "a small blue square",
    "a large green triangle",
    "a red square above a blue circle",
    "x",
]


@pytest.fixture(scope="module")
def pipe(smoke_run):
    return scaling_dit.load(smoke_run)


def test_pictures_depend_neither_on_the_batch_nor_on_the_mesh(pipe):
    whole = pipe.sample(PROMPTS, seed=3)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
    one = Sampler.of(pipe.model, make_mesh(devices=jax.devices()[:1]), pipe.config.sample, batch=2)
    params, frozen = jax.device_put((pipe.params, pipe.frozen), jax.devices()[0])
    by_two = one(params, frozen, PROMPTS, seed=3)
    assert np.abs(whole.astype(int) - by_two).max() <= 1  # rounding to 8 bits
    alone = one(params, frozen, PROMPTS[3:4], seed=3, numbers=[3])
    assert np.abs(whole[3].astype(int) - alone[0]).max() <= 1


def test_seed_prompt_and_number_all_matter(pipe):
    base = pipe.sample(PROMPTS[:1] * 2, seed=0)
    assert (base[0] != base[1]).any()
    assert (base != pipe.sample(PROMPTS[:1] * 2, seed=1)).any()
    assert (base[0] != pipe.sample(PROMPTS[1:2], seed=0)[0]).any()
    np.testing.assert_array_equal(base, pipe.sample(PROMPTS[:1] * 2, seed=0))


def test_guidance_steps_and_sampler_are_used(pipe):
    base = pipe.sample(PROMPTS[:2])
    assert (base != pipe.sample(PROMPTS[:2], sampler="dpmpp_2m")).any()
    assert (base != pipe.sample(PROMPTS[:2], guidance=1.0)).any()
    assert (base != pipe.sample(PROMPTS[:2], steps=2)).any()
    np.testing.assert_array_equal(base, pipe.sample(PROMPTS[:2], guidance=pipe.config.sample.guidance))


def test_guidances_variants_are_used_and_told(pipe):
    def of(**changes):
        chosen = Sampler.of(pipe.model, pipe.mesh, pipe.config.sample, steps=2, guidance=40.0, **changes)
        return chosen, chosen(pipe.params, pipe.frozen, PROMPTS[:2])

    plain, base = of()
    assert set(plain.about) == {"sampler", "steps", "guidance"}
    tags = {tag({"step": 4, "ema": "none"} | plain.about, 0)}
    # Of the timesteps 501 and 1 the interval holds the second.
    for changes in ({"guidance_rescale": 0.7}, {"guidance_interval": (0.0, 400.0)}):
        chosen, pictures = of(**changes)
        assert (pictures != base).any()
        # As a manifest's line gives it back.
        assert json.loads(json.dumps(chosen.about)) == chosen.about != plain.about
        tags.add(tag({"step": 4, "ema": "none"} | chosen.about, 0))
    start = "step4-emanone-ddim2-guidance40.0"
    assert tags == {f"{start}{more}-seed0" for more in ("", "-rescale0.7", "-interval0.0-400.0")}


def test_an_unknown_sampler_is_told(pipe):
    with pytest.raises(UserError, match="unknown 'dpmpp2m'; did you mean 'dpmpp_2m'"):
        pipe.sample(PROMPTS[:1], sampler="dpmpp2m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guidance_interval": (800.0, 200.0)},
            "guidance_interval is .* two timesteps .low, high. from 0 to 1000",
        ),
        ({"guidance_interval": (500.0,)}, "two timesteps"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be from 0 to 1"),
        ({"guidance": -1.0}, "guidance is -1.0; it must be 0 or more"),
        ({"steps": 1000}, "steps is 1000; it must be from 1 to 999"),
    ],
)
def test_settings_out_of_range_are_told(pipe, changes, message):
    with pytest.raises(UserError, match=message):
        Sampler.of(pipe.model, pipe.mesh, pipe.config.sample, **changes)


def test_no_prompts_make_no_pictures(pipe):
    assert pipe.sample([]).shape == (0, 16, 16, 3)


class Counting:
    """A sampler that notes what it was asked for, and may die."""

    def __init__(self, sampler, fail_at=None):
        self._sampler, self.batch, self.asked, self._fail_at = sampler, 2, [], fail_at

    def __call__(self, params, frozen, prompts, seed, numbers):
        if self._fail_at is not None and len(self.asked) >= self._fail_at:
            raise KeyboardInterrupt
        self.asked += numbers
        return self._sampler(params, frozen, prompts, seed=seed, numbers=numbers)


def test_a_request_goes_on_where_it_stopped(pipe, tmp_path):
    sampler = Sampler.of(pipe.model, pipe.mesh, pipe.config.sample)
    items = [(f"p{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    batches = list(iterate(sampler, pipe, items, epath.Path(tmp_path / "a"), seed=1, about={"step": 4}))
    whole = np.concatenate(batches)
    out = epath.Path(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(Counting(sampler, fail_at=2), pipe, items, out, seed=1, about={"step": 4})
    (out / "p1.png").unlink()  # listed, but lost
    again = Counting(sampler)
    resumed = np.concatenate(list(iterate(again, pipe, items, out, seed=1, about={"step": 4})))
    assert again.asked == [1, 2, 3, 4]
    assert np.abs(resumed.astype(int) - whole).max() <= 1
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(5)]
    assert rows[3] == {
        "id": "p3", "prompt": PROMPTS[3], "seed": 1, "number": 3, "path": "p3.png", "step": 4,
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(out / "p3.png")), resumed[3])
    assert Image.open(out / "grid.png").size[0] > 128


def test_a_folder_of_another_request_is_refused(pipe, tmp_path):
    sampler = Sampler.of(pipe.model, pipe.mesh, pipe.config.sample)
    out = epath.Path(tmp_path)
    sample_to_folder(sampler, pipe, [("a", "a red circle")], out, seed=1, about={})
    with pytest.raises(UserError, match="another request.*seed"):
        sample_to_folder(sampler, pipe, [("a", "a red circle")], out, seed=2, about={})
    with pytest.raises(UserError, match="the id 'grid'"):
        sample_to_folder(sampler, pipe, [("grid", "a red circle")], out, seed=1, about={})
    with pytest.raises(UserError, match="same id"):
        sample_to_folder(sampler, pipe, [("a", "x"), ("a", "y")], out, seed=2, about={})


def test_the_verb_draws_several_of_each_and_says_where(smoke_run, tmp_path, capsys):
    code = sample_prompts(
        str(smoke_run), [("a", "a red circle"), ("b", "a blue square")], str(tmp_path), num=2
    )
    assert code == 0
    said = capsys.readouterr().out
    assert "4 pictures" in said and "grid.png" in said and "ema 0.995" in said
    assert sorted(path.name for path in tmp_path.glob("*-*.png")) == [
        "a-0.png",
        "a-1.png",
        "b-0.png",
        "b-1.png",
    ]


def test_another_request_gets_a_folder_of_its_own_and_the_same_one_is_found_again(
    smoke_run, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(smoke_run, workdir)
    for prompt, seed in (("a red circle", 0), ("a blue square", 0), ("a red circle", 1), ("a red circle", 0)):
        assert sample_prompts(str(workdir), [("a", prompt)], seed=seed) == 0
    assert len(list((workdir / "samples").iterdir())) == 3
    assert all(
        path.name.startswith("step4-ema0.995-ddim4-guidance") for path in (workdir / "samples").iterdir()
    )

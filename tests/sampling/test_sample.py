"""Sampling: images depend on (seed, number, prompt) alone; folders are resumable."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import scaling_dit
from scaling_dit.errors import UserError
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.folder import sample_to_folder
from scaling_dit.sampling.sample import Sampling
from scaling_dit.sampling.sampler import Sampler

PROMPTS = [
    "a large red circle",
    "a small blue square",
    "a large green triangle",
    "a red square above a blue circle",
    "x",
]


# Reading a run is the subject of tests/sampling/test_pipeline.py.
pytestmark = pytest.mark.usefixtures("opened_once")


@pytest.fixture(scope="module")
def pipe(smoke_run, opened_once):
    return scaling_dit.load(smoke_run)


def test_images_depend_neither_on_the_batch_nor_on_the_mesh(pipe):
    mesh = make_mesh()
    weights = jax.device_put((pipe.params, pipe.frozen), NamedSharding(mesh, PartitionSpec()))
    whole = Sampler(pipe.model, mesh, pipe.sampler().options)(*weights, PROMPTS, seed=3)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
    one = pipe.sampler(batch=2)
    by_two = one(pipe.params, pipe.frozen, PROMPTS, seed=3)
    # Rounding to 8 bits.
    assert np.abs(whole.astype(int) - by_two).max() <= 1
    alone = one(pipe.params, pipe.frozen, PROMPTS[3:4], seed=3, numbers=[3])
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


@pytest.mark.slow
def test_every_option_of_guidance_reaches_the_images(pipe):
    base = pipe.sample(PROMPTS[:2], steps=2, guidance=40.0)
    # Of the timesteps 501 and 1 the interval holds the second.
    for changes in ({"guidance_rescale": 0.7}, {"guidance_interval": (0.0, 400.0)}):
        assert (pipe.sample(PROMPTS[:2], steps=2, guidance=40.0, **changes) != base).any()


def test_the_batch_changes_no_image(pipe):
    one_by_one = pipe.sample(PROMPTS[:3], seed=2, batch=1)
    assert np.abs(one_by_one.astype(int) - pipe.sample(PROMPTS[:3], seed=2)).max() <= 1


def test_a_program_is_compiled_once_for_equal_options(pipe):
    given = pipe.config.sample.guidance
    assert pipe.sampler() is pipe.sampler(guidance=given) is pipe.sampler(steps=None)
    assert pipe.sampler() is not pipe.sampler(guidance=given + 1)


def test_a_string_is_one_prompt(pipe):
    images = pipe.sample(PROMPTS[0])
    assert images.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(images, pipe.sample(PROMPTS[:1]))
    tokens, _, _ = pipe.encode_text(PROMPTS[0])
    np.testing.assert_array_equal(tokens, pipe.encode_text(PROMPTS[:1])[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.sample(["x"], sampler="dpmpp2m"), "sampler is 'dpmpp2m'; did you mean 'dpmpp_2m'"),
        (lambda pipe: pipe.sample(["x"], stpes=3), "sampling has no option 'stpes'; did you mean 'steps'?"),
        (lambda pipe: pipe.sample(["x"], steps=1000), "steps is 1000; it must be from 1 to 999"),
        (lambda pipe: pipe.sample(["x", 3]), r"prompts\[1\] is 3; a prompt is a string"),
        (lambda pipe: pipe.encode_text([None]), r"prompts\[0\] is None; a prompt is a string"),
        (lambda pipe: pipe.sample("x", seed=-1), r"seed is -1; it must be an integer from 0 to 2\*\*32 - 1"),
        (lambda pipe: pipe.sample("x", seed=0.5), "seed is 0.5; it must be an integer"),
    ],
)
def test_mistakes_in_a_call_are_one_line(pipe, call, message):
    with pytest.raises(UserError, match=message):
        call(pipe)


def test_no_prompts_make_no_images(pipe):
    assert pipe.sample([]).shape == (0, 16, 16, 3)


class Counting:
    """A sampler that notes what it was asked for, and may die."""

    def __init__(self, sampler, fail_at=None):
        self._sampler, self.asked, self._fail_at = sampler, [], fail_at
        self.options = sampler.options.replace(batch=2)

    def __call__(self, params, frozen, prompts, seed, numbers, batch):
        if self._fail_at is not None and len(self.asked) >= self._fail_at:
            raise KeyboardInterrupt
        self.asked += numbers
        return self._sampler(params, frozen, prompts, seed=seed, numbers=numbers, batch=batch)


def test_a_request_is_resumed_where_it_stopped(pipe, tmp_path):
    sampler = pipe.sampler()
    items = [(f"p{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    made = sample_to_folder(
        Counting(sampler), pipe, items, epath.Path(tmp_path / "a"), seed=1, about={"step": 4}
    )
    whole = np.concatenate(list(made.read(range(5), 2)))
    out = epath.Path(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(Counting(sampler, fail_at=2), pipe, items, out, seed=1, about={"step": 4})
    # Listed, but lost.
    (out / "p1.png").unlink()
    again = Counting(sampler)
    made = sample_to_folder(again, pipe, items, out, seed=1, about={"step": 4})
    resumed = np.concatenate(list(made.read(range(5), 3)))
    assert again.asked == [1, 2, 3, 4]
    # The same compiled batch, so the same bits, though other images were sampled with them.
    np.testing.assert_array_equal(resumed, whole)
    for name in ("manifest.jsonl", *(f"p{i}.png" for i in range(5))):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(5)]
    assert rows[3] == {
        "id": "p3", "prompt": PROMPTS[3], "seed": 1, "number": 3, "path": "p3.png", "step": 4,
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(out / "p3.png")), resumed[3])
    assert Image.open(out / "grid.png").size[0] > 128


def test_a_folder_of_another_request_is_refused(pipe, tmp_path):
    sampler = pipe.sampler()
    out = epath.Path(tmp_path)
    sample_to_folder(sampler, pipe, [("a", "a red circle")], out, seed=1, about={})
    with pytest.raises(UserError, match="another request.*seed"):
        sample_to_folder(sampler, pipe, [("a", "a red circle")], out, seed=2, about={})
    with pytest.raises(UserError, match="the id 'grid'"):
        sample_to_folder(sampler, pipe, [("grid", "a red circle")], out, seed=1, about={})
    with pytest.raises(UserError, match="same id"):
        sample_to_folder(sampler, pipe, [("a", "x"), ("a", "y")], out, seed=2, about={})


def test_the_verb_makes_several_of_each_and_says_where(smoke_run, tmp_path, capsys):
    assert (
        len(list(Sampling(str(smoke_run), str(tmp_path), num=2).run([("a", "a red circle"), ("b", "x")])))
        == 1
    )
    said = capsys.readouterr().out
    assert "4 images" in said and "grid.png" in said and "ema 0.995" in said
    assert sorted(path.name for path in tmp_path.glob("*-*.png")) == [
        "a-0.png",
        "a-1.png",
        "b-0.png",
        "b-1.png",
    ]


def test_another_request_gets_its_own_folder_and_the_same_one_is_found_again(smoke_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(smoke_run, workdir)
    for prompt, seed in (("a red circle", 0), ("a blue square", 0), ("a red circle", 1), ("a red circle", 0)):
        assert len(list(Sampling(str(workdir), seed=(seed,)).run([("a", prompt)]))) == 1
    assert len(list((workdir / "samples").iterdir())) == 3
    assert all(
        path.name.startswith("step4-ema0.995-ddim4-guidance") for path in (workdir / "samples").iterdir()
    )


def test_options_are_refused_before_weights_are_read(smoke_run, tmp_path):
    (tmp_path / "config.json").write_bytes((smoke_run / "config.json").read_bytes())
    with pytest.raises(UserError, match="guidance_rescale is 2.0; it must be from 0 to 1"):
        list(Sampling(str(tmp_path), changes={"guidance_rescale": 2.0}).run([("a", "x")]))
    with pytest.raises(UserError, match="guidance is -1.0; it must be 0 or more"):
        list(Sampling(str(tmp_path), guidance=(1.0, -1.0)).run([("a", "x")]))


def test_a_folder_begun_before_options_were_declared_is_resumed(smoke_run, tmp_path, capsys):
    """The name and the manifest line are those that earlier versions wrote for the same request."""
    workdir = tmp_path / "run"
    shutil.copytree(smoke_run, workdir)
    out = workdir / "samples/step4-ema0.995-ddim4-guidance3.0-rescale0.5-interval100.0-900.0-seed7-eec6d831"
    row = {
        "id": "a", "prompt": "a red circle", "seed": 7, "number": 0, "path": "a.png", "step": 4, "ema": "0.995",
        "sampler": "ddim", "steps": 4, "guidance": 3.0, "guidance_rescale": 0.5, "guidance_interval": [100.0, 900.0],
    }  # fmt: skip
    out.mkdir(parents=True)
    (out / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    blue = np.zeros((16, 16, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    Image.fromarray(blue).save(out / "a.png")
    changes = {"guidance": 3.0, "guidance_rescale": 0.5, "guidance_interval": (100.0, 900.0)}
    assert len(list(Sampling(str(workdir), seed=(7,), changes=changes).run([("a", "a red circle")]))) == 1
    assert [path.name for path in (workdir / "samples").iterdir()] == [out.name]
    assert json.loads((out / "manifest.jsonl").read_text()) == row
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a.png")), blue)

"""docs/own_parts.md, executed as typed from top to bottom in one folder; each error line is what its mistake gives."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import scaling_dit
from scaling_dit import config
from scaling_dit.checkpoints.workdir import read_config
from scaling_dit.cli import main as cli
from scaling_dit.config import schema
from scaling_dit.curation.captioning import create_captioner
from scaling_dit.diffusion import guidance, predictions, samplers, schedules, time_sampling, weightings
from scaling_dit.encoders import codec, create_text_encoder
from scaling_dit.errors import UserError
from scaling_dit.evaluation.vqa import Asked
from scaling_dit.evaluation.vqa.answers import Answers
from scaling_dit.evaluation.vqa.panel import open_judge
from scaling_dit.interop.diffusers import schedulers
from scaling_dit.parallel.topologies import LOCAL, parse
from scaling_dit.planning import plan
from scaling_dit.training import optim
from tests.support.pages import blocks, commands
from tests.support.paths import DOCS, ROOT

PAGE = "own_parts.md"
VP = schedules.make_schedule("scaled_linear")
IMAGE = Image.fromarray(np.repeat(np.uint8([[200, 0]]), 8, axis=0))


def files():
    """The files that the page says to save: name -> text."""
    text = (DOCS / PAGE).read_text()
    return dict(re.findall(r"Save as `(\w+)\.py`:\n\n```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the page's files, and a folder of images with a caption each."""
    for name, text in files().items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in files():
        sys.modules.pop(name, None)


def section(name):
    """Fields of the optimizer, with a part of a user's own in Adam's place."""
    return config.resolve(config.defaults(), [f"--config.optim.name={name}"]).optim


# What opens each part, the text of the page's file that is changed, and what it becomes.
MISTAKES = {
    "laplace": (lambda name: schedules.make_schedule(name), "np.exp(-log_snr)", "np.exp(log_snr)"),
    "objective:Edm": (
        lambda name: predictions.create_prediction(name, {}),
        "- alpha * scaled\n",
        "+ alpha * scaled\n",
    ),
    "objective:SoftMinSnr": (
        lambda name: weightings.create_weighting(name, {}),
        'space = "x0"',
        'space = "latents"',
    ),
    "mode": (
        lambda name: time_sampling.create_time_sampling(name, {}, VP),
        "jax.random.uniform(rng,",
        "jax.random.uniform(jax.random.key(0),",
    ),
    "ancestral": (
        lambda name: samplers.create_sampler(name, {}, VP, 4),
        "jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)",
        "jax.random.normal(keys[0], latents.shape)",
    ),
    "ramp": (lambda name: guidance.create_guidance(name, {}), "weight[:, None, None, None]", "weight"),
    "blocks": (
        lambda name: codec.check_own_codec(codec.create_codec(name), name, 16),
        "3 * self.patch**2",
        "3 * self.patch",
    ),
    "bag": (lambda name: create_text_encoder(name, tokenizer=()), "self.length), np.int32)", "self.length), int)"),
    "signed": (
        lambda name: optim.make_optimizer(section(name), 10),
        "optax.chain(optax.trace(decay), optax.scale_by_sign())",
        "optax.lion(1e-4)",
    ),
    "bright:Bright": (
        lambda name: [
            open_judge(name, {}, Answers()).likelihoods([Asked(np.full((2, 2, 3), 200, np.uint8), "?", ("yes",), {})])
        ],
        "float(image.mean()) / 255",
        "float(image.mean())",
    ),
    "halves": (
        lambda name: create_captioner(name, {}).caption([IMAGE], [0]),
        'return [(f"an image that is brighter on the {side}", float(abs(difference)))]',
        'return (f"an image that is brighter on the {side}", float(abs(difference)))',
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_gives_the_line_on_the_page(folder, key):
    create, old, new = MISTAKES[key]
    file, _, wanted = key.partition(":")
    lines = [line.strip() for line in blocks("text", PAGE) if f"'{file}:{wanted}" in line]
    (line,) = lines
    name = re.findall(r"'([\w:]+)'", line)[0]
    text = files()[file]
    assert text.count(old) == 1
    create(name)
    sys.modules.pop(file)
    (folder / f"{file}.py").write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        create(name)
    assert re.fullmatch(".*".join(map(re.escape, line.split("..."))), str(error.value)), str(error.value)


def test_every_error_line_has_its_mistake():
    assert len(blocks("text", PAGE)) == len(MISTAKES)
    assert set(files()) == {key.partition(":")[0] for key in MISTAKES}


def test_the_table_has_every_field_that_takes_a_part():
    text = (DOCS / PAGE).read_text()
    rows = re.findall(r"^\| [\w ]+ \| `config\.([\w.]+)` \| `config\.([\w.]+)` \| .*\|$", text, re.MULTILINE)
    own = {key: part.section for key, part in schema.OWN_PARTS.items()}
    assert dict(rows) == own | {f"{name}.name": name for name in ("codec", "text_encoder")}
    assert set(own) == {key for key, field in schema.FIELDS.items() if field.own}
    for protocol, place in re.findall(r"\| `(\w+)` in `scaling_dit/(.+?)` \|$", text, re.MULTILINE):
        assert f"class {protocol}" in (DOCS.parent / "scaling_dit" / place).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("verbs_on_one_device")
def test_the_commands_run_one_after_the_other(folder, capsys):
    train, sample, caption, judge = commands(PAGE)
    quiet = ["--config.eval.every=0", "--config.log.tensorboard=false", "--config.backbone.depth=1"]
    assert cli.main(train + quiet) == 0, capsys.readouterr().err
    saved = read_config("runs/parts")
    assert (saved.diffusion.schedule_fields.width, saved.sample.sampler_fields.eta) == (1.0, 0.5)
    assert saved.optim.fields.to_dict() == {"decay": 0.9}
    pipe = scaling_dit.load("runs/parts", ema="none")
    assert type(pipe.model.codec).__name__ == "Blocks" and pipe.model.latent_shape == (8, 8, 12)
    assert type(pipe.model.prediction).__name__ == "Edm"
    assert set(pipe.params["text_encoder"]) == {"table"}

    assert cli.main(sample) == 0, capsys.readouterr().err
    assert "sampler ddim" in capsys.readouterr().out
    # The run's own sampler and guidance, whose noise is an image's own: the same alone and beside others.
    one, two = pipe.sample(["a red circle"], seed=3), pipe.sample(["a red circle", "a blue square"], seed=3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
    assert (pipe.sample(["a red circle"], seed=3, sampler="ddim") != one).any()

    planned = plan.make(saved, parse(LOCAL))
    assert planned.memory.fits and planned.statistics.unknown_loops == 0

    (folder / "data/mine").mkdir(parents=True)
    rows = []
    for number, image in enumerate((IMAGE, IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        image.resize((40, 30)).save(folder / f"data/mine/{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"number {number}"})
    (folder / "data/mine/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(caption) == 0, capsys.readouterr().err
    assert cli.main(judge) == 0, capsys.readouterr().err
    assert "vqa_score of runs/parts: n 4" in capsys.readouterr().out
    (made,) = (folder / "data/made").glob("*captions.jsonl")
    assert re.findall(r"brighter on the (\w+)", made.read_text()) == ["left", "right"]


def test_a_pipeline_of_diffusers_is_refused(folder):
    for override, message in (
        (
            "diffusion.schedule=laplace:laplace",
            "config.diffusion is laplace:laplace with prediction x0, which no",
        ),
        (
            "sample.sampler=ancestral:Ancestral",
            "config.sample.sampler is 'ancestral:Ancestral', which diffusers",
        ),
    ):
        own = config.load(f"{ROOT}/experiments/shapes.py:smoke", [f"--config.{override}"])
        with pytest.raises(UserError, match=message):
            schedulers.write(own)

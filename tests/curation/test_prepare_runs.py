"""`prepare` as commands of their own, killed and shared, with an autoencoder; and runs that train from what it made."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from etils import epath

from scaling_dit import config
from scaling_dit.checkpoints.workdir import read_metrics
from scaling_dit.cli import main as cli
from scaling_dit.curation import encode
from scaling_dit.data.prepared import manifest
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.sampling import pipeline
from scaling_dit.training.loop import train
from tests.support import raw_images, xla
from tests.support.prepared_sets import SIDE, assert_holds, contents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with a tiny random autoencoder, as diffusers writes it: 16 px to 8 x 8 x 4."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("weights") / "vae"
    model.save_pretrained(folder)
    return folder


def arguments(raw, vae, out, *more):
    """Those of `scaling-dit prepare`."""
    return [
        "prepare",
        "--config=shapes:smoke",
        f"--config.source.name=webdataset:{raw}/*.tar",
        f"--config.source.image_size={SIDE}",
        "--config.codec.name=vae",
        f"--config.codec.weights={vae}",
        f"--out={out}",
        *more,
    ]


def start(raw, vae, out, process, processes):
    """One process of `prepare`, with one device and one thread for each, as on a machine of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices=1),
    }
    more = (f"--process={process}", f"--processes={processes}")
    return subprocess.Popen(
        [sys.executable, "-m", "scaling_dit", *arguments(raw, vae, out, *more)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(running):
    """Waits for processes and returns what they said."""
    made = []
    for process in running:
        text, _ = process.communicate(timeout=840)
        assert process.returncode == 0, text
        made.append(text)
    return "\n".join(made)


def kill_with_parts(running, out, parts):
    """Waits until so many parts are done, then kills every process."""
    folder, deadline = pathlib.Path(out) / manifest.PARTS, time.monotonic() + 600
    while not folder.exists() or len(list(folder.glob("*.json"))) < parts:
        assert time.monotonic() < deadline and any(process.poll() is None for process in running)
        time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_three_killed_processes_make_what_one_makes(vae, tmp_path, monkeypatch):
    """Of two thousand images, so that each does its work many times over."""
    raw = tmp_path / "raw"
    made = raw_images.write_webdataset(raw, 20, 101, broken=0.04, seed=1)
    assert len(made.good) + sum(len(keys) for keys in made.broken.values()) >= 2000
    monkeypatch.setattr(encode.jax, "local_devices", lambda: jax.devices()[:1])
    assert cli.main(arguments(raw, vae, tmp_path / "one")) == 0
    assert_holds(tmp_path / "one", made)
    kill_with_parts([start(raw, vae, tmp_path / "three", i, 3) for i in range(3)], tmp_path / "three", 5)
    assert not (tmp_path / "three" / manifest.MANIFEST).exists()
    said = finish([start(raw, vae, tmp_path / "three", i, 3) for i in range(3)])
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert "left out, unreadable_image" in said


@pytest.fixture(scope="module")
def ready(vae, tmp_path_factory):
    """A set made with the autoencoder by the command line."""
    folder = tmp_path_factory.mktemp("ready")
    raw_images.write_webdataset(folder / "raw", 2, 40, broken=0.0, seed=2)
    held_out = "--config.source.held_out_fraction=0.2"
    assert cli.main(arguments(folder / "raw", vae, folder / "set", "--batch=16", held_out)) == 0
    return folder / "set"


def run_config(ready, vae, *more):
    """A tiny run on that set."""
    given = (f"--config.source.name=latents:{ready}", f"--config.source.image_size={SIDE}",
             "--config.codec.name=vae", f"--config.codec.weights={vae}", "--config.eval.metrics=()",
             "--config.backbone.patch=4", "--config.backbone.depth=1", "--config.optim.decay=constant",
             "--config.log.tensorboard=false")  # fmt: skip
    return config.load("shapes:smoke", [*given, *more])


def test_a_prepared_set_tells_its_codec(ready, vae):
    made = manifest.read(epath.Path(ready))
    assert made.codec["name"] == "vae" and made.codec["scale"] == 0.5 and len(made.codec["sha256"]) == 64
    assert made.moments == {"16x16": [8, 8, 8]}
    source = create_source(f"latents:{ready}", image_size=SIDE)
    mean, logvar = np.split(source[0]["latents"].astype(np.float32), 2, axis=-1)
    assert mean.std() > 0 and logvar.std() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_training_from_moments_and_a_resume(ready, vae, tmp_path):
    """Losses, validation and the grid of a run; killed after a checkpoint, it resumes to the same parameters."""
    one = jax.devices()[:1]
    whole = train(run_config(ready, vae), tmp_path / "whole", one)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "whole")}
    assert any("validation/loss" in row for row in rows.values())
    assert np.isfinite([row["train/loss"] for row in rows.values() if "train/loss" in row]).all()
    unseen = "--config.eval.every=0"
    train(run_config(ready, vae, "--config.steps=2", unseen), tmp_path / "resumed", one)
    again = train(run_config(ready, vae, unseen), tmp_path / "resumed", one)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    images = pipeline.load(tmp_path / "whole").sample(["an image"], steps=2)
    assert images.shape == (1, SIDE, SIDE, 3)


def test_latents_of_a_batch_are_sampled_from_its_moments(ready, vae):
    """The same key gives the same latents from stored moments as from the images themselves, within bfloat16."""
    run = run_config(ready, vae)
    source = open_source(run)
    model = build_model(run, make_tokenizer(run, source), source)
    frozen = {"codec": model.codec.load()}
    raw = create_source(f"webdataset:{ready.parent}/raw/*.tar", image_size=SIDE, held_out_fraction=0.2)
    by_key = {raw[i]["key"]: raw[i]["image"] for i in range(len(raw))}
    records = source.__getitems__(range(8))
    moments = np.stack([record["latents"] for record in records])
    images = np.stack([by_key[record["key"]] for record in records])
    sampled = jax.jit(model.batch_latents)(frozen, {"latents": moments}, jax.random.key(3))
    encoded = jax.jit(model.batch_latents)(frozen, {"images": images}, jax.random.key(3))
    np.testing.assert_allclose(sampled, encoded, atol=0.02 * np.abs(np.asarray(encoded)).max())
    other = jax.jit(model.batch_latents)(frozen, {"latents": moments}, jax.random.key(4))
    assert np.abs(np.asarray(sampled) - np.asarray(other)).max() > 0.01


def test_a_run_with_another_codec_is_refused(ready, vae, tmp_path):
    other = tmp_path / "vae"
    torch.manual_seed(1)
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.1)
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"other weights of codec 'vae' \(sha256 \w{12}, here \w{12}\)"):
        train(run_config(ready, other), tmp_path / "run")
    settings = json.loads((other / "config.json").read_text()) | {"scaling_factor": 0.6}
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"prepared with codec scale 0\.5; the run has 0\.6"):
        train(run_config(ready, other), tmp_path / "run")
    data = (f"--config.source.name=latents:{ready}", f"--config.source.image_size={SIDE}")
    run = config.load("shapes:smoke", [*data, "--config.eval.metrics=()", "--config.codec.name=dct"])
    with pytest.raises(UserError, match="prepared with codec name 'vae'; the run has 'dct'"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()

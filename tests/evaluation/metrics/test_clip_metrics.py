"""Metrics of single images against transformers' CLIP and closed forms, on small random weights."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import CLIPImageProcessor

from scaling_dit.encoders import clip_vision
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.features import blip, clip_pairs, published
from scaling_dit.evaluation.metric import Item, Skipped
from scaling_dit.evaluation.metrics import aesthetic, hpsv2, image_reward, pickscore
from scaling_dit.evaluation.scoring import Scoring, score, score_together
from tests.support import blip_reference, text_towers
from tests.support.own_sources import Counted

PROMPTS = ["a red circle", "it's a dog, 3.14", "", "long, " * 60, "two cats"]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
# The same everywhere, so that the towers are compiled once.
BATCH = 3
ITEMS = [Item(str(i), prompt) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text_towers.clip().save_pretrained(folder)
    text_towers.save_clip_words(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own: (cosines [5], image embeddings [5, 16])."""
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    pixels = CLIPImageProcessor(**size)(list(map(Image.fromarray, IMAGES)), return_tensors="pt")[
        "pixel_values"
    ]
    text = clip_vision.open_text(str(folder), "tiny", str(folder))
    ids = torch.tensor(text.tokenize(PROMPTS)[0]).long()
    with torch.no_grad():
        found = text_towers.clip()(input_ids=ids, pixel_values=pixels)
    return (found.image_embeds * found.text_embeds).sum(-1).numpy(), found.image_embeds.numpy()


def clip_fields(folder):
    return {"weights": str(folder), "tokenizer_files": str(folder), "batch": BATCH}


def scores(metric):
    result, rows = score(Scoring("m", metric, ITEMS, 3), [IMAGES], 0)
    return result, rows.column("score")


def test_clip_score_is_torchmetrics_(folder, theirs):
    """100 times the cosine; over the batch the mean, cut off at 0."""
    metric = METRICS["clip_score"](size="tiny", **clip_fields(folder))
    result, found = scores(metric)
    np.testing.assert_allclose(found, 100 * theirs[0], atol=1e-3)
    assert result["scalars"]["clip_score"] == pytest.approx(max(100 * theirs[0].mean(), 0), abs=1e-3)
    assert result["n"] == 5 and len(result["interval"]) == 2
    assert (
        metric.about()["weights_sha256"] == published.digest(str(folder)) and "28" in metric.about()["resize"]
    )
    assert metric.items(Counted(), 2)[1].prompt == "number 1"


def test_hpsv2_and_pickscore(folder, theirs, monkeypatch):
    for module in (hpsv2, pickscore):
        monkeypatch.setattr(module, "_SIZE", "tiny")
    metric = METRICS["hpsv2"](**clip_fields(folder))
    np.testing.assert_allclose(scores(metric)[1], 100 * theirs[0], atol=1e-3)
    assert metric.about()["judge"] == "HPS v2.1" and list(scores(metric)[0]["scalars"]) == ["hpsv2"]
    factor = text_towers.clip().logit_scale.exp().item()
    found = scores(METRICS["pickscore"](**clip_fields(folder)))[1]
    np.testing.assert_allclose(found, factor * theirs[0], atol=1e-3 * factor)


def test_aesthetic_is_its_linear_layers_one_after_the_other(folder, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(aesthetic, "_SIZE", "tiny")
    rng, x, state = np.random.default_rng(1), theirs[1], {}
    sides = (16, 1024, 128, 64, 16, 1)
    for i, (inputs, outputs) in zip(aesthetic.LAYERS, itertools.pairwise(sides), strict=True):
        weight = rng.normal(size=(outputs, inputs)).astype(np.float32) / inputs**0.5
        state |= {
            f"layers.{i}.weight": weight,
            f"layers.{i}.bias": rng.normal(size=outputs).astype(np.float32),
        }
        x = x @ weight.T + state[f"layers.{i}.bias"]
    path = tmp_path / "head.safetensors"
    save_file(state, path)
    metric = METRICS["aesthetic"](weights=str(path), clip_weights=str(folder), batch=2)
    np.testing.assert_allclose(scores(metric)[1], x[:, 0], atol=1e-4)
    assert set(metric.about()) == {"judge", "weights_sha256", "clip_weights_sha256", "resize"}
    save_file(state | {"layers.9.bias": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"is no linear aesthetic predictor, it has layers.9.bias"):
        aesthetic.load_head(str(path), 16)
    save_file(state | {"layers.4.weight": np.zeros((64, 9), np.float32)}, path)
    with pytest.raises(UserError, match=r"layers.4.weight is \(64, 9\), its bias \(64,\); it has 128 inputs"):
        aesthetic.load_head(str(path), 16)


def test_metrics_of_one_clip_run_its_image_tower_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(aesthetic, "_SIZE", "tiny")
    loaded, load = [], clip_vision.load_vision
    monkeypatch.setattr(clip_vision, "load_vision", lambda *where: loaded.append(where) or load(*where))
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    state, sides = {}, (16, 1024, 128, 64, 16, 1)
    for i, (inputs, outputs) in zip(aesthetic.LAYERS, itertools.pairwise(sides), strict=True):
        state |= {f"layers.{i}.weight": np.full((outputs, inputs), 0.1, np.float32)}
        state |= {f"layers.{i}.bias": np.ones(outputs, np.float32)}
    save_file(state, tmp_path / "head.safetensors")
    metrics = (
        METRICS["clip_score"](size="tiny", **clip_fields(copy)),
        METRICS["aesthetic"](weights=str(tmp_path / "head.safetensors"), clip_weights=str(copy), batch=BATCH),
    )
    assert metrics[0].tower() == metrics[1].tower()
    alone = [scores(metric) for metric in metrics]
    tower = clip_pairs.open_tower(str(copy), "tiny", BATCH)
    calls, run = [], tower._function
    monkeypatch.setattr(tower, "_function", lambda images: calls.append(len(images)) or run(images))
    # What it has seen last is forgotten.
    tower._results.clear()
    both = score_together([Scoring("m", metric, ITEMS, BATCH) for metric in metrics], [IMAGES], 0)
    for (result, rows), (other, column) in zip(both, alone, strict=True):
        assert result == other and rows.column("score").tolist() == column.tolist()
    assert calls == [3, 2] and len(loaded) == 1


def test_image_reward_of_a_folder_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reward, "_SIZE", "tiny")
    monkeypatch.setenv(published.FOLDER, str(tmp_path))
    metric = METRICS["image_reward"](batch=2)
    with pytest.raises(
        Skipped, match=r"no ImageReward.safetensors in .* import --from=FILE --to=safetensors"
    ):
        metric.items(Counted(), 2)
    save_file(
        blip_reference.published(blip_reference.build(blip.SIZES["tiny"])),
        tmp_path / "ImageReward.safetensors",
    )
    with pytest.raises(Skipped, match=r"no bert-base-uncased/vocab.txt"):
        metric.items(Counted(), 2)
    (tmp_path / "bert-base-uncased").mkdir()
    blip_reference.vocabulary(tmp_path / "bert-base-uncased")
    assert len(metric.items(Counted(), 2)) == 2
    result, found = scores(metric)
    assert result["scalars"]["image_reward"] == pytest.approx(found.mean()) and np.ptp(found) > 0


@pytest.mark.parametrize(
    "name", ["clip_score", "hpsv2", "pickscore", "aesthetic", "image_reward", "fid", "cmmd"]
)
def test_without_weights_a_metric_is_skipped(name, monkeypatch):
    monkeypatch.delenv(published.FOLDER, raising=False)
    with pytest.raises(
        Skipped, match=rf"metric '{name}' lacks weights: .*\$SCALING_DIT_WEIGHTS is not set.* get it from"
    ):
        METRICS[name]().items(Counted(), 2)
    with pytest.raises(Skipped, match="no file or folder /nowhere; get it from http"):
        METRICS[name](weights="/nowhere").items(Counted(), 2)


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match=r"metrics.hpsv2.version is 'v3'; did you mean 'v2'\?"):
        METRICS["hpsv2"](version="v3")
    with pytest.raises(UserError, match=r"metrics.clip_score.size is 'clip-xl'; did you mean 'clip-l'\?"):
        METRICS["clip_score"](size="clip-xl")
    with pytest.raises(UserError, match="weights is 'random'; it must be a file or folder of weights"):
        METRICS["fid"](weights="random").items(Counted(), 2)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert published.digest(str(copy)) == published.digest(str(folder))

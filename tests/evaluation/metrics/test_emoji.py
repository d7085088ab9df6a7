"""The metric `emoji`: real drawings are right, others wrong by the parts that differ, seen and held-out apart."""

import json

import numpy as np
import pytest
from PIL import Image

from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metrics import emoji as metric_lib
from scaling_dit.evaluation.scoring import Scoring, score
from tests.support import drawn_emoji


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn_emoji.write(tmp_path_factory.mktemp("emoji") / "out")


@pytest.fixture(scope="module")
def source(folder):
    return create_source(f"folder:{folder}", image_size=16)


def drawings(folder, items):
    return np.stack([np.asarray(Image.open(folder / f"images/{item.id}.png")) for item in items])


def scored(items, images, metric=None, batch=7):
    return score(Scoring("emoji", metric or METRICS["emoji"](), items, batch=batch), [images], 0)


def test_real_drawings_are_right(folder, source):
    items = METRICS["emoji"]().items(source, 40)
    noise = np.random.default_rng(0).normal(0, 12, (40, 16, 16, 3))
    noisy = np.clip(drawings(folder, items) + noise, 0, 255).astype(np.uint8)
    result, rows = scored(items, noisy)
    assert result["scalars"] == dict.fromkeys(
        (
            "emoji",
            "emoji_who",
            "emoji_what",
            "emoji_tone",
            "emoji_all",
            "emoji_all_seen",
            "emoji_all_held_out",
        ),
        1.0,
    )
    assert [row["nearest"] for row in rows] == [item.id for item in items]
    assert result["interval_by_type"]["all_held_out"] == [1.0, 1.0] and result["n"] == 40
    assert "right in all" in METRICS["emoji"]().table(result)


def test_half_of_the_prompts_are_combinations_that_training_lacks(folder, source):
    items = METRICS["emoji"]().items(source, 40)
    held = {json.loads(line)["file_name"] for line in (folder / "held_out.jsonl").read_text().splitlines()}
    unseen = [f"images/{item.id}.png" in held for item in items]
    assert unseen[:20] == [False, True] * 10
    trained = {source[i]["captions"][1] for i in range(len(source))}
    assert all((item.prompt in trained) != new for item, new in zip(items, unseen, strict=True))
    assert len({item.id for item in items}) == 40
    with pytest.raises(UserError, match=r"999 prompts are asked for, but .* emoji; ask for at most"):
        METRICS["emoji"]().items(source, 999)


def test_only_the_parts_that_differ_are_wrong(folder, source):
    items = list(METRICS["emoji"]().items(source, 40))
    of = {line["own"][1]: line for line in metric_lib.read_lines(str(folder))[0]}
    other = {"light": "dark", "dark": "light"}
    chosen, shown = [], []
    for item in items:
        line = of[item.prompt]
        if line["tone"] in other:
            chosen.append(item)
            shown.append(f"{item.id.rpartition(line['tone'])[0]}{other[line['tone']]}")
    images = np.stack([np.asarray(Image.open(folder / f"images/{key}.png")) for key in shown])
    scalars = scored(chosen, images)[0]["scalars"]
    assert len(chosen) > 5
    assert (scalars["emoji_who"], scalars["emoji_what"], scalars["emoji_tone"]) == (1, 1, 0)
    assert scalars["emoji_all"] == 0 and scalars["emoji"] == pytest.approx(2 / 3)


def test_a_sparse_prompt_leaves_the_tone_open(folder, source):
    metric = METRICS["emoji"](kind="alt")
    items = metric.items(source, 10)
    assert not any("tone" in item.prompt for item in items)
    scalars = scored(items, drawings(folder, items), metric)[0]["scalars"]
    assert scalars["emoji"] == 1 and "emoji_tone" not in scalars


def test_wrong_captions_change_no_prompt(tmp_path, source):
    wrong = create_source(f"folder:{drawn_emoji.write(tmp_path, wrong=0.5)}", image_size=16)
    prompts = [[item.prompt for item in METRICS["emoji"]().items(one, 40)] for one in (source, wrong)]
    assert prompts[0] == prompts[1]


def test_of_equal_drawings_the_one_asked_for_counts(tmp_path):
    folder = drawn_emoji.write(tmp_path)
    source = create_source(f"folder:{folder}", image_size=16)
    items = METRICS["emoji"]().items(source, 2)
    # All drawings are one.
    image = (folder / f"images/{items[0].id}.png").read_bytes()
    for path in (folder / "images").iterdir():
        path.write_bytes(image)
    assert scored(items, drawings(folder, items))[0]["scalars"]["emoji_all"] == 1


def test_other_data_are_refused(tmp_path, folder):
    with pytest.raises(
        UserError, match=r"metric 'emoji' reads the folder that `python -m scaling_dit.data.emoji`"
    ):
        METRICS["emoji"]().items(create_source("shapes"), 4)
    with pytest.raises(UserError, match="it must be alt or long"):
        METRICS["emoji"](kind="short")
    broken = drawn_emoji.write(tmp_path)
    (broken / "held_out.jsonl").write_text('{"file_name": "images/a.png"}\n')
    source = create_source(f"folder:{broken}", image_size=16)
    with pytest.raises(UserError, match=r"held_out.jsonl line 1 is none of"):
        METRICS["emoji"]().items(source, 4)

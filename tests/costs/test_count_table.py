"""The `count` verb against the function it shows, and its shapes against the run's."""

import functools
import json

import pytest

from scaling_dit import backbones
from scaling_dit.cli.costs import Count
from scaling_dit.costs import count_table
from scaling_dit.costs.count import count
from scaling_dit.errors import UserError

FIELDS = {"hidden": 32, "depth": 2, "heads": 2, "patch": 2}
SHAPES = ["--latents=8,8,3", "--text=5,16"]
OVERRIDES = [f"--config.backbone.{name}={value}" for name, value in FIELDS.items()]


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """A backbone is counted once for all tests here: what the verb shows of it is the subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling_dit.costs.count.count", functools.cache(count))
        yield


def table(*arguments):
    assert Count.parse(arguments).run() == 0


def figures(capsys, *arguments):
    table(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_a_backbone_alone(capsys):
    found = figures(capsys, "--backbone=uvit", *OVERRIDES, *SHAPES)
    expected = count(backbones.create("uvit", in_channels=3, text_dim=16, **FIELDS), (8, 8, 3), (5, 16))
    assert found["params"] == expected.params
    assert found["macs_paper"] == expected.macs_paper < found["macs_total"] == expected.macs_total
    assert sum(part["params"] for part in found["modules"].values()) == expected.params
    # There is no batch and no steps to multiply with.
    assert "train_flops_total" not in found


def test_a_unet_has_channels_of_its_own(capsys):
    """Its field of that name is no clash with the channels of latents."""
    fields = {
        "channels": 32,
        "channel_mult": "(1,)",
        "res_blocks": 1,
        "transformer_depth": "(1,)",
        "head_dim": 32,
    }
    overrides = [f"--config.backbone.{name}={value}" for name, value in fields.items()]
    found = figures(capsys, "--backbone=unet", *overrides, *SHAPES)
    assert found["modules"]["conv_in"]["params"] == 3 * 9 * 32 + 32
    assert 0 < found["macs_attention"] < found["macs_paper"]


def test_an_experiment_gives_shapes_batch_and_steps(capsys):
    found = figures(capsys, "--config=shapes:smoke", "--config.steps=10", "--config.batch=6")
    assert found["latents"] == [16, 16, 3]
    assert found["train_flops_total"] == 6 * found["macs_total"] * 10 * 6
    assert found["train_flops_paper"] == 6 * found["macs_paper"] * 10 * 6
    wider = figures(capsys, "--config=shapes:smoke", "--latents=32,32,3")
    assert wider["macs_total"] > found["macs_total"]


def test_the_table_shows_the_figures(capsys):
    found = figures(capsys, "--backbone=uvit", *OVERRIDES, *SHAPES)
    table("--backbone=uvit", *OVERRIDES, *SHAPES)
    text = capsys.readouterr().out
    assert "backbone uvit, latents 8x8x3, text 5x16" in text
    for name in ("params", "macs_paper", "macs_attention", "macs_total", "activation_bytes"):
        assert f"{found[name]:,}" in text
    assert all(name in text for name in found["modules"])


def test_depth_splits_modules(capsys):
    whole = figures(capsys, "--backbone=uvit", *OVERRIDES, *SHAPES)["modules"]
    parts = figures(capsys, "--backbone=uvit", *OVERRIDES, *SHAPES, "--depth=2")["modules"]
    names = [name for name in parts if name.startswith("mid_block/")]
    assert {"mid_block/attn", "mid_block/mlp"} <= set(names)
    for figure in ("params", "macs_paper", "macs_attention", "macs_total"):
        assert sum(parts[name][figure] for name in names) == whole["mid_block"][figure]
    assert parts["mid_block/attn"]["macs_attention"] == whole["mid_block"]["macs_attention"] > 0


@pytest.mark.parametrize(
    "value, text", [(999, "999"), (1234, "1.23 k"), (10**9, "1 G"), (2_344_200_356, "2.34 G")]
)
def test_short_figures(value, text):
    assert count_table._short(value) == text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --config or --backbone"),
        (["--config=shapes", "--backbone=uvit"], "either --config or --backbone"),
        (["--backbone=uvti"], "did you mean 'uvit'"),
        (["--backbone=uvit", "--config.batch=3"], "only --config.backbone.KEY=VALUE can be set"),
        (["--backbone=uvit", "--config.backbone.hiden=3"], "did you mean 'backbone.hidden'"),
        (["--backbone=uvit", "--config.backbone.text_dim=3"], "it follows from --latents and --text"),
        (["--config=shapes:smoke", "--config.backbone.text_dim=3"], "set config.text_encoder.dim"),
        (
            ["--backbone=uvit", "--latents=8,0,3"],
            "--latents=8,0,3: it must be height,width,channels in whole",
        ),
        (["--backbone=uvit", "--text=8"], "--text=8: it must be length,width"),
        (["--backbone=uvit", "--text=8,wide"], "--text=8,wide: it must be length,width"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        table(*arguments)

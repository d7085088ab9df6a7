"""Folders that diffusers reads and writes: the same config.json, names and values there and back, the same outputs."""

import contextlib
import inspect
import json
import logging
import warnings

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

import scaling_dit
from scaling_dit import backbones
from scaling_dit.backbones.declared import built_in_diffusers
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.interop import exporting
from scaling_dit.interop.diffusers import config as diffusers_config
from scaling_dit.weights import files as weight_files

pytestmark = pytest.mark.usefixtures("on_one_device")
FAMILIES = built_in_diffusers()
SMOKE = "experiments/shapes.py:smoke"
# Of that run: pixels, and the width of the text.
SIZE, CHANNELS, TEXT = 16, 3, 32


def lumina(model, latents, timesteps, text):
    rotary = get_2d_rotary_pos_embed_lumina(model.head_dim, SIZE // 2, SIZE // 2)
    mask = torch.ones(text.shape[:2], dtype=torch.int64)
    return model(latents, timesteps, text, mask, rotary, cross_attention_kwargs={}).sample


def unet(model, latents, timesteps, text):
    return model(latents, timesteps, text).sample


UNET = {
    "sample_size": SIZE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
}


def pixart(model, latents, timesteps, text):
    conditions = {"resolution": None, "aspect_ratio": None}
    return model(latents, text, timesteps, added_cond_kwargs=conditions).sample


# name of our backbone -> (arguments of diffusers' class, how it is called)
MODELS = {
    "next_dit": (
        {
            "in_channels": CHANNELS, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
            "cross_attention_dim": TEXT, "learn_sigma": True, "sample_size": 7,
        },
        lumina,
    ),
    "pixart": (
        {
            "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS,
            "num_layers": 2, "cross_attention_dim": 32, "caption_channels": TEXT, "sample_size": 12,
        },
        pixart,
    ),
    "unet": (
        UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
        },
        unet,
    ),
    "unet_if": (
        UNET
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "attention_head_dim": 32,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
        },
        unet,
    ),
}  # fmt: skip
# Its default asks for the package accelerate, and warns where it is missing, whatever the folder.
EAGER = {"low_cpu_mem_usage": False}
FAST = ("next_dit",)
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@contextlib.contextmanager
def no_warnings(caplog):
    """Fails if diffusers warns, by its logger or Python's."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="diffusers"):
            warnings.simplefilter("error")
            caplog.clear()
            yield
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records]


def published(name, folder, dtype=torch.float32, **changes):
    """A folder that diffusers' save_pretrained wrote of a tiny random model, and the model."""
    torch.manual_seed(0)
    arguments, _ = MODELS[name]
    model = getattr(diffusers, FAMILIES[name].class_name)(**(arguments | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Gates and heads too, which start at zero.
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        own = dict(model.named_parameters())
        # One projection of the queries.
        for key, value in own.items():
            if "attn1.to_q" in key or "attn1.norm_q" in key:
                own.get(key.replace("attn1", "attn2"), value).copy_(value)
    model.to(dtype).save_pretrained(folder)
    return model


def command(verb, *arguments):
    return cli.main([verb, *map(str, arguments)])


def files(folder):
    config = json.loads((folder / "config.json").read_text())
    return {
        k: v for k, v in config.items() if k not in ("_diffusers_version", "_name_or_path")
    }, weight_files.read(exporting.epath.Path(folder))


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_folder_to_run_to_diffusers_folder(name, tmp_path, caplog, capsys):
    theirs = published(name, tmp_path / "published")
    imported = [f"--from={tmp_path / 'published'}", f"--workdir={tmp_path / 'run'}", f"--config={SMOKE}"]
    assert command("import", *imported, f"--config.backbone.name={name}") == 0, capsys.readouterr().err
    assert (
        command("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--to=diffusers") == 0
    )

    (config, weights), (config_out, weights_out) = files(tmp_path / "published"), files(tmp_path / "out")
    assert config_out == config
    assert weights_out.keys() == weights.keys()
    for key in weights:
        np.testing.assert_array_equal(weights_out[key], weights[key], err_msg=key)

    with no_warnings(caplog):
        back = getattr(diffusers, FAMILIES[name].class_name).from_pretrained(tmp_path / "out", **EAGER)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, SIZE, SIZE, CHANNELS)).astype(np.float32)
    text = rng.normal(size=(2, 5, TEXT)).astype(np.float32)
    times = np.array([3.0, 640.0], np.float32)
    with torch.no_grad():
        wanted, found = (
            MODELS[name][1](
                model,
                torch.from_numpy(latents).permute(0, 3, 1, 2),
                torch.from_numpy(times),
                torch.from_numpy(text),
            )
            for model in (theirs, back)
        )
    assert torch.equal(found, wanted)
    pipe = scaling_dit.load(tmp_path / "run")
    ours = np.asarray(pipe.predict(jnp.asarray(latents), jnp.asarray(times), jnp.asarray(text)))
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_class(name):
    family = FAMILIES[name]
    arguments = dict(inspect.signature(getattr(diffusers, family.class_name).__init__).parameters)
    del arguments["self"]
    assert {key: parameter.default for key, parameter in arguments.items()} == family.defaults


SIZES = {
    "pixart": [
        {"size": "h1024-d28", "text_dim": 1024},
        {"size": "h2304-d28", "base_size": 32, "learn_sigma": True},
        {"out_channels": 3, "in_channels": 1},
    ],
    "next_dit": [{}, {"kv_heads": 8, "learn_sigma": True, "qk_norm": False}],
    "unet": [{"size": size} for size in ("sd2", "sdxl-td4_4", "sdxl-c384-td4_12")]
    + [{"size": "sdxl-official", "text_dim": 2048}, {"out_channels": 8}],
    "unet_if": [{"size": "if-xl"}],
}


@pytest.mark.parametrize("name, fields", [(name, fields) for name in SIZES for fields in SIZES[name]])
def test_the_arguments_of_a_size_give_back_the_same_backbone(name, fields):
    family = FAMILIES[name]
    backbone = backbones.create(name, **fields)
    config = json.loads(json.dumps(diffusers_config.write_config(name, backbone, (32, 32))))
    assert diffusers_config.family_of(config, "it") == (name, family)
    again = backbones.create(name, size=None, **diffusers_config.read_fields(family, config, "it"))
    diffusers_config.check_same(name, family, config, again, (32, 32), "it")
    for what in ("widths", "shape"):
        assert getattr(again, what, None) == getattr(backbone, what, None)


def test_channels_that_the_class_cannot_have_are_told():
    backbone = backbones.create("next_dit", out_channels=3)
    with pytest.raises(UserError, match="out_channels is 3, but diffusers' model returns the 4 that come in"):
        diffusers_config.write_config("next_dit", backbone, (32, 32))


@pytest.mark.slow
def test_a_halved_sharded_folder_is_read(tmp_path, capsys):
    model = published("next_dit", tmp_path / "published", torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    imported = [f"--workdir={tmp_path / 'run'}", f"--config={SMOKE}", "--config.backbone.name=next_dit"]
    assert command("import", f"--from={tmp_path / 'sharded'}", *imported) == 0, capsys.readouterr().err
    pipe = scaling_dit.load(tmp_path / "run")
    found = scaling_dit.interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]})
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(found[key], value.float().numpy(), err_msg=key)
    exporting.main(
        str(tmp_path / "run"), str(tmp_path / "out"), to="diffusers", ema="none", shard_bytes=20000
    )
    back = diffusers.LuminaNextDiT2DModel.from_pretrained(tmp_path / "out", **EAGER)
    for key, value in back.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), found[key], err_msg=key)


def test_positions_of_pixart_are_those_of_the_folder():
    family = FAMILIES["pixart"]

    def base_size(**arguments):
        return diffusers_config.read_fields(family, arguments, "it")["base_size"]

    assert base_size(sample_size=32) == 16 and base_size(sample_size=64) == 32
    # Scaled by two unless it says otherwise.
    assert base_size(sample_size=128, use_additional_conditions=False) == 32
    assert base_size(sample_size=64, interpolation_scale=2) == 16
    with pytest.raises(UserError, match="no whole number of tokens"):
        base_size(sample_size=64, interpolation_scale=3)
    with pytest.raises(UserError, match="reads sizes, which pixart does not"):
        base_size(sample_size=128)
    older = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    assert diffusers_config.family_of(older, "it") == ("pixart", family)
    with pytest.raises(UserError, match="is of a Transformer2DModel, which no backbone here computes"):
        diffusers_config.family_of(older | {"norm_type": "ada_norm_zero"}, "it")


def refuses(capsys, match, folder, *overrides):
    arguments = [f"--from={folder}", f"--workdir={folder.parent / 'run'}", f"--config={SMOKE}", *overrides]
    capsys.readouterr()
    assert command("import", *arguments) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1, error
    assert not (folder.parent / "run").exists()


def test_a_config_that_contradicts_the_folder_is_one_line(tmp_path, capsys):
    folder, name = tmp_path / "published", "--config.backbone.name=next_dit"
    published("next_dit", folder)
    refuses(capsys, "but", folder)
    refuses(capsys, "config.backbone.name is 'uvit', but", folder)
    refuses(capsys, "add --config.backbone.name=next_dit", folder)
    refuses(capsys, "config.backbone.hidden is 64, but", folder, name, "--config.backbone.hidden=64")
    refuses(capsys, "has hidden_size 32; backbone", folder, name, "--config.backbone.size=h2304-d24-n32")
    refuses(capsys, "has text_dim 32, but this run gives 16; set config.text_encoder.dim", folder, name,
            "--config.text_encoder.dim=16")  # fmt: skip


def test_what_our_backbone_does_not_compute_is_one_line(tmp_path, capsys):
    folder, name = tmp_path / "published", "--config.backbone.name=next_dit"
    published("next_dit", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def changed(**arguments):
        path.write_text(json.dumps(config | arguments))

    changed(norm_eps=1e-3)
    refuses(capsys, "has norm_eps 0.001; backbone 'next_dit' computes with 1e-05 here", folder, name)
    changed(adapters="on")
    refuses(capsys, "sets adapters, which LuminaNextDiT2DModel does not have", folder, name)
    changed(num_layers=3)
    refuses(capsys, "missing: layers.2.", folder, name)
    changed(hidden_size="wide")
    refuses(capsys, "must be a positive integer, got 'wide'", folder, name)
    changed(_class_name="LuminaNextDiT2D")
    refuses(capsys, "which no backbone here computes; did you mean 'LuminaNextDiT2DModel'?", folder, name)

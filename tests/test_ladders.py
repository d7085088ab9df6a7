"""The papers' ladders: one recipe, names that say what a row is, and train steps of the real sizes on shapes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scaling_dit.experiments import dit_scaling, unet_scaling

from scaling_dit import backbones
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.state import init_state
from scaling_dit.costs import count_table
from scaling_dit.encoders import scratch
from scaling_dit.errors import UserError
from scaling_dit.model.build import abstract_params, build_model, open_source
from scaling_dit.training import optim, step
from tools.model_table import PRINTED

FILES = {"unet_scaling": unet_scaling, "dit_scaling": dit_scaling}
ROWS = [f"{name}:{row}" for name, file in FILES.items() for row in file.ARGUMENTS]
# Of each ladder of transformers the smallest and the largest, which differ from those between in numbers alone, and of
# the UNets one for each form. Every row's backbone is traced at its real size where it is counted.
QUICK = ("dit_scaling:uvit-h2048-d42-n16",)
TRACED = [
    f"dit_scaling:{family}-{ladder[end]}" for family, ladder in dit_scaling.LADDERS.items() for end in (0, -1)
]
TRACED += ["unet_scaling:sd2", "unet_scaling:sdxl-td4_4", "unet_scaling:if-xl"]
# UNets are traced block by block, so these have one a level, at its real width, in place of two or three alike.


def load(row, overrides=()):
    return config_lib.load(f"experiments/{row.replace(':', '.py:')}", overrides)


@functools.cache
def loaded(row):
    return load(row)


def backbone(row):
    return backbones.create(**loaded(row).backbone.to_dict())


def unet_name(module):
    """The row of the paper's Table 1 that a UNet's numbers are called."""
    shape = module.shape
    if not hasattr(shape, "depths"):
        name, base = "if-xl", 704
        assert shape.widths == tuple(shape.widths[0] * n for n in (1, 2, 3, 4))
    elif len(shape.widths) == 4:
        name, base = "sd2", 320
        assert shape.depths == (1, 1, 1, 0)
    else:
        name, base = "sdxl", 320
    if shape.widths[0] != base:
        name += f"-c{shape.widths[0]}"
    if name.startswith("sdxl") and shape.depths[1:] != (2, 10):
        half, quarter = shape.depths[1:]
        name += f"-td{quarter}" if half == 2 else f"-td{half}_{quarter}"
    return name


@pytest.mark.parametrize("row", ROWS)
def test_a_name_says_what_the_row_is(row):
    module, argument = backbone(row), row.partition(":")[2]
    if row.startswith("unet"):
        assert argument == unet_name(module)
    else:
        hidden, depth, heads = module.widths
        size = f"h{hidden}-d{depth}" + (f"-n{heads}" if loaded(row).backbone.name != "pixart" else "")
        assert argument == f"{loaded(row).backbone.name}-{size}"
        assert heads in (16, 32)
    assert (module.dtype, module.param_dtype) == ("bfloat16", "float32")


def test_rows_differ_in_the_backbone_alone():
    def rest(row):
        return {k: v for k, v in config_lib.flatten(loaded(row)).items() if not k.startswith("backbone.")}

    assert all(rest(row) == rest(ROWS[0]) for row in ROWS)
    backbones_of = [tuple(sorted(loaded(row).backbone.to_dict().items())) for row in ROWS]
    assert len(set(map(str, backbones_of))) == len(ROWS)


def test_the_recipe_is_the_papers():
    config = config_lib.flatten(loaded("unet_scaling:sdxl"))
    expected = {
        "steps": 600_000,
        "batch": 2048,
        "optim.learning_rate": 8e-5,
        "optim.warmup_steps": 10_000,
        "optim.decay": "constant",
        "diffusion.schedule": "scaled_linear",
        "diffusion.prediction": "eps",
        "diffusion.weighting": "none",
        "diffusion.caption_drop": 0.1,
        "captions.policy": "mix",
        "captions.alt": 0.5,
        "captions.synthetic": 0.5,
        "sample.sampler": "ddim",
        "sample.steps": 50,
        "sample.guidance": 7.5,
        "sample.ema": 0.0,
        "backbone.dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected


def test_every_row_of_the_first_papers_tables_is_there():
    for row in PRINTED:
        ladder = (
            f"unet_scaling:{row.size}" if "unet" in row.backbone else f"dit_scaling:{row.backbone}-{row.size}"
        )
        assert ladder in ROWS


@pytest.mark.parametrize(
    "row", [*QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in dict.fromkeys(TRACED))]
)
def test_a_train_step_of_the_real_size(row):
    """Initial state and one update, optimiser and average included, at the papers' shapes; nothing is allocated."""
    thinned = row.startswith("unet")
    config = load(row, ["--config.backbone.res_blocks=1"]) if thinned else loaded(row)
    model = build_model(config, _tokenizer())
    assert model.latent_shape == count_table.LATENTS
    assert (model.text_encoder.length, model.text_encoder.dim) == count_table.TEXT
    optimizer = optim.make_optimizer(config.optim, config.steps)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer, config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((config.batch, 77), jnp.int32)
    images = jax.ShapeDtypeStruct((config.batch, 64, 64, 3), jnp.uint8)
    batch = {"images": images, "ids": ids, "mask": jax.ShapeDtypeStruct(ids.shape, jnp.bool_)}
    after, metrics = jax.eval_shape(
        step.make_train_step(model, optimizer, config), state, {"codec": {}}, batch
    )
    assert after == state
    assert metrics["loss"].shape == ()
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.emas)]
    assert sizes[0] == sizes[1]
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.ndim)


@functools.cache
def _tokenizer():
    return scratch.build_tokenizer(open_source(loaded(ROWS[0])))


MINIATURE = {
    "backbone.size": "h32-d2-n2",
    "text_encoder.dim": 32,
    "text_encoder.heads": 2,
    "text_encoder.depth": 1,
    "text_encoder.length": 12,
    "steps": 2,
    "batch": 8,
    "eval.every": 0,
    "log.every": 1,
    "log.tensorboard": False,
}


@pytest.mark.slow
def test_the_recipe_trains_in_miniature(tmp_path):
    import scaling_dit

    overrides = [f"--config.{key}={value}" for key, value in MINIATURE.items()]
    config = load("dit_scaling:uvit-h2048-d42-n16", overrides)
    state = scaling_dit.train(config, tmp_path, jax.devices()[:1])
    assert int(state.step) == 2
    run = scaling_dit.load(tmp_path)
    assert run.model.latent_shape == (32, 32, 4)
    optimizer = optim.make_optimizer(config.optim, 2)
    started = jax.jit(lambda key: init_state(run.model, optimizer, config, key).params)(
        jax.random.key(config.seed)
    )
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - np.asarray(b)).max()), started, jax.device_get(state.params)
    )
    # One step of warm-up from zero, and no more.
    assert 0 < max(jax.tree.leaves(moved)) < 2 * 8e-5


@pytest.mark.slow
def test_the_papers_encoders_take_the_stand_ins_place():
    plain, pretrained = (load(f"unet_scaling:sdxl-td4_4{option}") for option in ("", ",pretrained"))
    assert pretrained.backbone == plain.backbone and pretrained.optim == plain.optim
    assert (pretrained.codec.name, pretrained.text_encoder.name) == ("vae", "clip")
    assert not pretrained.train_text_encoder and not pretrained.text_mask
    shapes = abstract_params(pretrained)
    # evaluated sizes of SDXL's autoencoder, and of OpenCLIP-H's text tower without its last layer
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) for name in ("codec", "text_encoder")
    }
    assert sizes["codec"] == 83_653_863 and round(sizes["text_encoder"] / 1e6, 1) == 340.4
    with pytest.raises(UserError, match="no option 'pretraind' after the comma; did you mean 'pretrained'"):
        load("unet_scaling:sdxl-td4_4,pretraind")

"""The training recipe of arXiv 2404.02883 ("P1", section 3), once: the paper experiments replace the backbone alone.

What P1 states is set as it states it. Fields that it leaves open are marked "open" below and have Stable Diffusion's
values, which P1 follows. arXiv 2412.12391 reports the same learning rate, warm-up, batch and guidance.

Data and encoders are stand-ins by default. P1 trains on 250M pairs, through the frozen autoencoder of SDXL and the
frozen text encoder of OpenCLIP-H. Here the built-in shapes at 64 px go through a fixed transform, and captions through
a small text encoder that is trained along. This needs neither weights nor data, and every tensor has the papers' shape,
latents 32 x 32 x 4 and text 77 x 1024. So cost, memory and speed are the papers', and quality is measured on shapes.

`,pretrained` after the row, as in `unet_scaling:sdxl-td4_4,pretrained`, puts the papers' encoders in their place:
SDXL's autoencoder and OpenCLIP-H's text encoder, frozen, on a set that `prepare` made. You name their weights and the
set:

    --config.codec.weights=PLACE --config.text_encoder.weights=PLACE --config.source.name=latents:FOLDER
"""

from typing import Any

from ml_collections import ConfigDict

from scaling_dit import backbones
from scaling_dit import config as config_lib

# What may follow a row, after a comma.
OPTIONS = ("pretrained",)


def recipe(backbone: str, *, option: str = "", **fields: Any) -> ConfigDict:
    """The recipe for a backbone and its fields, such as `size`; `option` is "" or one of OPTIONS."""
    config = config_lib.defaults()
    config.steps = 600_000
    config.batch = 2048
    # bfloat16 products, float32 parameters. Scanned layers and recomputation change the cost, not the result.
    modes = {"dtype": "bfloat16", "scan_layers": True, "remat": "products"}
    known = backbones.backbone_fields(backbone)
    modes = {name: value for name, value in modes.items() if name in known}
    config.backbone = ConfigDict({"name": backbone} | modes | fields)
    stand_ins(config)
    # Alt-text, or half of the time one of five synthetic captions ("Top-5 Syn", Table 4). Shapes have one kind alone.
    config.captions.update({"policy": "mix", "alt": 0.5, "synthetic": 0.5, "long": 0.0})
    config.diffusion.update(
        {
            # 1000 steps, "the setup of LDM"
            "schedule": "scaled_linear",
            "prediction": "eps",
            "weighting": "none",
            "time_sampling": "uniform",
            # open
            "caption_drop": 0.1,
        }
    )
    config.optim.update(
        {
            "learning_rate": 8e-5,
            "warmup_steps": 10_000,
            "decay": "constant",
            # open, as the next four
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            # open; P1 evaluates the raw weights
            "ema": (0.9999,),
        }
    )
    config.sample.update({"sampler": "ddim", "steps": 50, "guidance": 7.5, "ema": 0.0, "batch": 256})
    # FSDP over all devices
    config.mesh.update({"data": 1, "fsdp": -1})
    # P1 evaluates checkpoints along its curves; each one that is evaluated is kept.
    config.eval.update({"every": 50_000, "prompts": 1000, "metrics": ("shapes_tifa",), "loss_images": 2048})
    config.checkpoint.update({"every": 5000, "keep_last": 2, "keep_every": 50_000})
    config.log.every = 100
    # A preempted run compiles nothing when it resumes.
    config.compile_cache = "workdir"
    if option == "pretrained":
        pretrained(config)
    return config


def stand_ins(config: ConfigDict) -> None:
    """Sets data, codec and text encoder to what needs no download, at the papers' shapes."""
    config.source = ConfigDict({"name": "shapes", "preset": "free64"})
    config.codec = ConfigDict({"name": "dct", "patch": 2, "channels": 4})
    config.text_encoder = ConfigDict(
        {"name": "scratch", "length": 77, "dim": 1024, "depth": 2, "heads": 16, "dtype": "bfloat16"}
    )
    # P1: False, for its encoder is pretrained.
    config.train_text_encoder = True
    # P1: False, for all 77 positions of CLIP are attended to.
    config.text_mask = True


def pretrained(config: ConfigDict) -> None:
    """Sets the papers' encoders, frozen, and a prepared set at 256 px; the user sets the places of both."""
    config.source = ConfigDict({"name": "latents:data/latents", "image_size": 256})
    config.codec = ConfigDict({"name": "vae", "size": "sdxl", "dtype": "bfloat16"})
    config.text_encoder = ConfigDict(
        {"name": "clip", "size": "openclip-h", "layer": "penultimate", "dtype": "bfloat16"}
    )
    config.train_text_encoder = False
    # All 77 positions are attended to, as in Stable Diffusion 2.
    config.text_mask = False
    # `shapes_tifa` is for the built-in shapes alone.
    config.eval.metrics = ()

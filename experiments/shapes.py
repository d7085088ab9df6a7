"""Can a text-to-image diffusion transformer learn colours, shapes, sizes and places from nothing, on a laptop?

U-ViT on the built-in compositional shapes (data/shapes.py), with a small text encoder trained along. What `make demo` runs:

    scaling-dit train --config=shapes --workdir=runs/demo
    scaling-dit evaluate --workdir=runs/demo

Slice: none; 2 CPU cores. `shapes:smoke` is the same run in miniature, for tests.
"""

from ml_collections import ConfigDict

from scaling_dit import config as config_lib

ARGUMENTS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    config = config_lib.defaults()
    config.steps = 2000
    config.batch = 64
    config.source = ConfigDict(
        {
            "name": "shapes",
            "preset": "grid16",
            "shapes": ("circle", "square", "triangle"),
            "colours": ("red", "green", "blue", "yellow"),
        }
    )
    config.backbone = ConfigDict(
        {"name": "uvit", "hidden": 128, "depth": 4, "heads": 4, "patch": 4, "positions": "sincos_init"}
    )
    config.text_encoder = ConfigDict({"name": "scratch", "dim": 128, "depth": 1, "heads": 4, "length": 24})
    # x0-prediction, because a patch of 48 noisy numbers is wide for a hidden size of 128: the model need not carry noise.
    config.diffusion.update({"schedule": "cosine", "prediction": "x0", "weighting": "min_snr", "time_sampling": "stratified"})
    config.optim.update(
        {"learning_rate": 2e-3, "decay": "cosine", "final_fraction": 0.02, "b2": 0.99, "ema": (0.995,)}
    )
    config.sample.update({"guidance": 2.0, "ema": 0.995})
    config.eval.update({"every": 500, "metrics": ("tifa",), "prompts": 64})
    if arg == "smoke":
        config.steps = 4
        config.batch = 8
        config.optim.warmup_steps = 1
        config.backbone.update({"hidden": 32, "depth": 2, "heads": 2})
        config.text_encoder.update({"dim": 32, "depth": 1, "heads": 2})
        config.sample.steps = 4
        config.eval.update({"every": 4, "prompts": 4, "loss_images": 8, "grid": 4})
        config.checkpoint.every = 2
        config.log.update({"every": 1})
    return config

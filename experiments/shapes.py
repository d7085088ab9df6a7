"""Can a text-to-image diffusion transformer learn colours, shapes, sizes and places from nothing, on a laptop?

U-ViT on the built-in compositional shapes (data/shapes/), with a small text encoder trained along. `make demo` runs it:

    scaling-dit train --config=shapes --workdir=runs/demo
    scaling-dit evaluate --workdir=runs/demo

Slice: none; 2 CPU cores, about six minutes.

Expect a `shapes_tifa` near 0.8 on 500 held-out scenes; real images of wrong scenes score 0.36. The model learns colours
first, then sizes and numbers, then which shape has which colour, and only begins to learn relations. `shapes:smoke` is
the same run in miniature, for tests.
"""

from ml_collections import ConfigDict

from scaling_dit import config as config_lib

ARGUMENTS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    """The demo's run, or its miniature for `arg` "smoke"."""
    config = config_lib.defaults()
    config.steps = 1200
    config.batch = 128
    config.source = ConfigDict(
        {
            "name": "shapes",
            "preset": "grid16",
            "shapes": ("circle", "square", "triangle"),
            "colours": ("red", "green", "blue", "yellow"),
            "paraphrases": 1,
        }
    )
    # One token for each grid cell: with smaller patches several tokens make up an object and must first learn to agree.
    config.backbone = ConfigDict(
        {"name": "uvit", "hidden": 128, "depth": 4, "heads": 4, "patch": 8, "positions": "sincos_init"}
    )
    config.text_encoder = ConfigDict({"name": "scratch", "dim": 128, "depth": 1, "heads": 4, "length": 16})
    # x0, because a patch of 192 noisy numbers is wider than the model: predicting x0, it need not carry the noise.
    # Unweighted, because the caption matters at high noise, where min-SNR weights vanish.
    config.diffusion.update({"prediction": "x0", "time_sampling": "stratified"})
    config.optim.update(
        {
            "learning_rate": 1.5e-3,
            "warmup_steps": 50,
            "decay": "cosine",
            "final_fraction": 0.02,
            "b2": 0.99,
            "ema": (0.995,),
        }
    )
    config.sample.guidance = 1.5
    config.eval.update({"every": 400, "metrics": ("shapes_tifa",), "prompts": 64})
    config.checkpoint.every = 400
    if arg == "smoke":
        config.steps = 4
        config.batch = 8
        config.optim.warmup_steps = 1
        config.backbone.update({"hidden": 32, "depth": 2, "heads": 2})
        config.text_encoder.update({"dim": 32, "heads": 2})
        config.sample.steps = 4
        config.eval.update({"every": 4, "prompts": 4, "loss_images": 8, "grid": 4})
        config.checkpoint.every = 2
        config.log.every = 1
    return config

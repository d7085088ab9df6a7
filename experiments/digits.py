"""Does the recipe work on real scans, read from an image folder as any user's images are?

U-ViT on scikit-learn's 1,797 handwritten digits, written to an image folder with captions:

    python -m scaling_dit.data.digits data/digits
    scaling-dit train --config=digits --workdir=runs/digits
    scaling-dit evaluate --workdir=runs/digits --items=200

Slice: none; 2 CPU cores, about seven minutes.

Expect nearly every image to show the digit of its caption (benchmarks/digits_cpu.md). The metric `digits` asks a
classifier fitted on the real scans; a guess is right in one of ten.
"""

from ml_collections import ConfigDict

from scaling_dit import config as config_lib


def get_config(arg: str = "data/digits") -> ConfigDict:
    """`arg` is the image folder: --config=digits:PATH."""
    config = config_lib.defaults()
    config.steps = 800
    config.batch = 64
    config.source = ConfigDict({"name": f"folder:{arg}", "image_size": 16})
    config.backbone = ConfigDict(
        {"name": "uvit", "hidden": 128, "depth": 4, "heads": 4, "patch": 4, "positions": "sincos_init"}
    )
    config.text_encoder = ConfigDict({"name": "scratch", "dim": 128, "depth": 1, "heads": 4, "length": 12})
    # For the reasons given in shapes.py.
    config.diffusion.update({"prediction": "x0", "time_sampling": "stratified"})
    config.optim.update(
        {
            "learning_rate": 1e-3,
            "warmup_steps": 50,
            "decay": "cosine",
            "final_fraction": 0.02,
            "b2": 0.99,
            "ema": (0.995,),
        }
    )
    config.sample.guidance = 2.0
    config.checkpoint.every = 400
    config.eval.update({"every": 400, "metrics": ("digits",), "prompts": 50, "loss_images": 64})
    return config

"""Does a model that is trained on drawings put together who, what and skin tone as Unicode never showed it?

U-ViT on OpenMoji's emoji at 32 px, written to an image folder with captions:

    pip install 'scaling-dit[emoji]'
    python -m scaling_dit.data.emoji data/emoji
    scaling-dit train --config=emoji --workdir=runs/emoji
    scaling-dit evaluate --workdir=runs/emoji --items=200

Arguments: the folder, data/emoji by default. Captions are dense; `--config.captions.alt=1.0 --config.captions.long=0.0`
takes the sparse ones, and a folder written with `--wrong=0.3` has wrong ones.

Slice: none; 2 CPU cores at 32 px. On accelerators write the folder with `--size=64`, set
`--config.source.image_size=64`, and take a larger backbone.

Expect the skin tone first and what the person does last. The metric `emoji` finds the nearest of all real emoji, on
combinations in training and held out; an emoji drawn at random is right in all three parts in one of thousands.
"""

from ml_collections import ConfigDict

from scaling_dit import config as config_lib


def get_config(arg: str = "data/emoji") -> ConfigDict:
    """`arg` is the image folder: --config=emoji:PATH."""
    config = config_lib.defaults()
    config.steps = 2000
    config.batch = 64
    config.source = ConfigDict({"name": f"folder:{arg}", "image_size": 32, "held_out_fraction": 0.02})
    config.captions.update({"policy": "mix", "alt": 0.0, "synthetic": 0.0, "long": 1.0})
    config.backbone = ConfigDict(
        {"name": "uvit", "hidden": 192, "depth": 4, "heads": 4, "patch": 8, "positions": "sincos_init"}
    )
    config.text_encoder = ConfigDict({"name": "scratch", "dim": 128, "depth": 1, "heads": 4, "length": 16})
    # For the reasons given in shapes.py.
    config.diffusion.update({"prediction": "x0", "time_sampling": "stratified"})
    config.optim.update(
        {
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "decay": "cosine",
            "final_fraction": 0.02,
            "b2": 0.99,
            "ema": (0.995,),
        }
    )
    config.sample.guidance = 2.0
    config.checkpoint.every = 500
    config.eval.update({"every": 500, "metrics": ("emoji",), "prompts": 100, "loss_images": 64})
    return config

"""What do higher resolution, a tuned text encoder and long captions add to a base model?

Each argument is one stage, for `train --from`: the run begins with the weights of the run or file named there.

    scaling-dit train --config=stages:shapes-24 --workdir=runs/shapes-24
    scaling-dit train --config=stages:shapes-24-48 --workdir=runs/shapes-48 --from=runs/shapes-24

    scaling-dit train --config=dit_scaling:uvit-h2048-d42-n16,pretrained --workdir=runs/256 ...   # see recipe.py
    scaling-dit train --config=stages:512 --workdir=runs/512 --from=runs/256 ...
    scaling-dit train --config=stages:1024 --workdir=runs/1024 --from=runs/512 ...
    scaling-dit train --config=stages:text --workdir=runs/text --from=runs/256 ...
    scaling-dit train --config=stages:long --workdir=runs/long --from=runs/256 ...

`shapes-24` and `shapes-24-48` are U-ViT on the built-in scenes at 24 and 48 px, on a laptop. The others continue the
recipe's U-ViT of 2.3B parameters (recipe.py) with its pretrained encoders: at 512 and 1024 px, with a tuned text
encoder (arXiv 2412.12391, section 4.2), and with captions of 231 tokens, three windows of CLIP. Steps and batches of
512 and 1024 px are those of arXiv 2606.11289, which trains 256, 512 and 1024 px in turn. The factor of the text
encoder's rate, its steps, and the share of long captions are open in both papers, and ours here.

Slice: none for shapes, 2 CPU cores and some minutes; for the others one as for the base, see `plan`.

Expect a loss at step 0 above the base's, and far fewer steps than from nothing until it is below:
studies/stages_shapes.py and docs/stages.md have figures on shapes.
"""

from ml_collections import ConfigDict
from scaling_dit.experiments import shapes
from scaling_dit.experiments.recipe import recipe

ARGUMENTS = ("shapes-24", "shapes-24-48", "512", "1024", "text", "long")


def get_config(arg: str = "shapes-24") -> ConfigDict:
    """The run of a stage."""
    if arg in ("shapes-24", "shapes-24-48"):
        return on_shapes(48 if arg.endswith("48") else 24)
    config = recipe("uvit", option="pretrained", size="h2048-d42-n16")
    if arg in ("512", "1024"):
        side = int(arg)
        config.source.image_size = side
        # sigma / alpha grows with the side, so that as much is left to guess at each timestep.
        config.diffusion.resolution_shift = side / 256
        config.steps, config.batch = (500_000, 512) if side == 512 else (300_000, 128)
    if arg == "text":
        config.train_text_encoder = True
        # A tenth of the backbone's rate: its weights are trained already.
        config.optim.text_encoder_rate = 0.1
        config.steps = 100_000
    if arg == "long":
        config.text_encoder.length = 3 * 77
        config.captions.update({"alt": 0.25, "synthetic": 0.25, "long": 0.5})
        config.steps = 100_000
    return config


def on_shapes(side: int, steps: int = 0) -> ConfigDict:
    """U-ViT on scenes of 24 or 48 px, with one patch of 6 px a token: 16 or 64 image tokens."""
    config = shapes.get_config()
    config.source.preset = f"grid{side}"
    config.steps = steps or {24: 1200, 48: 600}[side]
    config.batch = 64
    config.backbone.update({"hidden": 128, "depth": 4, "patch": 6})
    # Constant, so that a stage continues what the base ended with.
    config.optim.decay = "constant"
    config.diffusion.resolution_shift = side / 24
    return config

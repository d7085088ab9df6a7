"""Which family composes best at 10M to 100M parameters, on scenes of 32 px with free placement?

    make study-large
    scaling-dit study --config=shapes_large --workdir=runs/shapes_large

Every family at about 10M and 100M parameters, each size with equal training FLOPs, three seeds. Products are in
bfloat16.

Slice: one GPU or a small TPU slice; a day on one H200. Members run one after another; on CPUs it is of no use.

Expect relations to be learned by all families at 100M; whether the order of the core study holds is the question.
"""

from typing import Any

from scaling_dit.experiments.studies import _shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

UNETS: dict[str, dict[str, Any]] = {
    "unet": {"channel_mult": (1, 2, 3), "res_blocks": 2, "transformer_depth": (0, 1, 2), "head_dim": 32},
    "unet_if": {"channel_mult": (1, 2, 3), "res_blocks": 2, "attention_levels": (1, 2), "head_dim": 32},
}
# Family -> (width at 10M, at 100M); transformers have 8 blocks at 10M and 16 at 100M.
WIDTHS = {
    "uvit": (256, 640), "pixart": (256, 576), "large_dit": (256, 512), "next_dit": (256, 576), "unet": (64, 192),
    "unet_if": (64, 192),
}  # fmt: skip
BUDGETS = {"10M": 1e17, "100M": 1e18}


def get_study() -> StudySpec:
    """The study."""
    config = _shapes.base("free32", batch=256)
    config.optim.update({"learning_rate": 3e-4, "warmup_steps": 500})
    config.mesh.update({"data": 1, "fsdp": -1})
    members: list[Member] = []
    for place, (size, budget) in enumerate(BUDGETS.items()):
        rows = {}
        for family, widths in WIDTHS.items():
            shape = {"channels": widths[place], **UNETS[family]} if family in UNETS else {
                "hidden": widths[place], "depth": (8, 16)[place], "heads": widths[place] // 32
            }  # fmt: skip
            rows[family] = shape | {"dtype": "bfloat16"}
        members += ladder.matched(_shapes.families(config, rows, size, patch=4), "compute", budget)
    return StudySpec(
        question="Which family composes best at 10M to 100M parameters, on scenes with free placement?",
        members=tuple(members),
        claims=(
            Claim("U-ViT beats PixArt at 100M", "uvit-100M", "pixart-100M"),
            Claim("U-ViT beats SDXL's UNet at 100M", "uvit-100M", "unet-100M"),
            Claim(
                "IF's UNet beats U-ViT in relations at 100M",
                "unet_if-100M",
                "uvit-100M",
                metric="shapes_tifa_spatial",
            ),
        ),
        items=1000,
        points=10,
    )

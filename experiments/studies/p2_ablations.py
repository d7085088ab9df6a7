"""What makes U-ViT scale: long skips, the text encoder, long captions, more data? Sections 4 and 6 of arXiv 2412.12391.

    scaling-dit study --config=p2_ablations:long_skips --workdir=gs://BUCKET/p2_long_skips

Arguments, one study each:
    long_skips    a small U-ViT with and without them (figure 7c)
    text_encoder  trained along or frozen, for sdxl, PixArt and LargeDiT (section 4.2)
    captions      half of the captions long or none (section 6.1)
    data          250 against 600 thousand scenes, for the paper's 250M and 600M pairs (section 6.2)

Slice: v5p:4x4x4; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: without long skips U-ViT converges worse; training the text encoder helps UNets;
long captions help, for they name more; U-ViT gains more from data than the UNet. On shapes a long caption is one that
names all facts where the others name 40 %.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

UVIT, PIXART, LARGE_DIT = "uvit-h1024-d42-n16", "pixart-h1152-d28", "large_dit-h1024-d28-n16"
# Argument -> (name, changes) of the two sides; the first is claimed to be better.
SIDES = {
    "long_skips": (("skips", {"backbone.long_skips": True}), ("noskips", {"backbone.long_skips": False})),
    "text_encoder": (("tuned", {"train_text_encoder": True}), ("frozen", {"train_text_encoder": False})),
    "captions": (
        ("long", {"source.mention_probability": 1.0}),
        ("short", {"source.mention_probability": 0.4}),
    ),
    "data": (("600k", {"source.scenes": 600_000}), ("250k", {"source.scenes": 250_000})),
}
ARGUMENTS = tuple(SIDES)
ROWS = {
    "long_skips": ("uvit-h1024-d20-n16",),
    "text_encoder": ("sdxl", PIXART, LARGE_DIT),
    "captions": (UVIT, "sdxl"),
    "data": (UVIT, "sdxl"),
}


def get_study(arg: str = "long_skips") -> StudySpec:
    """The ablation `arg`."""
    members: list[Member] = []
    claims = []
    for row in ROWS[arg]:
        (base,) = _papers.unets((row,)) if row == "sdxl" else _papers.transformers((row,))
        made = [_papers.changed(base, f"{row}-{name}", changes, side=name) for name, changes in SIDES[arg]]
        members += made
        claims.append(
            Claim(f"{row}: {SIDES[arg][0][0]} beats {SIDES[arg][1][0]}", made[0].name, made[1].name)
        )
    return StudySpec(
        question=f"What makes diffusion transformers scale: {arg.replace('_', ' ')}?",
        members=tuple(members),
        claims=tuple(claims),
        items=1000,
        points=12,
    )

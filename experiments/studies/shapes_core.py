"""Which family composes best for its compute, is a UNet better deepened or widened, and what do captions do?

    make study                                                            # runs it, and writes its report
    scaling-dit study --config=shapes_core --workdir=runs/shapes_core     # the same, and resumes it

Scenes of 8 px with two squares of different colours, three training seeds behind each claim: all six families at 0.4M
and 1M parameters, all with equal training FLOPs (so a family with cheap tokens sees more images); one UNet widened, and
deepened to nine tenths of its parameters; captions that say everything, 40 % of it, or are those of another scene for
30 % of the records.

Slice: none; made for 2 CPU cores and at most an hour. `:smoke` is a miniature of two members for tests.

Expect colours to be learned first and relations (shapes_tifa_spatial) last: they are the hard axis. Three papers rank
these families in three ways at scale; nobody has compared all of them at equal compute with seeds.
"""

import dataclasses

from scaling_dit.experiments.studies import _shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = ("smoke",)
# Training FLOPs of every member, whatever its size.
BUDGET = 6e11
# Two squares of different colours in every scene, named from left to right. A relation counts only where both objects
# are right, and shapes of 3 px take most of such a budget; so here nothing but colours stands between a caption and its
# relation. Named in random order, the place of a colour depends on word order and relation at once and on neither
# alone, which no member learns with so little training (docs/studies.md).
SCENES = {
    "shapes": ("square",), "colours": (), "min_objects": 2, "naming": "reading", "held_out_fraction": 0.35
}  # fmt: skip
CAPTIONS = {
    "sparse": {"source.mention_probability": 0.4},
    "wrong": {"source.wrong_caption_rate": 0.3},
}


def get_study(arg: str = "") -> StudySpec:
    """The core study, or its miniature for `arg` "smoke"."""
    if arg == "smoke":
        return smoke()
    config = _shapes.base()
    config.source.update(SCENES)
    # Long enough for "a red square left of and above a blue square" with its two ends.
    config.text_encoder.update({"dim": 64, "length": 12})
    # The same batch for the grid and the scores: one program samples both.
    config.eval.update({"loss_images": 128, "grid": 24})
    config.sample.batch = 24
    grown = {
        "unet-wide": _shapes.section("unet", _shapes.WIDE, 4),
        "unet-deep": _shapes.section("unet", _shapes.DEEP, 4),
    }
    sets = [
        _shapes.families(config, _shapes.SMALL, "0.4M"),
        ladder.families(config, grown, {"size": "1.5M"}),
        _shapes.families(config, _shapes.LARGE, "1M"),
    ]
    found = {member.name: member for some in sets for member in ladder.matched(some, "compute", BUDGET)}
    dense = found["pixart-0.4M"]
    captions = ladder.captions(dense, CAPTIONS)
    # What the claims are about comes first, so that a study that is still running answers them.
    first = ("pixart-0.4M", "uvit-0.4M", "unet-deep", "unet-wide")
    members = [*(found.pop(name) for name in first), *captions, *found.values()]
    return StudySpec(
        question="Which family composes best for its compute, and is a UNet better deepened or widened?",
        members=tuple(members),
        claims=(
            Claim("a deepened UNet beats a widened one", "unet-deep", "unet-wide"),
            Claim("PixArt beats U-ViT at 0.4M", "pixart-0.4M", "uvit-0.4M"),
            Claim("U-ViT beats PixArt at 1M", "uvit-1M", "pixart-1M"),
            Claim("U-ViT beats Large-DiT at 1M", "uvit-1M", "large_dit-1M"),
            Claim("U-ViT beats SDXL's UNet at 1M", "uvit-1M", "unet-1M"),
            Claim(
                "IF's UNet beats U-ViT in relations at 0.4M",
                "unet_if-0.4M",
                "uvit-0.4M",
                metric="shapes_tifa_spatial",
            ),
            Claim("dense captions beat sparse ones", dense.name, f"{dense.name}-sparse", paired=True),
            Claim("right captions beat 30 % wrong ones", dense.name, f"{dense.name}-wrong", paired=True),
        ),
        items=96,
        points=3,
    )


def smoke() -> StudySpec:
    """Two members of two seeds and few steps."""
    config = _shapes.base(steps=6, batch=8)
    config.text_encoder.update({"dim": 32, "heads": 2})
    config.eval.update({"loss_images": 16, "grid": 4})
    config.sample.steps = 2
    rows = {
        "pixart": {"hidden": 32, "depth": 1, "heads": 2},
        "large_dit": {"hidden": 32, "depth": 1, "heads": 2},
    }
    claim = Claim("PixArt beats Large-DiT", "pixart-tiny", "large_dit-tiny")
    spec = StudySpec("Does the study run?", _shapes.families(config, rows, "tiny"), (0, 1), claims=(claim,))
    return dataclasses.replace(spec, items=8, points=2)

"""Which diffusion transformer is best at 0.6B and at 2B parameters? Figures 3 to 6 of arXiv 2412.12391.

    scaling-dit study --config=p2_families --workdir=gs://BUCKET/p2_families
    scaling-dit study --config=p2_families:compute --workdir=gs://BUCKET/p2_compute

U-ViT, PixArt-alpha and LargeDiT at both sizes, beside the UNets sd2 and sdxl. The paper compares at equal steps;
`:compute` gives every member the training FLOPs of sdxl, since at 2B parameters the families' MACs differ fourfold.
`:pretrained` takes the papers' encoders, at equal steps.

Slice: v5p:4x4x8; a run of U-ViT 2.3B is 600,000 steps of 2048 images.

Expect, as in the paper on its data: U-ViT converges faster and ends higher than PixArt and LargeDiT at both sizes, and
at 2.3B it reaches sdxl. arXiv 2410.08184 finds that cross-attention gains most from compute, and arXiv 2606.11289 that
two streams do: the compute-matched study separates these.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling import ladder
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = ("compute", _papers.PRETRAINED)
SIZES = {
    "0.6B": ("uvit-h1024-d42-n16", "pixart-h1152-d28", "large_dit-h1024-d28-n16"),
    "2B": ("uvit-h2048-d42-n16", "pixart-h2048-d28", "large_dit-h2048-d28-n16"),
}


def get_study(arg: str = "") -> StudySpec:
    """The study at equal steps, or at equal compute for `arg` "compute"."""
    members = [*_papers.unets(("sdxl", "sd2"), arg)]
    claims = []
    for size, rows in SIZES.items():
        members += _papers.transformers(rows, arg)
        claims += [
            _papers.better(arg, f"at {size} U-ViT beats {row.partition('-')[0]}", rows[0], row)
            for row in rows[1:]
        ]
    claims.append(_papers.better(arg, "U-ViT of 2.3B is as good as SDXL", SIZES["2B"][0], "sdxl", -0.01))
    return StudySpec(
        question="Which diffusion transformer is best at 0.6B and at 2B parameters?",
        members=ladder.matched(members, "compute") if arg == "compute" else tuple(members),
        metrics=_papers.metrics(arg),
        claims=tuple(claims),
        items=1000,
        points=_papers.POINTS,
    )

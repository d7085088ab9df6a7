"""Which UNet design scales best: SD2's, IF's or SDXL's? Figure 3 of arXiv 2404.02883.

    scaling-dit study --config=p1_unet_designs --workdir=gs://BUCKET/p1_unet_designs
    scaling-dit report gs://BUCKET/p1_unet_designs

Four UNets under one recipe: sd2 (0.87B), sd2-c512 (2.19B), if-xl-c512 (2.04B), sdxl (2.39B). `:pretrained` takes the
paper's encoders.

Slice: v5p:4x4x4 or larger; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: sdxl reaches SD2's best score in a sixth of its steps and half of its compute, and
ends clearly above all others; the wider sd2-c512 is better than sd2 at equal steps, and not at equal compute.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)


def get_study(arg: str = "") -> StudySpec:
    """The study, with the paper's encoders for `arg` "pretrained"."""
    claims = [
        _papers.better(arg, f"SDXL's design beats {other} at equal steps", "sdxl", other)
        for other in ("sd2", "sd2-c512", "if-xl-c512")
    ]
    claims.append(_papers.better(arg, "a wider SD2 beats SD2 at equal steps", "sd2-c512", "sd2"))
    return StudySpec(
        question="Which UNet design scales best: SD2's, IF's or SDXL's?",
        members=_papers.unets(("sd2", "sd2-c512", "if-xl-c512", "sdxl"), arg),
        metrics=_papers.metrics(arg),
        claims=tuple(claims),
        items=1000,
        points=_papers.POINTS,
    )

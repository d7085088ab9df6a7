"""Does PixArt-alpha scale better in width or in depth, and does it reach SD2's UNet? Figure 6 of arXiv 2404.02883.

    scaling-dit study --config=p1_pixart --workdir=gs://BUCKET/p1_pixart

PixArt's four rows of the paper's table 2 (0.48B to 1.08B) beside sd2. `:pretrained` takes the paper's encoders.

Slice: v5p:4x4x4 or larger; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: h1024-d56 and h1536-d28 reach a score in two thirds of the steps of h1152-d28, and
at 250,000 steps sd2 is still ahead of h1024-d56.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)
ROWS = ("pixart-h1024-d28", "pixart-h1152-d28", "pixart-h1536-d28", "pixart-h1024-d56")


def get_study(arg: str = "") -> StudySpec:
    """The study, with the paper's encoders for `arg` "pretrained"."""
    return StudySpec(
        question="Does PixArt-alpha scale better in width or in depth, and does it reach SD2's UNet?",
        members=(*_papers.transformers(ROWS, arg), *_papers.unets(("sd2",), arg)),
        metrics=_papers.metrics(arg),
        claims=(
            _papers.better(arg, "width helps: h1536 beats h1152", "pixart-h1536-d28", "pixart-h1152-d28"),
            _papers.better(arg, "depth helps: d56 beats d28", "pixart-h1024-d56", "pixart-h1024-d28"),
            _papers.better(arg, "SD2's UNet beats PixArt of its size", "sd2", "pixart-h1024-d56"),
        ),
        items=1000,
        points=_papers.POINTS,
    )

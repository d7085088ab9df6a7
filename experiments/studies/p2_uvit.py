"""How far does U-ViT scale, and in width or in depth? Figure 4 of arXiv 2412.12391.

    scaling-dit study --config=p2_uvit --workdir=gs://BUCKET/p2_uvit

U-ViT from 0.3B to 7B parameters: all rows of `dit_scaling`. A source of the paper names h2048-d42-n16 (2.3B) and
h2560-d42-n16 (3.7B), the others are candidates for its ladder. `:pretrained` takes the papers' encoders.

Slice: v5p:4x4x8 for the largest; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: scores rise up to 2.3B, and the larger h2560-d42-n16 does worse.
"""

from scaling_dit.experiments.dit_scaling import LADDERS
from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)


def get_study(arg: str = "") -> StudySpec:
    """The study, with the papers' encoders for `arg` "pretrained"."""
    rows = tuple(f"uvit-{size}" for size in LADDERS["uvit"])
    return StudySpec(
        question="How far does U-ViT scale, and in width or in depth?",
        members=_papers.transformers(rows, arg),
        metrics=_papers.metrics(arg),
        claims=(
            _papers.better(arg, "2.3B beats 0.6B", "uvit-h2048-d42-n16", "uvit-h1024-d42-n16"),
            _papers.better(arg, "depth helps: d56 beats d28", "uvit-h1024-d56-n16", "uvit-h1024-d28-n16"),
            _papers.better(arg, "width helps: h1536 beats h1024", "uvit-h1536-d28-n16", "uvit-h1024-d28-n16"),
            _papers.better(arg, "3.7B is below 2.3B", "uvit-h2048-d42-n16", "uvit-h2560-d42-n16"),
        ),
        items=1000,
        points=_papers.POINTS,
    )

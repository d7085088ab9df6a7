"""Does the order of SDXL's narrow UNets hold at 512 px? Figure 17 of arXiv 2404.02883 (supplement F).

    scaling-dit study --config=p1_resolution --workdir=gs://BUCKET/p1_resolution

sdxl-c128 and sdxl-c192 at 256 and at 512 px, on sets that `prepare` made: data/latents/256 and data/latents/512. The
paper continues its 256-px runs at 512 px; here every run starts anew, because a study's members share no weights.

Slice: v5p:4x4x8; a run is 600,000 steps of 2048 images, four times the compute at 512 px.

Expect, as in the paper on its data: scores slightly better at 512 px, and the same order.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.spec import StudySpec

SIDES = (256, 512)


def get_study() -> StudySpec:
    """The study; it needs the autoencoder, so it has no stand-in."""
    rows = _papers.unets(("sdxl-c128", "sdxl-c192"), _papers.PRETRAINED)
    members = [
        _papers.changed(
            row,
            f"{row.name}-{side}px",
            {"source.image_size": side, "source.name": f"latents:data/latents/{side}"},
            pixels=str(side),
        )
        for side in SIDES
        for row in rows
    ]
    claims = tuple(
        Claim(
            f"192 channels beat 128 at {side} px", f"sdxl-c128-{side}px", f"sdxl-c192-{side}px", metric="loss"
        )
        for side in SIDES
    )
    return StudySpec(
        question="Does the order of SDXL's narrow UNets hold at 512 px?",
        members=tuple(members),
        metrics=(),
        claims=claims,
        points=_papers.POINTS,
    )

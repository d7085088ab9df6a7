"""Does the order of SDXL's narrow UNets hold at 512 px? Figure 17 of arXiv 2404.02883 (supplement F).

    scaling-dit study --config=p1_resolution --workdir=gs://BUCKET/p1_resolution

sdxl-c128 and sdxl-c192 at 256 px, and each continued at 512 px from the weights that its run of the same seed ended
with (`train --from`), as in the paper; 100,000 steps of it are a choice of this file. They read sets that `prepare`
made: data/latents/256 and data/latents/512.

Slice: v5p:4x4x8; a run is 600,000 steps of 2048 images, and 100,000 more at 512 px, each four times the compute.

Expect, as in the paper on its data: scores slightly better at 512 px, and the same order.
"""

import dataclasses

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

SIDES = (256, 512)
# At 512 px, after the base.
FURTHER_STEPS = 100_000


def get_study() -> StudySpec:
    """The study; it needs the autoencoder, so it has no stand-in."""
    rows = _papers.unets(("sdxl-c128", "sdxl-c192"), _papers.PRETRAINED)
    before, after = ([on_side(row, side) for row in rows] for side in SIDES)
    stages = [
        dataclasses.replace(_papers.changed(stage, stage.name, {"steps": FURTHER_STEPS}), base=base.name)
        for stage, base in zip(after, before, strict=True)
    ]
    claims = tuple(
        Claim(
            f"192 channels beat 128 at {side} px", f"sdxl-c128-{side}px", f"sdxl-c192-{side}px", metric="loss"
        )
        for side in SIDES
    )
    return StudySpec(
        question="Does the order of SDXL's narrow UNets hold at 512 px?",
        members=(*before, *stages),
        metrics=(),
        claims=claims,
        points=_papers.POINTS,
    )


def on_side(row: Member, side: int) -> Member:
    """The row trained on the set of one resolution."""
    changes = {"source.image_size": side, "source.name": f"latents:data/latents/{side}"}
    return _papers.changed(row, f"{row.name}-{side}px", changes, pixels=str(side))

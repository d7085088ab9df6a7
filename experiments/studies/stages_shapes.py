"""Does continuing a small model at twice the resolution beat training at that resolution from nothing?

    scaling-dit study --config=stages_shapes --workdir=runs/stages_shapes

U-ViT on built-in scenes. `base` trains at 24 px. `stage` begins with its weights and trains at 48 px (`train --from`,
the table of positions resized). `scratch` trains at 48 px from nothing for as many steps, which is equal extra compute;
`scratch-total` for as much compute as base and stage together. Claims compare the three at 48 px, seed by seed.

Slice: none; made for 2 CPU cores, a few minutes for each of three seeds. `:smoke` is a miniature for tests.

Expect the stage to win at equal extra compute by far, for it begins with what the base has learned. Whether it wins at
equal total compute too is the interesting question.
"""

import dataclasses

from scaling_dit.experiments import stages

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = ("smoke",)


def get_study(arg: str = "") -> StudySpec:
    """The study, or its miniature for `arg` "smoke"."""
    smoke = arg == "smoke"
    base = member("base", 24, 60 if smoke else 400, smoke=smoke)
    stage = dataclasses.replace(member("stage", 48, 55 if smoke else 150, smoke=smoke), base="base")
    scratch = dataclasses.replace(stage, name="scratch", base="")
    both = sum(ladder.cost(one.config).train_flops() for one in (base, stage))
    total = ladder.at_compute(scratch, both, "scratch-total")
    in_loss = {"paired": True, "metric": "loss"}
    claims = (
        Claim("a stage beats scratch at equal extra compute, in loss", "scratch", "stage", **in_loss),
        Claim("a stage beats scratch at equal extra compute, in scenes", "stage", "scratch", paired=True),
        Claim("a stage beats scratch at equal total compute, in loss", "scratch-total", "stage", **in_loss),
    )
    return StudySpec(
        question="Does continuing a small model at twice the resolution beat training there from nothing?",
        members=(base, stage, scratch, total),
        seeds=(0, 1) if smoke else (0, 1, 2),
        claims=claims,
        items=4 if smoke else 100,
        points=1 if smoke else 2,
    )


def member(name: str, side: int, steps: int, *, smoke: bool) -> Member:
    """U-ViT at a resolution, small enough for two CPU cores."""
    config = stages.on_shapes(side, steps)
    config.batch = 4 if smoke else 32
    config.backbone.update({"hidden": 32 if smoke else 64, "depth": 2})
    config.text_encoder.update({"dim": 32 if smoke else 64, "heads": 2 if smoke else 4})
    config.eval.update({"metrics": (), "loss_images": 16 if smoke else 256, "grid": 4 if smoke else 12})
    config.sample.update({"sampler": "dpmpp_2m", "steps": 2 if smoke else 10})
    return ladder.derive(config, {}, name, {"side": str(side)})

"""Should a UNet grow in channels or in the depth of its transformers? Figure 4 of arXiv 2404.02883.

    scaling-dit study --config=p1_unet_width_depth --workdir=gs://BUCKET/p1_unet_width_depth
    scaling-dit study --config=p1_unet_width_depth:channels --workdir=gs://BUCKET/p1_unet_channels

SDXL's UNet with other channels (128, 192, 320, 384), with other depths at 4x downsampling (2, 4, 10, 12, 14), and at 2x
too (4_4, 4_8, 4_12, and 4_12 with 384 channels). Arguments: channels, depth, both (figures 4a, 4b, 4c); all without.

Slice: v5p:4x4x4 or larger; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: a score that rises with depth from 2 to 14; sdxl-td4_4 as good as sdxl with 45 %
fewer parameters and 28 % less compute; and saturation at the largest, sdxl-c384-td4_12.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ROWS = {
    "channels": ("sdxl-c128", "sdxl-c192", "sdxl", "sdxl-c384"),
    "depth": ("sdxl-td2", "sdxl-td4", "sdxl", "sdxl-td12", "sdxl-td14"),
    "both": ("sdxl", "sdxl-td4_4", "sdxl-td4_8", "sdxl-td4_12", "sdxl-c384-td4_12"),
}
ARGUMENTS = (*ROWS, _papers.PRETRAINED)
CLAIMS = (
    ("deeper transformers at 4x are better: 14 beats 2", "sdxl-td14", "sdxl-td2", 0.0),
    ("depth at 2x helps: 4_4 beats 4", "sdxl-td4_4", "sdxl-td4", 0.0),
    ("4_4 is as good as SDXL with 28 % less compute", "sdxl-td4_4", "sdxl", -0.01),
    ("more channels are better: 384 beats 128", "sdxl-c384", "sdxl-c128", 0.0),
    ("the largest is no better than SDXL by 0.01", "sdxl", "sdxl-c384-td4_12", -0.01),
)


def get_study(arg: str = "") -> StudySpec:
    """All variants, or those of one panel; with the paper's encoders for `arg` "pretrained"."""
    panels = [ROWS[arg]] if arg in ROWS else list(ROWS.values())
    rows = tuple(dict.fromkeys(row for panel in panels for row in panel))
    return StudySpec(
        question="Should a UNet grow in channels or in the depth of its transformers?",
        members=_papers.unets(rows, arg),
        metrics=_papers.metrics(arg),
        claims=tuple(
            _papers.better(arg, name, a, b, margin) for name, a, b, margin in CLAIMS if {a, b} <= set(rows)
        ),
        items=1000,
        points=_papers.POINTS,
    )

"""Does a batch of 4096 beat one of 2048 at equal steps? Figure 16 of arXiv 2404.02883 (supplement E).

    scaling-dit study --config=p1_batch --workdir=gs://BUCKET/p1_batch

sdxl-c128 with both batches, and one that the paper lacks: 4096 for half of the steps, so at equal compute.
`:pretrained` takes the paper's encoders.

Slice: v5p:4x4x4; a run is 600,000 steps.

Expect, as in the paper on its data: 4096 better at equal steps. At equal compute nobody has said.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)


def get_study(arg: str = "") -> StudySpec:
    """The study, with the paper's encoders for `arg` "pretrained"."""
    (base,) = _papers.unets(("sdxl-c128",), arg)
    large = _papers.changed(base, "sdxl-c128-b4096", {"batch": 4096}, batch="4096")
    half = _papers.changed(
        base, "sdxl-c128-b4096-half", {"batch": 4096, "steps": base.config.steps // 2}, batch="4096"
    )
    return StudySpec(
        question="Does a batch of 4096 beat one of 2048 at equal steps?",
        members=(base, large, half),
        metrics=_papers.metrics(arg),
        claims=(
            _papers.better(arg, "4096 beats 2048 at equal steps", large.name, base.name),
            _papers.better(arg, "4096 beats 2048 at equal compute", half.name, base.name),
        ),
        items=1000,
        points=_papers.POINTS,
    )

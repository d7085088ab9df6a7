"""Alt-text, one synthetic caption or five? Table 4 of arXiv 2404.02883.

    scaling-dit study --config=p1_captions --workdir=gs://BUCKET/p1_captions

sd2 for 250,000 steps: alt-text alone; half of the time the captioner's best caption; half of the time one of its best
five. On the stand-in, shapes, a record has 1 or 5 paraphrases that name 80 % of the facts, and the alt-text 40 %.
`:pretrained` reads prepared sets: data/latents/lensart, lensart-top1, lensart-top5. Losses on other captions do not
compare, so it has no claim until it names a metric on images.

Slice: v5p:4x4x4 or larger; a run is 250,000 steps of 2048 images.

Expect, as in the paper on its data: TIFA .810 with alt-text, .833 with one caption, .835 with five; ImageReward .345,
.513, .524. Five against one is a difference of .002, far below what three seeds can detect: undecided.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)
# Label -> (paraphrases, share of facts named) of the stand-in, share of synthetic captions, prepared set.
CAPTIONS = {
    "alt": (1, 0.4, 0.0, "lensart"),
    "top1": (1, 0.8, 0.5, "lensart-top1"),
    "top5": (5, 0.8, 0.5, "lensart-top5"),
}


def get_study(arg: str = "") -> StudySpec:
    """The study, on prepared sets for `arg` "pretrained"."""
    (sd2,) = _papers.unets(("sd2",), arg, steps=250_000)
    members = []
    for label, (paraphrases, mention, share, place) in CAPTIONS.items():
        changes = {"source.paraphrases": paraphrases, "source.mention_probability": mention}
        if arg == _papers.PRETRAINED:
            changes = {"source.name": f"latents:data/latents/{place}"}
        changes |= {"captions.alt": 1.0 - share, "captions.synthetic": share}
        members.append(_papers.changed(sd2, f"sd2-{label}", changes, captions=label))
    return StudySpec(
        question="Alt-text, one synthetic caption or five?",
        members=tuple(members),
        metrics=_papers.metrics(arg),
        claims=()
        if arg == _papers.PRETRAINED
        else (
            _papers.better(arg, "one synthetic caption beats alt-text", "sd2-top1", "sd2-alt"),
            _papers.better(arg, "five synthetic captions beat alt-text", "sd2-top5", "sd2-alt"),
            _papers.better(arg, "five beat one", "sd2-top5", "sd2-top1"),
        ),
        items=1000,
        points=5,
    )

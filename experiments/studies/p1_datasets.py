"""Do more image-noun pairs, by more images or by better captions, raise the score? Figures 7 and 8 of arXiv 2404.02883.

    scaling-dit study --config=p1_datasets --workdir=gs://BUCKET/p1_datasets
    scaling-dit study --config=p1_datasets:pretrained --workdir=gs://BUCKET/p1_datasets_real

sd2 on the paper's four sets, and sdxl on the smallest and the largest: LensArt (250M pairs), SSTK (360M), LensArt with
synthetic captions, both sets with them (610M). Without an argument shapes stand in: 250, 360 and 610 thousand scenes,
of which the alt-text names 40 % of the facts, and synthetic captions name 80 %. `:pretrained` reads prepared sets:
data/latents/lensart, sstk, lensart-syn, both-syn. Losses on other sets do not compare, so it has no claim until it
names a metric on images.

Slice: v5p:4x4x4 or larger; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: both sets together beat each alone, synthetic captions help, and sdxl gains more
than sd2: it passes 0.82 at 100,000 steps, two and a half times as fast as on LensArt alone.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = (_papers.PRETRAINED,)
# Set -> (thousands of scenes, share of the facts that a caption names) of the stand-in.
SETS = {"lensart": (250, 0.4), "sstk": (360, 0.4), "lensart-syn": (250, 0.8), "both-syn": (610, 0.8)}


def on_set(member: Member, name: str, arg: str) -> Member:
    """The member trained on one of the sets."""
    scenes, mention = SETS[name]
    changes = {"source.scenes": 1000 * scenes, "source.mention_probability": mention}
    if arg == _papers.PRETRAINED:
        changes = {"source.name": f"latents:data/latents/{name}"}
    synthetic = name.endswith("-syn")
    captions = {"captions.alt": 0.5 if synthetic else 1.0, "captions.synthetic": 0.5 if synthetic else 0.0}
    return _papers.changed(member, f"{member.name}-{name}", changes | captions, data=name)


def get_study(arg: str = "") -> StudySpec:
    """The study, on prepared sets for `arg` "pretrained"."""
    sd2, sdxl = _papers.unets(("sd2", "sdxl"), arg)
    return StudySpec(
        question="Do more image-noun pairs, by more images or by better captions, raise the score?",
        members=(
            *(on_set(sd2, name, arg) for name in SETS),
            *(on_set(sdxl, name, arg) for name in ("lensart", "both-syn")),
        ),
        metrics=_papers.metrics(arg),
        claims=()
        if arg == _papers.PRETRAINED
        else (
            _papers.better(arg, "synthetic captions help", "sd2-lensart-syn", "sd2-lensart"),
            _papers.better(arg, "more images help", "sd2-both-syn", "sd2-lensart-syn"),
            _papers.better(arg, "data help SDXL's UNet", "sdxl-both-syn", "sdxl-lensart"),
        ),
        items=1000,
        points=_papers.POINTS,
    )

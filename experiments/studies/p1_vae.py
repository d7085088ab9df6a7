"""Does SDXL's autoencoder raise the scores of the same UNet over SD2's? Figure 15 of arXiv 2404.02883 (supplement D).

    scaling-dit study --config=p1_vae --workdir=gs://BUCKET/p1_vae

sd2 on one data set, encoded twice by `prepare`: data/latents/sd and data/latents/sdxl. Latents differ, so losses do not
compare, and the study has no claim until it names a metric on images.

Slice: v5p:4x4x4 or larger; a run is 600,000 steps of 2048 images.

Expect, as in the paper on its data: SDXL's autoencoder better by every metric.
"""

from scaling_dit.experiments.studies import _papers

from scaling_dit.scaling.spec import StudySpec


def get_study() -> StudySpec:
    """The study; it needs the autoencoders, so it has no stand-in."""
    (sd2,) = _papers.unets(("sd2",), _papers.PRETRAINED)
    members = [
        _papers.changed(
            sd2,
            f"sd2-vae-{size}",
            {"codec.size": size, "source.name": f"latents:data/latents/{size}"},
            codec=size,
        )
        for size in ("sd", "sdxl")
    ]
    return StudySpec(
        question="Does SDXL's autoencoder raise the scores of the same UNet over SD2's?",
        members=tuple(members),
        metrics=(),
        points=_papers.POINTS,
    )

"""Is an image condition better read as tokens or as channels, at equal steps and at equal training FLOPs?

    scaling-dit study --config=editing_shapes --workdir=runs/editing_inpaint
    scaling-dit study --config=editing_shapes:edges --workdir=runs/editing_edges
    scaling-dit study --config=editing_shapes:edit --workdir=runs/editing_edit

P2 (arXiv 2412.12391, 5.1) reports that tokens beat channels in inpainting, each at the same number of steps. Tokens of
a condition make every step dearer, so a third member, `channel-long`, trains with channels for as many FLOPs as `token`
has. U-ViT on shapes, three training seeds, compared run by run, for they see the same data in the same order. `:edges`
asks the same of edges to image, `:edit` of edits by instruction.

Slice: none; 2 CPU cores, under half an hour for each argument with `--at_once=2`. `:smoke` is a miniature for tests.

Expect the given part kept by both, and a small difference inside of the mask, if any.
"""

import dataclasses

from ml_collections import ConfigDict
from scaling_dit.experiments import editing
from scaling_dit.experiments.studies import _shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = ("edges", "edit", "smoke")
_QUESTIONS = {
    "inpaint": "Is the condition of inpainting better read as tokens or as channels?",
    "edges": "Are edges better read as tokens or as channels?",
    "edit": "Is the image before an edit better read as tokens or as channels?",
}
# Two patches to a side of a cell: condition and image have 16 tokens each beside 16 of text. In scenes of 8 px edges
# would be cut off, for Canny finds none at the border.
_PRESET, _PATCH = "grid16", 4
# An instruction names one of two or three squares by its colour and says what becomes of it: which one is meant has to
# be found in the condition, and nothing else needs learning. Twice the blocks for it, and small images in exchange.
_EDIT_PRESET, _EDIT_STEPS, _EDIT_DEPTH = "grid8", 2000, 4
_EDIT_SCENES = {"shapes": ("square",), "min_objects": 2, "held_out_fraction": 0.35, "paraphrases": 1}


def get_study(arg: str = "inpaint") -> StudySpec:
    """The study of a task, or a miniature for `arg` "smoke"."""
    if arg == "smoke":
        return smoke()
    row = dict(_shapes.SMALL["uvit"])
    if arg == "edit":
        config = _shapes.base(_EDIT_PRESET, steps=_EDIT_STEPS)
        config.text_encoder.update({"dim": 64, "length": 12})
        row["depth"] = _EDIT_DEPTH
    else:
        config = _shapes.base(_PRESET, steps=1000)
    config.backbone = ConfigDict(_shapes.section("uvit", row, _PATCH))
    return study(config, arg)


def study(config: ConfigDict, task: str) -> StudySpec:
    """Token, channel at as many steps, and channel at as many training FLOPs, of one base."""
    token, channel = (member(config, task, way) for way in editing.WAYS)
    budget = ladder.cost(token.config).train_flops()
    long = ladder.at_compute(channel, budget, "channel-long")
    metric = editing.METRICS[task]
    return StudySpec(
        question=_QUESTIONS[task],
        members=(token, channel, long),
        metrics=(metric,),
        claims=(
            Claim("tokens beat channels at equal steps", "token", "channel", paired=True),
            Claim("tokens beat channels at equal training FLOPs", "token", "channel-long", paired=True),
            # A lower loss is better, so the sides are exchanged.
            Claim(
                "tokens have the lower loss at equal steps", "channel", "token", metric="loss", paired=True
            ),
            Claim(
                "tokens have the lower loss at equal FLOPs",
                "channel-long",
                "token",
                metric="loss",
                paired=True,
            ),
        ),
        items=100,
        points=2,
    )


def member(config: ConfigDict, task: str, way: str) -> Member:
    """The base with the condition of a task, read as `way`."""
    changed = editing.condition(config.copy_and_resolve_references(), task, way)
    if task == "edit":
        changed.source.update(_EDIT_SCENES)
    # The study scores the images.
    changed.eval.metrics = ()
    changed.metrics = ConfigDict()
    return ladder.derive(changed, {}, way, {"concat": way})


def smoke() -> StudySpec:
    """Few steps of a tiny backbone, with two seeds."""
    config = _shapes.base(steps=100, batch=4)
    config.text_encoder.update({"dim": 32, "heads": 2})
    config.eval.update({"loss_images": 16, "grid": 4})
    config.sample.steps = 2
    config.backbone = ConfigDict(_shapes.section("uvit", {"hidden": 32, "depth": 2, "heads": 2}, 4))
    return dataclasses.replace(study(config, "inpaint"), seeds=(0, 1), items=8, points=1)

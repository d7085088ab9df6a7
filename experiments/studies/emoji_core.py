"""Do the core study's answers hold on drawings: which family puts together who, what and tone, and do captions matter?

    pip install 'scaling-dit[emoji,study]'
    python -m scaling_dit.data.emoji data/emoji
    python -m scaling_dit.data.emoji data/emoji-wrong --wrong=0.3
    make study-emoji                                                      # all of it
    scaling-dit study --config=emoji_core --workdir=runs/emoji_core       # the study alone

OpenMoji's emoji at 32 px, three training seeds behind each claim: five families at about 1M parameters and one UNet
deepened, all with equal training FLOPs; captions that are dense, sparse (the name without the tone), or those of
another emoji for 30 % of the images. Prompts are dense for all.

`:small` asks what two families and captions can answer in a quarter of an hour: people of a skin tone alone, at 16 px.

    python -m scaling_dit.data.emoji data/emoji-people --people
    python -m scaling_dit.data.emoji data/emoji-people-wrong --people --wrong=0.3
    scaling-dit study --config=emoji_core:small --workdir=runs/emoji_small

Slice: none; 2 CPU cores, a night, which nobody has spent yet. The small one takes a quarter of an hour: its answers
are in docs/emoji_study.md.

Expect the tone first and what a person does last, and held-out combinations (emoji_all_held_out) below those in
training. Whether an order of families on shapes is one on drawings is the question.
"""

from ml_collections import ConfigDict
from scaling_dit.experiments import emoji
from scaling_dit.experiments.studies import _shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.spec import StudySpec

ARGUMENTS = ("small",)
# Training FLOPs of every member.
BUDGET, SMALL_BUDGET = 2e13, 1e12
# Transformers have 16 tokens of 8 px; the UNets' levels have 32, 16 and 8 px, with attention at the last.
PATCH = 8
ROWS = {
    "uvit": {"hidden": 120, "depth": 4, "heads": 4},
    "pixart": {"hidden": 112, "depth": 4, "heads": 4},
    "large_dit": {"hidden": 104, "depth": 3, "heads": 4},
    "unet": {
        "channels": 32, "channel_mult": (1, 1, 2), "res_blocks": 1, "transformer_depth": (0, 0, 1), "head_dim": 32
    },
    "unet_if": {"channels": 32, "channel_mult": (1, 1, 2), "res_blocks": 1, "attention_levels": (2,), "head_dim": 32},
}  # fmt: skip
DEEP = ROWS["unet"] | {"transformer_depth": (0, 0, 4)}
SPARSE = {"captions.alt": 1.0, "captions.long": 0.0}


def get_study(arg: str = "") -> StudySpec:
    """The study, or its small form for `arg` "small"."""
    if arg == "small":
        return small()
    rows = {f"{name}-1M": _shapes.section(name, row, PATCH) for name, row in ROWS.items()}
    rows["unet-deep"] = _shapes.section("unet", DEEP, PATCH)
    members = ladder.matched(ladder.families(_base("data/emoji"), rows), "compute", BUDGET)
    dense = next(member for member in members if member.name == "pixart-1M")
    wrong = {"source.name": "folder:data/emoji-wrong"}
    return StudySpec(
        question="Do the core study's answers hold on drawings of people and things?",
        members=(*members, *ladder.captions(dense, {"sparse": SPARSE, "wrong": wrong})),
        metrics=("emoji",),
        claims=(
            Claim("a deepened UNet beats the UNet at equal compute", "unet-deep", "unet-1M"),
            Claim("U-ViT beats PixArt", "uvit-1M", "pixart-1M"),
            Claim(
                "U-ViT beats SDXL's UNet on held-out combinations",
                "uvit-1M",
                "unet-1M",
                metric="emoji_all_held_out",
            ),
            *_about_captions(dense.name),
        ),
        items=240,
        points=4,
    )


def small() -> StudySpec:
    """Two families of 0.4M parameters, and captions, on people alone."""
    config = _base("data/emoji-people")
    config.source.image_size = 16
    config.text_encoder.dim = 64
    rows = {f"{name}-0.4M": _shapes.section(name, _shapes.SMALL[name], 4) for name in ("uvit", "pixart")}
    members = ladder.matched(ladder.families(config, rows), "compute", SMALL_BUDGET)
    dense = next(member for member in members if member.name == "pixart-0.4M")
    wrong = {"source.name": "folder:data/emoji-people-wrong"}
    return StudySpec(
        question="Do the core study's answers on families and captions hold on drawings of people?",
        members=(*members, *ladder.captions(dense, {"sparse": SPARSE, "wrong": wrong})),
        metrics=("emoji",),
        claims=(Claim("PixArt beats U-ViT at 0.4M", dense.name, "uvit-0.4M"), *_about_captions(dense.name)),
        items=240,
        points=2,
    )


def _base(folder: str) -> ConfigDict:
    """The run that members replace fields of."""
    config = emoji.get_config(folder)
    config.batch = 32
    config.optim.decay = "constant"
    # The study scores the images; training measures the loss and makes a grid.
    config.eval.update({"metrics": (), "loss_images": 64, "grid": 24})
    config.sample.update({"sampler": "dpmpp_2m", "steps": 10, "batch": 24})
    return config


def _about_captions(dense: str) -> tuple[Claim, ...]:
    return (
        Claim("dense captions beat sparse ones", dense, f"{dense}-sparse", paired=True),
        Claim("right captions beat 30 % wrong ones", dense, f"{dense}-wrong", paired=True),
    )

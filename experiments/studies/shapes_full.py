"""How do all families scale on shapes: sizes, scenes, long skips, resolution, and 25 % against 100 % of training?

    make study-full
    scaling-dit study --config=shapes_full --workdir=runs/shapes_full

Four sizes of every family at one compute each (0.1M to 3M parameters by width), 300, 3,000 and unlimited scenes for
U-ViT and PixArt, U-ViT's long skips on and off, four families at 8 and 16 px, and a learning rate of a half and
of twice the base's for each size of U-ViT. U-ViT's four sizes again by muP, with heads of one size and the rate of the
smallest, beside the largest with such heads and without muP. Twenty points of each run answer what 25 % of training
says about its end.

Slice: none; 2 CPU cores, a night or two: the study resumes.

Expect few scenes to be memorised (a low loss, and a score that stops rising), and the large sizes to need the lower
learning rate, so that an order at one rate is not yet an order of families.
"""

from scaling_dit.experiments.studies import _shapes

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec

# Widths of each family, and the training FLOPs of each of the four sizes.
WIDTHS = {
    "uvit": (48, 96, 160, 256),
    "pixart": (48, 68, 120, 200),
    "large_dit": (48, 64, 104, 192),
    "next_dit": (48, 80, 128, 208),
    "unet": (32, 64, 96, 128),
    "unet_if": (32, 64, 96, 128),
}
BUDGETS = (1e12, 3e12, 1e13, 3e13)
RATES = {"half": 7.5e-4, "twice": 3e-3}


def get_study() -> StudySpec:
    """The study."""
    config = _shapes.base()
    members: list[Member] = []
    for step, budget in enumerate(BUDGETS):
        for family, values in WIDTHS.items():
            row = dict(_shapes.SMALL[family])
            row |= {"channels" if "channels" in row else "hidden": values[step]}
            if "hidden" in row:
                row["heads"] = 4
            made = ladder.derive(
                config,
                {"backbone": _shapes.section(family, row, 4)},
                f"{family}-s{step + 1}",
                {"size": f"s{step + 1}"},
            )
            members.append(ladder.at_compute(made, budget, made.name))
    by_name = {member.name: member for member in members}
    for name in ("uvit-s2", "pixart-s2"):
        members += ladder.data_sizes(by_name[name], (300, 3000))
    members.append(
        ladder.derive(
            by_name["uvit-s2"].config, {"backbone.long_skips": False}, "uvit-s2-noskips", {"skips": "off"}
        )
    )
    # Enough pairs to ask whether the order at 8 px predicts that at 16 px.
    for family in ("uvit", "pixart", "large_dit", "unet_if"):
        name = f"{family}-s2"
        patch = {} if family == "unet_if" else {"backbone.patch": 8}
        wide = ladder.derive(
            by_name[name].config, {"source.preset": "grid16", **patch}, f"{name}-16px", {"pixels": "16"}
        )
        members.append(ladder.at_compute(wide, BUDGETS[2], wide.name))
    for step in range(len(BUDGETS)):
        base = by_name[f"uvit-s{step + 1}"]
        members += [
            ladder.derive(
                base.config,
                {"optim.learning_rate": rate},
                f"{base.name}-{label}rate",
                {**base.groups, "rate": label},
            )
            for label, rate in RATES.items()
        ]
    members += _shapes.by_mup([by_name[f"uvit-s{step + 1}"] for step in range(len(BUDGETS))])
    return StudySpec(
        question="How do all families scale on shapes, and what changes their order?",
        members=tuple(members),
        claims=(
            Claim("long skips help U-ViT", "uvit-s2", "uvit-s2-noskips", paired=True),
            Claim("unlimited scenes beat 300 for U-ViT", "uvit-s2", "uvit-s2-n300"),
            Claim("unlimited scenes beat 300 for PixArt", "pixart-s2", "pixart-s2-n300"),
            Claim(
                "half of the rate is better for the largest U-ViT", "uvit-s4-halfrate", "uvit-s4", paired=True
            ),
            Claim(
                "muP at the smallest's rate helps the largest U-ViT",
                "uvit-s4-mup",
                "uvit-s4-h16",
                paired=True,
            ),
            Claim(
                "IF's UNet beats U-ViT in relations", "unet_if-s4", "uvit-s4", metric="shapes_tifa_spatial"
            ),
        ),
        # At 8 px there are 167 held-out scenes.
        items=160,
        points=20,
    )

"""Writes docs/models.md: the cost of every named size beside the numbers that the papers print.

    python -m tools.model_table

Our numbers come from `scaling_dit.count`; the papers' numbers are copied from their tables. Counts do not depend on the
machine. A test compares the file with the script's current output.
"""

import dataclasses
import functools
import importlib
import pathlib
from typing import Any

from scaling_dit import backbones
from scaling_dit.costs.count import Count, count

NAMES = {"params": "parameters", "gmacs": "GMACs", "attention": "attention", "share": "its share"}
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "models.md"
LATENTS, TEXT = (32, 32, 4), (77, 1024)
TITLES = {
    "unet": "UNets of Stable Diffusion 2 and SDXL",
    "unet_if": "UNets of DeepFloyd IF",
    "pixart": "PixArt-alpha",
    "uvit": "U-ViT",
    "large_dit": "Large-DiT",
    "next_dit": "Next-DiT",
}


@dataclasses.dataclass(frozen=True)
class Printed:
    """A row of arXiv 2404.02883, Table 1 or 2: 10^9 parameters, GMACs, GMACs of attention and their share in %."""

    params: str
    gmacs: str
    attention: str = ""
    share: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One size of a backbone on one shape of text."""

    backbone: str
    size: str
    text: tuple[int, int] = TEXT

    @property
    def label(self) -> str:
        """The size, and the shape of the text if it is not the default."""
        return self.size if self.text == TEXT else f"{self.size}, text {self.text[0]}x{self.text[1]}"


T5 = (120, 4096)
# SDXL's published weights need this text.
OTHER_TEXT = {("unet", "sdxl-official"): (77, 2048)}
# PixArt-alpha as published.
EXTRA_ROWS = (Row("pixart", "h1152-d28", T5),)
PRINTED: dict[Row, Printed] = {
    Row("unet", "sd2"): Printed("0.87", "86", "34", "39"),
    Row("unet", "sd2-c512"): Printed("2.19", "219", "85", "39"),
    Row("unet_if", "if-xl-c512"): Printed("2.04", "194", "23", "12"),
    Row("unet_if", "if-xl"): Printed("3.83", "364", "42", "12"),
    Row("unet", "sdxl-c128"): Printed("0.42", "35", "23", "65"),
    Row("unet", "sdxl-c192"): Printed("0.90", "75", "48", "65"),
    Row("unet", "sdxl"): Printed("2.39", "198", "127", "64"),
    Row("unet", "sdxl-c384"): Printed("3.40", "282", "179", "64"),
    Row("unet", "sdxl-td2"): Printed("0.85", "98", "43", "44"),
    Row("unet", "sdxl-td4"): Printed("1.24", "123", "64", "52"),
    Row("unet", "sdxl-td12"): Printed("2.78", "223", "147", "66"),
    Row("unet", "sdxl-td14"): Printed("3.16", "248", "168", "68"),
    Row("unet", "sdxl-td4_4"): Printed("1.32", "143", "84", "59"),
    Row("unet", "sdxl-td4_8"): Printed("2.09", "193", "123", "64"),
    Row("unet", "sdxl-td4_12"): Printed("2.86", "243", "167", "69"),
    Row("unet", "sdxl-c384-td4_12"): Printed("4.07", "346", "237", "69"),
    Row("pixart", "h1152-d28", T5): Printed("0.61", "139"),
    Row("pixart", "h1152-d28"): Printed("0.61", "139"),
    Row("pixart", "h1536-d28"): Printed("1.08", "247"),
    Row("pixart", "h1024-d28"): Printed("0.48", "110"),
    Row("pixart", "h1024-d56"): Printed("0.95", "220"),
}

HEAD = """# Named sizes and their cost

Written by `python -m tools.model_table` from `scaling_dit.count`; a test keeps it up to date.

One forward pass on one latent of {latents} (256 px through an 8x autoencoder) and {text} text. G = 10^9
multiply-accumulates (MACs).

- **GMACs**: convolutions and linear layers, the convention of arXiv 2404.02883 ("P1").
- **attention**: the GMACs inside attention modules of a transformer, or inside transformer modules of a UNet. SDXL's
  rows leave out the middle block, as P1 does; `count` includes it.
- **all GMACs**: also the products inside attention (QK^T and AV). Training FLOPs and MFU use these.
- **P1**: the numbers that P1 prints, 10^9 parameters, GMACs, and attention with its share of the GMACs. Bold: our
  number rounds to another digit, see below.

The tables of arXiv 2412.12391 are not public. Two of its sizes are known, U-ViT's `h2048-d42-n16` (its "2.3B") and
`h2560-d42-n16`. The other transformers are candidates for its "0.3B to 8B".

`create("unet", size="sdxl-td4_4")` makes a backbone of a named size. Transformers accept any other
`h<hidden>-d<depth>-n<heads>` as well.
"""


@functools.cache
def counted(row: Row) -> Count:
    """The count of a row. Layers are scanned if the backbone can, which traces faster and counts the same."""
    fields: dict[str, Any] = {"size": row.size}
    if "scan_layers" in backbones.backbone_fields(row.backbone):
        fields["scan_layers"] = True
    module = backbones.create_for(row.backbone, in_channels=LATENTS[2], text_dim=row.text[1], **fields)
    return count(module, LATENTS, row.text)


def attention_macs(row: Row) -> int:
    """`macs_attention` by P1's rule, which leaves out the middle block of SDXL's rows."""
    cost = counted(row)
    middle = cost.modules["mid_attn"].macs_attention if row.size.startswith("sdxl") else 0
    return cost.macs_attention - middle


def as_printed(row: Row) -> Printed:
    """A row in the form that P1 prints."""
    cost, attention = counted(row), attention_macs(row)
    return Printed(
        f"{cost.params / 1e9:.2f}",
        f"{cost.macs_paper / 1e9:.0f}",
        f"{attention / 1e9:.0f}",
        f"{100 * attention / cost.macs_paper:.0f}",
    )


def differences(row: Row) -> list[str]:
    """The fields of P1's row, if it prints one, that differ from our rounded values."""
    printed = PRINTED.get(row, Printed("", ""))
    ours = as_printed(row)
    names = [field.name for field in dataclasses.fields(Printed)]
    return [name for name in names if getattr(printed, name) not in ("", getattr(ours, name))]


# The reason why a printed number differs from ours, by (label of the row, field), or "unexplained".
REASONS: dict[tuple[str, str], str] = {
    ("if-xl", "params"): "unexplained, 1.5M parameters or more; P1 does not describe its form of IF's blocks",
    ("if-xl-c512", "gmacs"): "unexplained; ours is 193.4",
    ("sdxl-c128", "share"): "unexplained; ours is 65.6 %, and P1's own 23 of 35 is 65.7 %",
    ("sdxl", "attention"): "unexplained; ours is 126.4, and 64 %, the printed share, fits both",
    ("sdxl-td4", "params"): "ours is 1.23499, which gives P1's number if rounded twice, to 1.235 first",
    ("sdxl-td4_8", "attention"): "ours is 125.4; P1's own 84 and 167, for 4 blocks less and 4 more, have the middle "
    "125.5, so 123 looks like a misprint",
    ("sdxl-td4_8", "share"): "ours is 65 %; P1's is the share of its 123",
    (f"h1152-d28, text {T5[0]}x{T5[1]}", "gmacs"): "139 is for 77 tokens of 1024; with its own text it is 142.8",
}  # fmt: skip


def sizes(backbone: str) -> list[str]:
    """The named sizes of a backbone."""
    return list(importlib.import_module(f"scaling_dit.backbones.{backbone}").SIZES)


def rows(backbone: str) -> list[Row]:
    """All named sizes of a backbone, the smallest first."""
    named = [Row(backbone, size, OTHER_TEXT.get((backbone, size), TEXT)) for size in sizes(backbone)]
    named += [row for row in EXTRA_ROWS if row.backbone == backbone]
    return sorted(named, key=lambda row: counted(row).params)


def line(row: Row) -> str:
    """A row of the page's table."""
    cost, printed = counted(row), PRINTED.get(row, Printed("", ""))
    theirs = dataclasses.asdict(printed)
    theirs |= {name: f"**{theirs[name]}**" for name in differences(row)}
    share = f" ({theirs['share']} %)" if theirs["share"] else ""
    cells = [
        f"`{row.size}`" + row.label.removeprefix(row.size),
        f"{cost.params:,}",
        f"{cost.macs_paper / 1e9:.1f}",
        f"{attention_macs(row) / 1e9:.1f}",
        f"{cost.macs_total / 1e9:.1f}",
        theirs["params"],
        theirs["gmacs"],
        theirs["attention"] + share,
    ]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The text of docs/models.md."""
    latents, text = ("x".join(map(str, shape)) for shape in (LATENTS, TEXT))
    lines = [HEAD.format(latents=latents, text=text)]
    lines += [
        "| size | parameters | GMACs | attention | all GMACs | P1: 10^9 | GMACs | attention |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for backbone, title in TITLES.items():
        lines.append(f"| **{title}**: `{backbone}` |" + " |" * 7)
        lines += [line(row) for row in rows(backbone)]
    reduction = lambda cost: 100 * (1 - cost("sdxl-td4_4") / cost("sdxl"))  # noqa: E731
    params = reduction(lambda size: counted(Row("unet", size)).params)
    macs = reduction(lambda size: counted(Row("unet", size)).macs_paper)
    lines += [
        "",
        f"`sdxl-td4_4`, P1's efficient UNet, has {params:.1f} % fewer parameters than `sdxl` and {macs:.1f} % less "
        'compute (P1: "45 %" and "28 %").',
        "",
        "## Where P1 prints another digit",
        "",
        *(f"- `{size}`, {NAMES[name]}: {reason}." for (size, name), reason in REASONS.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)

"""Draws the backbones of docs/backbones/ into docs/images/: `make figures`, or `python -m tools.figures [NAME ...]`.

Each figure shows the whole network on the left and its blocks beside it. Data flows upwards, through the U of a UNet
from left to right.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

from tools.diagram import WIDE_GAP, Box, Canvas, Item

IMAGES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images"


def uvit() -> Canvas:
    """One sequence of time, text and image tokens; long skips from in- to out-blocks."""
    c = Canvas(730, 560)
    c.title(205, 543, "U-ViT")
    c.title(575, 543, "one block")
    time = c.column(75, 30, ("timesteps\n[B]", "time"), ("sinusoids", "time"))
    text = c.column(205, 30, ("text\n[B, L, E]", "text"), ("linear E → D", "text"))
    image = c.column(335, 30, ("latents\n[B, H, W, C]", "data"), ("p×p patches,\nlinear p²C → D", "linear"))
    joined = c.box(205, 145, "concatenate [time | text | image], add learned positions", "linear", 376)
    for boxes in (time, text, image):
        c.arrow(boxes[1].top, (boxes[1].x, joined.bottom[1]))
    names = "in-block 1", "⋮", "in-block ⌊d/2⌋", "middle block", "out-block 1", "⋮", "out-block ⌊d/2⌋"
    stack = c.above(joined, *((name, "block") for name in names), gap=12, first=24)
    c.note(213, joined.top[1] + 12, "[B, 1 + L + T, D] with T = HW/p²")
    for first, last, reach in ((2, 4, 36), (0, 6, 62)):
        (x, y), end = stack[first].right, stack[last].right
        c.arrow((x, y), (x + reach, y), (x + reach, end[1]), end, dashed=True)
    c.note(333, stack[3].y, "long skips:\nlast in, first out")
    last = c.above(
        stack[-1], ("image tokens: LayerNorm, linear D → p²C", "linear"), ("put patches back, 3×3 convolution", "conv"),
        width=250,
    )[-1]  # fmt: skip
    c.arrow(last.top, (205, last.top[1] + 18))
    c.note(213, last.top[1] + 10, "[B, H, W, C]")

    x, width = 575, 140
    c.note(x, 52, "x [B, 1 + L + T, D]", "center")
    merge = c.box(x, 107, "concatenate,\nlinear 2D → D", "linear", width)
    c.arrow((x, 62), merge.bottom)
    c.note(690, 52, "skip", "center")
    c.arrow((690, 62), (690, merge.y), merge.right, dashed=True)
    c.note(495, merge.y, "out-blocks\nonly", "right")
    part = c.residual(
        merge, ("LayerNorm", "norm"), ("self-attention\nof all tokens", "attention"), width=width
    )
    c.note(651, part[1].y, "padded text\nis no key")
    part = c.residual(part[-1], ("LayerNorm", "norm"), ("MLP D → 4D → D\nwith GELU", "linear"), width=width)
    end = part[-1].top[1] + 34
    c.arrow(part[-1].top, (x, end))
    c.frame(435, 72, 725, end - 10)
    c.note(x, end + 10, "x, and from in-blocks the skip", "center")
    return c


def pixart() -> Canvas:
    """One modulation by time for all blocks, to which each adds a table; attention to the text in between."""
    c = Canvas(660, 615)
    c.title(190, 597, "PixArt-α")
    c.title(505, 597, "one block")
    blocks, head = _image_tokens(
        c, "add 2-D sin-cos\npositions", "[B, T, D]", "LayerNorm,\n· (1 + s) + b,\nlinear D → p²C"
    )
    text = c.column(205, 30, ("text\n[B, L, E]", "text"), ("MLP\nE → D → D", "text"), width=104)
    c.arrow(text[-1].top, (205, blocks.y - 22), (blocks.right[0], blocks.y - 22))
    c.note(212, text[-1].top[1] + 12, "y [B, L, D]")
    time = c.column(335, 30, ("timesteps\n[B]", "time"), ("sinusoids 256,\nMLP", "time"), width=104)
    shared = c.above(time[-1], ("SiLU,\nlinear D → 6D", "time"), first=26, width=104)[0]
    c.note(342, time[-1].top[1] + 10, "t [B, D]")
    c.note(342, shared.top[1] + 12, "m [B, 6, D]")
    c.arrow(shared.top, (335, blocks.y + 22), (blocks.right[0], blocks.y + 22))
    c.arrow(time[-1].right, (402, time[-1].y), (402, head.y), head.right)
    c.note(210, head.y + 10, "(b, s) = table + t")
    parts: list[list[Item]] = [
        [("LayerNorm,\n· (1 + s₁) + b₁", "time"), ("self-attention", "attention"), ("· g₁", "time")],
        [("cross-attention\nfrom x to the text y", "attention")],
        [("LayerNorm,\n· (1 + s₂) + b₂", "time"), ("MLP D → 4D → D\nwith GELU", "linear"), ("· g₂", "time")],
    ]
    _modulated(c, 505, parts, "m", "table + m,\nsix parts")
    return c


def large_dit() -> Canvas:
    """Rows of tokens that end in a token of their own; shift, scale and gate by time and the mean of the text."""
    c = Canvas(880, 530)
    _lumina(
        c, "Large-DiT", "append a learned\ntoken to each row", "LayerNorm,\n· (1 + s) + b,\nlinear D → p²C"
    )
    parts: list[list[Item]] = [
        [
            ("RMSNorm,\n· (1 + s₁) + b₁", "time"),
            ("attention to\nimage and text", "attention"),
            ("· g₁", "time"),
        ],
        [("RMSNorm,\n· (1 + s₂) + b₂", "time"), ("SwiGLU", "linear"), ("· g₂", "time")],
    ]
    _modulated(c, 500, parts, "c", "SiLU, linear\nA → 6D")
    return c


def next_dit() -> Canvas:
    """Large-DiT's frame with scales and bounded gates, and norms on both sides of each part."""
    c = Canvas(880, 565)
    _lumina(c, "Next-DiT", None, "LayerNorm,\n· (1 + s),\nlinear D → p²C")
    parts: list[list[Item]] = [
        [
            ("RMSNorm,\n· (1 + s₁)", "time"),
            ("attention to\nimage and text", "attention"),
            ("RMSNorm,\n· tanh g₁", "time"),
        ],
        [("RMSNorm,\n· (1 + s₂)", "time"), ("SwiGLU", "linear"), ("RMSNorm,\n· tanh g₂", "time")],
    ]
    _modulated(c, 500, parts, "c", "SiLU, linear\nA → 4D")
    return c


def unet() -> Canvas:
    """SDXL's form: transformers at half and, deeper ones, at quarter resolution."""
    c = Canvas(890, 625)
    down = "2 · ResBlock", "2 · (ResBlock,\ntransformer of 2)", "2 · (ResBlock,\ntransformer of 10)"
    up = "3 · ResBlock", "3 · (ResBlock,\ntransformer of 2)", "3 · (ResBlock,\ntransformer of 10)"
    shapes = "[B, H, W, C]", "[B, H/2, W/2, 2C]", "[B, H/4, W/4, 4C]"
    middle = "ResBlock,\ntransformer of 10,\nResBlock"
    ways = "3×3 conv\nof stride 2", "double,\n3×3 conv"
    _u(c, "UNet, size sdxl", (down, up, shapes, middle), ways, "SiLU", "every transformer")
    items: list[Item] = [
        ("GroupNorm, SiLU", "norm"),
        ("3×3 conv", "conv"),
        ("+ linear(SiLU(time))", "time"),
        ("GroupNorm, SiLU", "norm"),
        ("3×3 conv", "conv"),
    ]
    _res_block(c, items)

    x, width = 795, 128
    c.title(x, 607, "transformer")
    c.note(x, 24, "x [B, hw, C]", "center")
    norm = c.box(x, 68, "GroupNorm, linear", "norm", width)
    c.arrow((x, 32), norm.bottom)
    part = c.residual(norm, ("LayerNorm", "norm"), ("self-attention", "attention"), width=width, first=38)
    bottom = part[0].bottom[1] - 24
    part = c.residual(
        part[-1], ("LayerNorm", "norm"), ("cross-attention\nto the text", "attention"), width=width
    )
    part = c.residual(part[-1], ("LayerNorm", "norm"), ("GEGLU\nC → 4C → C", "linear"), width=width)
    c.frame(x - 88, bottom, x + 78, part[-1].top[1] + 6)
    c.note(x + 72, part[-1].y, "× depth", "right")
    last = c.above(part[-1], ("linear", "linear"), ("+", "op"), width=width, first=22)
    c.arrow((x, 43), (x - 98, 43), (x - 98, last[-1].y), last[-1].left)
    c.arrow(last[-1].top, (x, last[-1].top[1] + 20))
    return c


def unet_if() -> Canvas:
    """IF's form: one attention to text and image at full, half and quarter resolution."""
    c = Canvas(890, 625)
    down = *["3 · (ResBlock,\nattention)"] * 3, "3 · ResBlock"
    up = *["4 · (ResBlock,\nattention)"] * 3, "4 · ResBlock"
    shapes = "[B, H, W, C]", "[B, H/2, W/2, 2C]", "[B, H/4, W/4, 3C]", "[B, H/8, W/8, 4C]"
    levels = down, up, shapes, "ResBlock, attention,\nResBlock"
    _u(
        c,
        "IF's UNet, size if-xl",
        levels,
        ("ResBlock\nthat halves", "ResBlock\nthat doubles"),
        "GELU",
        "every attention",
    )
    items: list[Item] = [
        ("GroupNorm, GELU", "norm"),
        ("where it resamples: halve\nor double, x as well", "data"),
        ("3×3 conv", "conv"),
        ("GroupNorm", "norm"),
        ("· (1 + s) + b with\n(s, b) = linear(GELU(time))", "time"),
        ("GELU, 3×3 conv", "conv"),
    ]
    _res_block(c, items)

    c.title(795, 607, "attention")
    left, right, width = 748, 842, 86
    c.note(left, 24, "x [B, hw, C]", "center")
    c.note(right, 24, "text [B, L, E]", "center")
    image = c.column(left, 90, ("GroupNorm", "norm"), ("linear:\nq, k, v", "linear"), width=width)
    text = c.box(right, image[-1].y, "linear:\nk′, v′", "text", width)
    c.arrow((left, 32), image[0].bottom)
    c.arrow((right, 32), text.bottom)
    attend = c.box(795, text.top[1] + 60, "softmax(q [k′ k]ᵀ) [v′ v]", "attention", 180)
    c.arrow(image[-1].top, (left, attend.bottom[1]))
    c.arrow(text.top, (right, attend.bottom[1]))
    c.note(left - 4, attend.bottom[1] - 18, "hw", "right")
    c.note(right + 6, attend.bottom[1] - 18, "L")
    last = c.above(attend, ("linear", "linear"), ("+", "op"), width=width, first=24)
    c.arrow((left, 52), (696, 52), (696, last[-1].y), last[-1].left)
    c.arrow(last[-1].top, (795, last[-1].top[1] + 24))
    c.note(795, last[-1].top[1] + 34, "[B, hw, C]", "center")
    return c


def _u(
    c: Canvas,
    name: str,
    levels: tuple[Sequence[str], Sequence[str], Sequence[str], str],
    ways: tuple[str, str],
    activation: str,
    readers: str,
) -> None:
    """The left part of a UNet's figure, with the way down on its left and the way up on its right.

    `levels` has the blocks on the way down, the blocks on the way up, the shapes, and the middle. `ways` has the names
    of down- and upsampling.
    """
    left, right, width = 78, 388, 118
    down, up, shapes, middle = levels
    step = 300 / len(down)
    c.title(233, 607, name)
    start = c.box(left, 568, "latents [B, H, W, 4]", "data", 128)
    first = c.box(left, 526, "3×3 conv", "conv", width)
    last = c.box(right, 526, f"GroupNorm, {activation},\n3×3 conv", "conv", 128)
    c.arrow(start.bottom, first.top)
    c.arrow(last.top, (right, 572))
    c.note(right, 581, "[B, H, W, 4]", "center")
    ends = first, last
    for level, (on_left, on_right, shape) in enumerate(zip(down, up, shapes, strict=True)):
        y = 468 - step * level
        pair = c.box(left, y, on_left, "conv", width), c.box(right, y, on_right, "conv", width)
        c.arrow(ends[0].bottom, pair[0].top)
        c.arrow(pair[1].top, ends[1].bottom)
        if level:
            between = (ends[0].bottom[1] + pair[0].top[1]) / 2
            c.note(left + 9, between, ways[0])
            c.note(right - 9, between, ways[1], "right")
        c.arrow(pair[0].right, pair[1].left, dashed=True)
        c.note(233, y + 10, shape, "center")
        c.note(233, y - 9, f"{on_right[0]} skips", "center")
        ends = pair
    bottom = c.box(233, ends[0].bottom[1] - 42, middle, "conv", 124)
    c.arrow(ends[0].bottom, (left, bottom.y), bottom.left)
    c.arrow(bottom.right, (right, bottom.y), ends[1].bottom)
    time = c.box(68, 64, "timesteps [B]", "time", 98)
    embed = c.box(215, 64, f"sinusoids C,\nlinear, {activation}, linear", "time", 134)
    c.arrow(time.right, embed.left)
    c.arrow(embed.right, (318, 64))
    c.note(323, 64, "time [B, 4C],\nto every ResBlock")
    text = c.box(68, 22, "text [B, L, E]", "text", 98)
    c.arrow(text.right, (318, 22))
    c.note(323, 22, f"to {readers}")


def _res_block(c: Canvas, items: Sequence[Item]) -> None:
    """The middle of a UNet's figure."""
    x, width = 585, 126 if len(items) == 5 else 158
    c.title(x, 607, "ResBlock")
    c.note(x, 24, "x [B, h, w, C]", "center")
    boxes = c.residual(Box(x, 32, width, 0), *items, width=width, first=44)
    c.arrow(boxes[-1].top, (x, boxes[-1].top[1] + 24))
    c.note(x, boxes[-1].top[1] + 34, "[B, h, w, C′]", "center")
    c.note(x - width / 2 - 8, boxes[-1].y + 22, "1×1 conv\nif C′ ≠ C")


def _image_tokens(c: Canvas, positions: str | None, shape: str, head: str) -> tuple[Box, Box]:
    """The path of the latents on the left of a transformer's figure; returns the box of all blocks and the head."""
    items: list[Item] = [("latents\n[B, H, W, C]", "data"), ("p×p patches,\nlinear p²C → D", "linear")]
    image = c.column(78, 30, *items, *([(positions, "linear")] if positions else []))
    blocks = c.box(78, 265, "\n\nd blocks\n\n", "block")
    c.arrow(image[-1].top, blocks.bottom)
    c.note(85, blocks.bottom[1] - 14, shape)
    above = c.above(blocks, (head, "linear"), ("put patches back", "linear"), gap=18, first=30)
    end = above[-1].top[1] + 24
    c.arrow(above[-1].top, (78, end))
    c.note(78, end + 10, "[B, H, W, C]", "center")
    return blocks, above[0]


def _modulated(c: Canvas, x: float, parts: Sequence[Sequence[Item]], given: str, source: str) -> None:
    """A block at x of residual parts, whose pink boxes get their factors from the box `source`."""
    width, line = 126.0, x + 105
    modulation = c.box(line, 76, source, "time", 84)
    c.note(line, 36, given, "center")
    c.arrow((line, 45), modulation.bottom)
    c.note(x, 36, "x", "center")
    below = Box(x, 44, width, 0)
    for items in parts:
        boxes = c.residual(below, *items, width=width, first=66 if below.height == 0 else WIDE_GAP)
        for box, (_, kind) in zip(boxes, items, strict=False):
            if kind == "time":
                c.arrow(modulation.top, (line, box.y), box.right)
        below = boxes[-1]
    c.arrow(below.top, (x, below.top[1] + 30))
    c.note(x, below.top[1] + 40, "x", "center")


def _lumina(c: Canvas, name: str, positions: str | None, head_text: str) -> None:
    """The common parts of the figures of Large-DiT and Next-DiT: the network, and the attention inside a block."""
    top = c.axes.get_ylim()[1] - 17
    for x, text in ((190, name), (500, "one block"), (755, "its attention")):
        c.title(x, top, text)
    blocks, head = _image_tokens(c, positions, "[B, S, D]", head_text)
    text = c.column(
        210, 30, ("text\n[B, L, E]", "text"), ("mean, LayerNorm,\nlinear E → A", "text"), width=116
    )
    time = c.column(338, 30, ("timesteps\n[B]", "time"), ("sinusoids 256,\nMLP", "time"), width=104)
    plus = c.above(time[-1], ("+", "op"), first=30)[0]
    c.arrow(text[-1].top, (210, plus.y), plus.left)
    c.arrow(text[0].left, (146, text[0].y), (146, blocks.y - 22), (blocks.right[0], blocks.y - 22))
    c.note(345, plus.top[1] + 12, "c [B, A]")
    c.arrow(plus.top, (338, blocks.y + 22), (blocks.right[0], blocks.y + 22))
    c.arrow((338, blocks.y + 22), (338, head.y), head.right)

    left, right, width = 700, 815, 104
    c.note(left, 36, "modulated tokens", "center")
    c.note(right, 36, "text [B, L, E]", "center")
    image = c.box(left, 120, "linear: q, k, v", "linear", width)
    c.arrow((left, 45), image.bottom)
    norm = c.box(right, 76, "RMSNorm", "norm", width)
    c.arrow((right, 45), norm.bottom)
    words = c.above(norm, ("linear: k′, v′", "text"), width=width)[0]
    image = c.above(
        image, ("LayerNorm\nof q and of k", "norm"), ("rotate q, k\nby position", "linear"), width=width
    )[-1]
    words = c.above(words, ("LayerNorm of k′", "norm"), width=width)[0]
    attend = c.box(left, 310, "softmax(q kᵀ) v", "attention", width)
    read = c.box(right, 310, "softmax(q k′ᵀ) v′", "attention", width)
    c.arrow(image.top, attend.bottom)
    c.arrow(words.top, read.bottom)
    middle = (left + right) / 2
    c.arrow((left, 282), (middle, 282), (middle, 310), read.left)
    c.note(middle - 6, 291, "q", "right")
    gate = c.above(read, ("· tanh(gate)", "linear"), width=width, first=24)[0]
    plus = c.box(left, gate.top[1] + 34, "+", "op")
    c.arrow(attend.top, plus.bottom)
    c.arrow(gate.top, (right, plus.y), plus.right)
    out = c.above(plus, ("linear", "linear"), width=width, first=20)[0]
    c.arrow(out.top, (left, out.top[1] + 24))
    c.note(left, out.top[1] + 34, "[B, S, D]", "center")


FIGURES: dict[str, Callable[[], Canvas]] = {
    "uvit": uvit,
    "pixart": pixart,
    "large_dit": large_dit,
    "next_dit": next_dit,
    "unet": unet,
    "unet_if": unet_if,
}


def main(names: Sequence[str]) -> None:
    """Writes the figures of these names, or all."""
    for name in names or FIGURES:
        path = IMAGES / f"{name}.svg"
        path.write_text(FIGURES[name]().svg())
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Draws diagrams of boxes, columns, residual connections and arrows with matplotlib, as SVG (extra `[docs]`).

Grey: norms, green: linear maps, violet: convolutions, blue: attention, orange: text, pink: time.
"""

import io
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

# Text stays text in the SVG. DejaVu Sans is wide, so text in another font of the reader's still fits its box.
STYLE = {"svg.hashsalt": "scaling_dit", "svg.fonttype": "none"}
INK, FAINT = "#24292f", "#66707a"
COLOURS = {
    "data": "#ffffff",
    "norm": "#e9ecef",
    "linear": "#dcefdc",
    "conv": "#e8dcf5",
    "attention": "#d3e5fa",
    "text": "#fde6c8",
    "time": "#fadbe0",
    "block": "#f6f8fa",
}
# Height of a line of text. Units are hundredths of an inch.
LINE = 13.5
# Radius of an operation's circle.
RADIUS = 8.5
# Distance between boxes, and the larger distance below a part of a block from which a residual connection branches off.
GAP, WIDE_GAP = 14.0, 25.0
Point = tuple[float, float]
# (text, kind)
Item = tuple[str, str]


class Box(NamedTuple):
    """A box by its centre and its sides."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def bottom(self) -> Point:
        return self.x, self.y - self.height / 2

    @property
    def left(self) -> Point:
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        return self.x + self.width / 2, self.y


class Canvas:
    """A figure of `width` x `height` units, with methods that draw the elements of diagrams; y runs upwards.

    `texts` has every text with the box it must fit in, or None.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = plt.figure(figsize=(width / 100, height / 100))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self.texts: list[tuple[plt.Text, Box | None]] = []

    def box(self, x: float, y: float, text: str, kind: str, width: float = 116) -> Box:
        """A box with text in it; the kind "op" makes a circle with a sign."""
        box = Box(x, y, 2 * RADIUS if kind == "op" else width, _height(text, kind))
        if kind == "op":
            self.axes.add_patch(Circle((x, y), RADIUS, facecolor="white", edgecolor=INK, linewidth=0.9))
        else:
            edge = FAINT if kind == "data" else INK
            self._rectangle(box, facecolor=COLOURS[kind], edgecolor=edge, linewidth=0.9)
        self._text(x, y, text, box=box)
        return box

    def column(self, x: float, y: float, *items: Item, gap: float = GAP, width: float = 116) -> list[Box]:
        """Boxes from the one at y upwards, each with an arrow to the next."""
        (text, kind), *rest = items
        first = self.box(x, y, text, kind, width)
        return [first, *self.above(first, *rest, gap=gap, width=width)]

    def above(
        self, box: Box, *items: Item, gap: float = GAP, width: float = 116, first: float | None = None
    ) -> list[Box]:
        """A column that continues from `box`, with distance `first` to its first box and `gap` between the others."""
        boxes = [box]
        for number, (text, kind) in enumerate(items):
            space = first if first is not None and number == 0 else gap
            y = boxes[-1].top[1] + space + _height(text, kind) / 2
            boxes.append(self.box(box.x, y, text, kind, width))
            self.arrow(boxes[-2].top, boxes[-1].bottom)
        return boxes[1:]

    def residual(
        self, below: Box, *items: Item, width: float, reach: float = 14, first: float = WIDE_GAP
    ) -> list[Box]:
        """A column above `below` that ends in a plus, with a residual connection on its left."""
        boxes = self.above(below, *items, ("+", "op"), width=width, first=first)
        (x, y), left = boxes[0].bottom, below.x - width / 2 - reach
        self.arrow((x, y - 16), (left, y - 16), (left, boxes[-1].y), boxes[-1].left)
        return boxes

    def arrow(self, *points: Point, dashed: bool = False) -> None:
        """A line through the points with a head at its end."""
        line = FancyArrowPatch(
            path=Path(points),
            arrowstyle="-|>,head_length=4,head_width=2",
            linewidth=0.9,
            color=INK,
            linestyle=(0, (4, 2)) if dashed else "-",
            joinstyle="round",
        )
        self.axes.add_patch(line)

    def note(self, x: float, y: float, text: str, align: str = "left") -> None:
        """Small grey text without a box, its middle at y."""
        self._text(x, y, text, size=7.2, color=FAINT, align=align)

    def title(self, x: float, y: float, text: str) -> None:
        """The name of a part of the figure, centred."""
        self._text(x, y, text, size=9.5, weight="bold")

    def frame(self, left: float, bottom: float, right: float, top: float) -> None:
        """A faint dashed border around a part."""
        box = Box((left + right) / 2, (bottom + top) / 2, right - left, top - bottom)
        self._rectangle(box, facecolor="none", edgecolor=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))

    def svg(self) -> str:
        """The figure as SVG, without a date."""
        buffer = io.StringIO()
        with plt.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(self.figure)
        return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())

    def _rectangle(self, box: Box, **style: object) -> None:
        corner = box.left[0], box.bottom[1]
        rounded = "round,pad=0,rounding_size=4"
        self.axes.add_patch(FancyBboxPatch(corner, box.width, box.height, rounded, **style))

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        box: Box | None = None,
        size: float = 8,
        color: str = INK,
        align: str = "center",
        weight: str = "normal",
    ) -> None:
        # Line by line, so that each is centred by the reader's own font.
        lines = text.split("\n")
        for number, line in enumerate(lines):
            base = y + ((len(lines) - 1) / 2 - number) * LINE - 0.5 * size
            artist = self.axes.text(
                x,
                base,
                line,
                size=size,
                color=color,
                ha=align,
                va="baseline",
                weight=weight,
                family="DejaVu Sans",
            )
            self.texts.append((artist, box))


def _height(text: str, kind: str) -> float:
    return 2 * RADIUS if kind == "op" else 12 + LINE * (text.count("\n") + 1)

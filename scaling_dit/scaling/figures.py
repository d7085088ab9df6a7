"""The figures of a study's report as Vega-Lite specifications, which a browser draws and vl-convert prints.

A specification is a plain dict. It names its data ("points", "members", ...), which the page holds once for all
figures.
"""

import dataclasses
import re
from typing import Any

from scaling_dit.errors import UserError
from scaling_dit.scaling.figure_data import SHOWN, Data, ranked, scored
from scaling_dit.scaling.spec import LOSS
from scaling_dit.scaling.study import Study

Spec = dict[str, Any]
# Each has a contrast of at least 4.5 to 1 on white.
COLOURS = (
    "#0060a8", "#b04300", "#00714a", "#8a3a8f", "#6b5900", "#a8123e", "#3f4f5f", "#007580", "#5b3fbf", "#7a4a21",
    "#2f6f1f", "#9a2b6b",
)  # fmt: skip
# With more members than colours, lines have the colour of their family.
_MOST = len(COLOURS)
_FEW_POINTS = 1000
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_AXES = {
    "step": ("steps", False),
    "train_flops": ("training FLOPs", True),
    "params": ("parameters", True),
    "inference_flops": ("FLOPs of sampling an image", True),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure: its file name, what it shows in a sentence, its specification, and the data that it names."""

    name: str
    title: str
    spec: Spec
    data: tuple[str, ...]


def figures(study: Study, data: Data) -> list[Figure]:
    """The figures that have something to show, in the order of the page."""
    found = scored(study)
    metric, members = found[0] if found else None, len(study.spec.members)
    cut = f" (the best {SHOWN} of {members} members)" if members > SHOWN else ""
    main = metric or LOSS
    made = [
        Figure("claims", "Each claim: the difference with its 95 % interval", _forest(), ("claims",)),
        Figure(
            "members", f"{main} at the last step: seeds, and their mean{cut}", _dots(study, main), ("best",)
        ),
    ]
    for value in filter(None, (metric, LOSS)):
        for axis, (words, _) in _AXES.items():
            source = "points" if axis in ("step", "train_flops") else "ends"
            if any(row.get(axis) is not None and row.get(value) is not None for row in data[source]):
                title = f"{value} against {words}"
                made.append(
                    Figure(file_name(value, axis), title, _scatter(study, source, axis, value), (source,))
                )
    edge = "Loss against training FLOPs, with the frontier"
    made.append(Figure("frontier", edge, _frontier_spec(study), ("frontier", "points")))
    if metric:
        title = f"{metric} against training FLOPs: fitted laws with 90 % intervals"
        made.append(Figure("laws", title, _laws_spec(study, metric), ("curves", "points")))
    types, bins = _heat("types", "type", "score"), _heat("bins", "timesteps", "loss")
    made += [
        Figure("types", f"Score by element type, means over seeds{cut}", types, ("types",)),
        Figure("timesteps", f"Validation loss by timestep, means over seeds{cut}", bins, ("bins",)),
    ]
    if len({row["guidance"] for row in data["guided"]}) > 1:
        made.append(Figure("guidance", f"Score against guidance scale{cut}", _guidance(study), ("guided",)))
    made += [
        Figure("time", f"Minutes of each run, over all its starts{cut}", _bars("minutes"), ("measured",)),
        Figure("goodput", f"Goodput: the share of time in steps{cut}", _bars("goodput"), ("measured",)),
    ]
    # The first set is the one a figure is about; without it there is no figure.
    return [figure for figure in made if data[figure.data[0]]]


def file_name(value: str, axis: str) -> str:
    """The name of the figure of a column over an axis; a metric of the user's own names its scalars as it likes."""
    safe = re.sub(r"[^\w.+-]", "_", value)
    return f"{safe}-{axis}"


def _field(name: str) -> str:
    """A column as Vega names it: without backslashes, dots and brackets reach into objects."""
    return re.sub(r"""([\\.\[\]'"])""", r"\\\1", name)


def _colour(study: Study) -> Spec:
    """Colour by member where there are few, else by family."""
    few = len(study.spec.members) <= _MOST
    field = "member" if few else "family"
    names = (
        [m.name for m in study.spec.members]
        if few
        else sorted({m.config.backbone.name for m in study.spec.members})
    )
    scale = {"domain": names, "range": [COLOURS[i % _MOST] for i in range(len(names))]}
    legend = {"orient": "bottom", "columns": 2, "title": None, "labelLimit": 260, "symbolOpacity": 1}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def _family_colour(study: Study) -> Spec:
    names = sorted({str(member.config.backbone.name) for member in study.spec.members})
    scale = {"domain": names, "range": [COLOURS[i % _MOST] for i in range(len(names))]}
    return {
        "field": "family",
        "type": "nominal",
        "scale": scale,
        "legend": {"orient": "bottom", "title": None, "columns": 3},
    }


def _x(axis: str) -> Spec:
    title, log = _AXES[axis]
    shown: Spec = {
        "field": axis,
        "type": "quantitative",
        "title": title,
        "axis": {"format": "~s", "labelOverlap": True},
    }
    if log:
        shown |= {"scale": {"type": "log"}, "axis": {"format": "~e", "labelOverlap": True, "tickCount": 4}}
    return shown


def _y(field: str, title: str = "") -> Spec:
    shown = {"field": _field(field), "type": "quantitative", "scale": {"zero": False}}
    return shown | {"title": title or field}


def _chart(data: str, **parts: Any) -> Spec:
    return {"$schema": _SCHEMA, "data": {"name": data}, "width": "container", "height": 280, **parts}


def _tips(*fields: str) -> list[Spec]:
    return [
        _tip(name, "nominal" if name in ("member", "family", "claim") else "quantitative") for name in fields
    ]


def _tip(name: str, kind: str) -> Spec:
    titled = {} if _field(name) == name else {"title": name}
    return {"field": _field(name), "type": kind} | titled


def _dot(size: int, opacity: float) -> Spec:
    """A filled point with a translucent fill; of a point that is translucent as a whole, renderers make a layer."""
    return {"type": "point", "filled": True, "size": size, "opacity": 1, "fillOpacity": opacity}


def _scatter(study: Study, source: str, axis: str, value: str) -> Spec:
    mark = _dot(45, 0.8)
    if source == "points":
        # Points on many lines take most of the drawing, and hide one another.
        few = len(study.rows) <= _FEW_POINTS
        points = {"size": 22, "opacity": 1} if few else False
        mark = {"type": "line", "point": points, "strokeWidth": 1.5, "opacity": 1, "strokeOpacity": 0.75}
    encoding = {
        "x": _x(axis), "y": _y(value), "color": _colour(study), "detail": [{"field": "member"}, {"field": "seed"}],
        "tooltip": _tips("member", "seed", axis, value),
    }  # fmt: skip
    return _chart(source, mark=mark, encoding=encoding)


def _dots(study: Study, value: str) -> Spec:
    rows: Spec = {
        "field": "member", "type": "nominal", "title": None, "sort": ranked(study), "axis": {"labelLimit": 180}
    }  # fmt: skip
    seeds = {
        "mark": _dot(40, 0.7) | {"color": COLOURS[0]},
        "encoding": {"y": rows, "x": _y(value), "tooltip": _tips("member", "seed", value)},
    }
    means = {
        "mark": {"type": "tick", "thickness": 3, "color": "#1a1a1a", "size": 16},
        "encoding": {"y": rows, "x": _y(value) | {"aggregate": "mean"}},
    }
    return _chart("best", layer=[seeds, means]) | {"height": {"step": 22}}


def _forest() -> Spec:
    rows: Spec = {"field": "claim", "type": "nominal", "title": None, "axis": {"labelLimit": 210}}
    colour = {
        "field": "verdict", "type": "nominal", "legend": {"orient": "bottom", "title": None, "columns": 1},
        "scale": {"domain": ["supported", "undecided", "refuted"], "range": [COLOURS[2], COLOURS[6], COLOURS[5]]},
    }  # fmt: skip
    zero = {
        "mark": {"type": "rule", "strokeDash": [4, 3], "color": "#555555"},
        "encoding": {"x": {"datum": 0}},
    }
    lines = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {
            "y": rows,
            "x": {"field": "low", "type": "quantitative", "title": "difference"},
            "x2": {"field": "high"},
            "color": colour,
        },
    }
    dots = {
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {
            "y": rows,
            "x": {"field": "effect", "type": "quantitative"},
            "color": colour,
            "tooltip": _tips("claim", "effect", "low", "high"),
        },
    }
    asked = {
        "mark": {"type": "tick", "color": "#1a1a1a", "thickness": 2},
        "encoding": {"y": rows, "x": {"field": "margin", "type": "quantitative"}},
    }
    return _chart("claims", layer=[zero, lines, dots, asked]) | {"height": {"step": 34}}


def _frontier_spec(study: Study) -> Spec:
    x, y = _x("train_flops"), _y(LOSS)
    runs = {
        "data": {"name": "points"},
        "mark": _dot(30, 0.6),
        "encoding": {
            "x": x,
            "y": y,
            "color": _family_colour(study),
            "tooltip": _tips("member", "seed", "train_flops", LOSS),
        },
    }
    fit = {
        "data": {"name": "frontier"},
        "mark": {"type": "line", "color": "#1a1a1a", "strokeDash": [5, 3]},
        "encoding": {"x": x, "y": _y("fit", LOSS)},
    }
    edge = {
        "data": {"name": "frontier"},
        "mark": {"type": "point", "size": 90, "color": "#1a1a1a", "opacity": 1},
        "encoding": {"x": x, "y": y},
    }
    return _chart("points", layer=[runs, fit, edge])


def _laws_spec(study: Study, metric: str) -> Spec:
    x, colour = _x("train_flops"), _family_colour(study)
    curves = {"data": {"name": "curves"}}
    band = curves | {
        "mark": {"type": "area", "opacity": 1, "fillOpacity": 0.15},
        "encoding": {"x": x, "y": _y("low", metric), "y2": {"field": "high"}, "color": colour},
    }
    line = curves | {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {"x": x, "y": _y("y", metric), "color": colour},
    }
    runs = {
        "data": {"name": "points"},
        "mark": _dot(30, 0.7),
        "encoding": {
            "x": x,
            "y": _y(metric),
            "color": colour,
            "tooltip": _tips("member", "seed", "train_flops", metric),
        },
    }
    return _chart("points", layer=[band, line, runs])


def _heat(source: str, column: str, value: str) -> Spec:
    rows: Spec = {"field": "member", "type": "nominal", "title": None, "axis": {"labelLimit": 160}}
    columns: Spec = {
        "field": column,
        "type": "nominal",
        "title": None,
        "axis": {"labelAngle": -40, "labelLimit": 160},
    }
    colour = {
        "field": value,
        "type": "quantitative",
        "scale": {"scheme": "blues"},
        "legend": {"orient": "bottom", "title": value},
    }
    tips = [{"field": "member"}, {"field": column}, {"field": value, "type": "quantitative", "format": ".4f"}]
    return _chart(
        source,
        mark={"type": "rect", "stroke": "#ffffff"},
        encoding={"x": columns, "y": rows, "color": colour, "tooltip": tips},
    ) | {"height": {"step": 24}}


def _guidance(study: Study) -> Spec:
    encoding = {
        "x": {"field": "guidance", "type": "quantitative", "title": "guidance scale"},
        "y": _y("value", study.columns.own) | {"aggregate": "mean"},
        "color": _colour(study) | {"field": "member"},
    }
    return _chart("guided", mark={"type": "line", "point": True}, encoding=encoding)


def _bars(value: str) -> Spec:
    rows: Spec = {
        "field": "member",
        "type": "nominal",
        "title": None,
        "sort": None,
        "axis": {"labelLimit": 180},
    }
    encoding = {
        "y": rows,
        "x": {"field": value, "type": "quantitative", "title": value},
        "tooltip": _tips("member", "seed", value),
    }
    mark = _dot(45, 0.75) | {"color": COLOURS[0]}
    return _chart("measured", mark=mark, encoding=encoding) | {"height": {"step": 22}}


def printed(figure: Figure, data: Data, width: int = 620) -> Spec:
    """A figure with its data inside and a fixed width, for vl-convert."""
    return {
        **figure.spec,
        "width": width,
        "datasets": {name: data[name] for name in figure.data},
        "config": CONFIG,
        "background": "white",
    }


_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_INK = {"labelColor": "#1a1a1a", "titleColor": "#1a1a1a", "labelFontSize": 12}
# Of all figures: readable text, thin lines.
CONFIG: Spec = {
    "font": _FONT,
    "axis": _INK
    | {"gridColor": "#e3e3e3", "titleFontSize": 12, "titleFontWeight": 500, "labelSeparation": 6},
    "legend": _INK,
    "view": {"stroke": None},
}


def converter() -> Any:
    """vl-convert.

    Raises:
      UserError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise UserError("a study's report needs vl-convert: pip install 'scaling-dit[study]'") from None
    return vl_convert

"""The report of a study: one self-contained HTML page, its figures as SVG and PNG, its table as CSV and LaTeX.

The page holds everything it shows, vega included, and makes no request: its own security policy forbids any. The
answer to the study's question comes first, in a sentence that the tests of its claims made.
"""

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from PIL import Image

from scaling_dit import config as config_lib
from scaling_dit import files
from scaling_dit._version import __version__
from scaling_dit.scaling import (
    early,
    figure_data,
    figures,
    findings,
    fitted,
    machine,
    merging,
    parity,
    published,
    tables,
    tuned,
)
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.figure_data import Data
from scaling_dit.scaling.figures import Figure
from scaling_dit.scaling.study import Study

PAGE = "index.html"
# Bytes of base64 that sample grids may take of the page's 5 MB.
_GRID_BYTES = 2_000_000
_GRID_WIDTH = 420
_TEMPLATE = pathlib.Path(__file__).with_name("page.html")
# Figures that take the whole width of the page.
_WIDE = ("claims", "members", "types", "timesteps", "laws", "frontier")
_METRIC_COLUMNS = 8
# Without its folder, `train` would need the run's whole config, and a stage's base.
_RUNS_NOTE = (
    "The command of the study trains what is missing, each stage from its base. Those of single runs resume a run that "
    "lies in its folder, and refuse where there is none."
)


def main(workdirs: Sequence[str], *, as_json: bool = False) -> int:
    """The `report` verb for a study, or for several merged: writes the report below the first and prints the answer."""
    study = study_lib.open_study(workdirs[0]) if len(workdirs) == 1 else merging.merge(workdirs)
    page = write(study)
    answered = findings.answers(study)
    if as_json:
        print(json.dumps(facts(study), indent=1))
        return 0
    print(findings.headline(study, answered))
    for one in answered:
        print(f"- {one.claim.name}: {one.sentence}")
    print(f"report: {page}")
    return 0


def facts(study: Study) -> dict[str, Any]:
    """What the report says, for programs: question, answer, claims, laws and the table by member."""
    answered = findings.answers(study)
    survival = tuned.survival(study, answered)
    return {
        "question": study.spec.question,
        "answer": findings.headline(study, answered),
        "claims": [
            {
                "name": one.claim.name,
                "metric": one.metric,
                "verdict": one.answer.verdict if one.answer else None,
                "effect": one.answer.effect if one.answer else None,
                "interval": one.answer.interval if one.answer else None,
                "detectable": one.answer.detectable if one.answer else None,
                "p_holm": one.answer.p_holm if one.answer else None,
                "registered_after": one.after,
                "at_tuned_rate": survival.get(one.claim.name),
            }
            for one in answered
        ],
        "laws": [
            {
                "name": fit.name,
                "formula": fit.formula,
                "values": fit.rows,
                "points": fit.points,
                "refused": fit.refused,
            }
            for fit in fitted.fits(study)
        ],
        "members": findings.by_member(study),
    }


def write(study: Study, folder: epath.Path | None = None, *, prints: bool = True) -> epath.Path:
    """Writes the report and returns the path of its page.

    Args:
      study: with the results so far.
      folder: to write to; `report/` in the study's folder by default.
      prints: also write each figure as SVG and PNG, about a second each.

    Raises:
      UserError: vl-convert is not installed, or the folder cannot be written.
    """
    convert = figures.converter()
    folder = folder or study.folder.report
    folder.mkdir(parents=True, exist_ok=True)
    answered, found = findings.answers(study), fitted.fits(study)
    data = figure_data.data_of(study, answered, found)
    made = figures.figures(study, data)
    by_member = findings.by_member(study)
    scores, others = _scores(study, answered)
    files.write_whole(folder / "members.csv", tables.matched_csv(by_member).encode())
    latex = tables.matched_latex(by_member, scores, study.spec.question)
    files.write_whole(folder / "members.tex", latex.encode())
    if prints:
        for figure in made:
            spec = figures.printed(figure, data)
            svg = convert.vegalite_to_svg(spec)
            files.write_whole(folder / f"{figure.name}.svg", svg.encode())
            files.write_whole(folder / f"{figure.name}.png", convert.svg_to_png(svg, scale=1.5))
    table = _members(study, by_member, scores, others)
    page = _page(study, made, data, convert.javascript_bundle(), answered, found, table)
    files.write_whole(folder / PAGE, page.encode())
    return folder / PAGE


def _page(
    study: Study,
    made: Sequence[Figure],
    data: Data,
    vega: str,
    answered: Sequence[findings.Answered],
    found: Sequence[fitted.Fit],
    members: str,
) -> str:
    grids, holders, points, left_out = _grids(study)
    parts = [
        _section("Claims", tables.claims_html(answered, tuned.survival(study, answered))) if answered else "",
        _order(study),
        _rates(study),
        _power(study),
        _early(study),
        members,
        _section("Figures", f'<div class="charts">{"".join(map(_figure, made))}</div>'),
        _section("Laws", tables.fits_html(found), _endpoint_note(study)) if found else "",
        _section("How far the laws reach", tables.audit_html(fitted.audits(study))) if found else "",
        _printed() if found else "",
        _samples(holders, points, left_out),
        _section("Costs and goodput", _costs(study)),
        _section("Runs", _runs(study), _RUNS_NOTE),
    ]
    used = {name for figure in made for name in figure.data}
    drawn = [{"name": one.name, "spec": one.spec, "data": one.data} for one in made]
    starts = [start for folder in study.folders for start in machine.read(folder)]
    finished = len({(row["member"], row["seed"]) for row in study.rows if row["status"] == "done"})
    filled = {
        "title": html.escape(study.spec.question),
        "about": html.escape(
            f"A study of {len(study.spec.members)} members and {len(study.spec.seeds)} training seeds; "
            f"{finished} of {study.runs} runs have finished. scaling_dit {__version__}."
        ),
        "machine": html.escape(" ".join(machine.lines(starts))),
        "question": html.escape(study.spec.question),
        "answer": html.escape(findings.headline(study, answered)),
        "body": "\n".join(filter(None, parts)),
        # A closing tag inside a script would end it.
        "vega": vega.replace("</script", r"<\/script"),
        "data": _json({name: data[name] for name in sorted(used)}),
        "figures": _json({"figures": drawn, "config": figures.CONFIG, "grids": grids}),
    }
    # One pass over the template alone: what is filled in may hold anything.
    return re.sub(r"@(\w+)@", lambda found: filled[found[1]], _TEMPLATE.read_text())


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c")


def _section(title: str, body: str, note: str = "") -> str:
    shown = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{shown}{body}</section>"


def _figure(figure: Figure) -> str:
    wide = ' class="wide"' if figure.name in _WIDE else ""
    return (
        f'<figure{wide}><h3>{html.escape(figure.title)}</h3><div class="chart" id="chart-{figure.name}" role="img" '
        f'aria-label="{html.escape(figure.title)}"></div></figure>'
    )


def _scores(study: Study, answered: Sequence[findings.Answered]) -> tuple[list[str], list[str]]:
    """The scores that have a column in the table by member, those of claims before others, and the rest."""
    names, asked = study.columns.scores(), {one.metric for one in answered}
    first = sorted(names, key=lambda name: name not in asked)[:_METRIC_COLUMNS]
    return [name for name in names if name in first], [name for name in names if name not in first]


def _members(
    study: Study, rows: Sequence[dict[str, Any]], scores: Sequence[str], others: Sequence[str]
) -> str:
    note = _files_note(study)
    if others:
        left = html.escape(", ".join(others))
        count = len(scores) + len(others)
        note += f" Of {count} scores these are {len(scores)}; members.csv has all, so also {left}."
    return _section("Members", tables.cells_html(*tables.matched_cells(rows, scores)), note)


def _files_note(study: Study) -> str:
    staged = _staged(study)
    without = f"Those of {staged} do not count what the member cost that each begins from. " if staged else ""
    return (
        "Means over training seeds at the last step, with their standard deviation. Costs are counted from the "
        "program: training FLOPs are 6 x MACs x samples. "
        f"{without}The same table: members.csv and members.tex; every point: "
        "table.parquet."
    )


def _endpoint_note(study: Study) -> str:
    used = fitted.endpoints(study)
    before = sum(row["step"] != row["steps"] for row in used)
    if not before:
        note = "Laws rest on the last points of runs alone: with a decaying rate no earlier point stands for a run."
    else:
        note = (
            f"Laws rest on {len(used)} points. {before} of them are checkpoints of runs with a constant learning rate, "
            "each of which is the end of a run with a smaller budget."
        )
    if staged := _staged(study):
        note += f" Left out, for their costs do not count their bases': {staged}."
    same = parity.same_data(study.spec.members)
    if others := [member.name for member in study.spec.members if member.name not in same]:
        note += f" Left out, for they were trained on other data than most: {html.escape(', '.join(others))}."
    return note


def _staged(study: Study) -> str:
    """The members that begin from another, in HTML; "" where none does."""
    return html.escape(", ".join(member.name for member in study.spec.members if member.base))


def _order(study: Study) -> str:
    metric = study.columns.own
    ranked = findings.ranking(study, metric)
    if ranked is None:
        return ""
    low, high = ranked.interval
    note = (
        f"By {html.escape(metric)}. Kendall's tau between this order and the orders of resampled seeds: "
        f"{ranked.tau:.2f} (90 % interval {low:.2f} to {high:.2f})."
    )
    if others := findings.left_out(study, metric):
        note += f" {html.escape(others)}"
    return _section("Order", tables.ranking_html(ranked), note)


def _rates(study: Study) -> str:
    metric = study.columns.own
    found = tuned.places(study, metric)
    if found is None:
        return ""
    places, tau = found
    swept = sum(one.sweep is not None for one in places)
    note = (
        f"{swept} of {len(places)} members were trained with several learning rates. The order by "
        f"{html.escape(metric)} at the study's rate and the order with each of these at its best rate, chosen by "
        f"validation loss, have a Kendall's tau of {tau:.2f}."
    )
    return _section("Does the order survive the tuned rate?", tables.places_html(places), note)


def _power(study: Study) -> str:
    metric = study.columns.own
    found = findings.power_table(study, metric)
    if found is None:
        return ""
    spread, rows = found
    heads = [f"difference in {metric}", *(f"{seeds} seeds" for seeds in findings.POWER_SEEDS)]
    cells = [[f"{difference:.3g}", *(f"{value:.0%}" for value in values)] for difference, values in rows]
    note = (
        f"A training seed moves {html.escape(metric)} by {spread:.3g} (standard deviation, pooled over members). So a "
        "true difference between two members is detected, at 95 % and before any correction, in this share of studies:"
    )
    if parts := findings.variance(study):
        note = (
            f"Of the variance of one score, training seeds make {parts[0]:.3g} and generation seeds {parts[1]:.3g}. "
            + note
        )
    return _section("Power", tables.cells_html(heads, cells), note)


def _early(study: Study) -> str:
    rows = early.signals(study)
    if not rows:
        return ""
    metric = study.columns.own
    bins = list(rows[0].by_timestep)
    heads = ["share of training", f"by {metric}", "by validation loss"]
    heads += [f"by loss at timesteps {name.rpartition('_t')[2]}" for name in bins]
    cells = [
        [
            f"{row.share:.0%}",
            *map(_correlation, (row.by_score, row.by_loss, *(row.by_timestep[name] for name in bins))),
        ]
        for row in rows
    ]
    note = (
        f"Spearman's rank correlation of the members' order at part of the training with their order by "
        f"{html.escape(metric)} at the end."
    )
    return _section("Early signal", tables.cells_html(heads, cells) + _low_resolution(study, metric), note)


def _low_resolution(study: Study, metric: str) -> str:
    found = early.low_resolution(study)
    if found is None:
        return ""
    cells = [[f"{share:.0%}", _correlation(value)] for share, value in found.shares]
    pairs = ", ".join(f"{low} and {high}" for low, high in found.members)
    note = (
        f"At a lower resolution: the order of {len(found.members)} members by {html.escape(metric)} there, at part "
        "of the training, against the order of the same members at the higher resolution at the end "
        f"({html.escape(pairs)}). A run at the lower one costs {found.flops:.2g} of the training FLOPs."
    )
    return f'<p class="note">{note}</p>' + tables.cells_html(["share of training", "correlation"], cells)


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _printed() -> str:
    """What the laws that P1 printed give at its own points, and why one exponent cannot be right."""
    heads = ["law", "at", "as printed", "with the exponent 0.011"]
    cells = []
    for point in published.points():
        other = "" if point.corrected is None else f"{point.corrected:.3f}"
        cells.append([point.law.formula, point.label, f"{point.score:.3f}", other])
    note = f"TIFA by the laws of {published.P1_PARAMS.source}, to compare with. {published.P1_PARAMS.remark}"
    return _section("Laws in print", tables.cells_html(heads, cells), html.escape(note))


def _costs(study: Study) -> str:
    heads = [
        "run",
        "status",
        "minutes",
        "in steps",
        "compiling",
        "goodput",
        "starts",
        "images/s",
        "peak memory",
    ]
    cells = []
    for row in study.measured:
        speed, peak = row["images_per_second"], row["peak_bytes"]
        cells.append(
            [
                f"{row['member']}, seed {row['seed']}",
                row["status"],
                f"{row['wall_seconds'] / 60:.1f}",
                f"{row['step_seconds'] / 60:.1f}",
                f"{row['compile_seconds'] / 60:.1f}",
                f"{row['goodput']:.1%}",
                str(row["starts"]),
                "-" if speed is None else f"{speed:,.0f}",
                "not counted" if peak is None else f"{peak / 2**30:.2f} GiB",
            ]
        )
    return tables.cells_html(heads, cells)


def _runs(study: Study) -> str:
    """The config of the first member whole, and what differs in the others, with the commands."""
    all_ = "\n".join(f"scaling-dit study --workdir={folder}" for folder in study.folders)
    shown = [f"<pre>{html.escape(all_)}</pre>"]
    base: dict[str, Any] = {}
    for member in study.spec.members:
        fields = {key: repr(value) for key, value in config_lib.flatten(member.config).items()}
        new = fields if not base else {k: v for k, v in fields.items() if base.get(k) != v}
        gone = [key for key in base if key not in fields]
        lines = [f"{key} = {value}" for key, value in sorted(new.items())] + [
            f"{key}: no such field" for key in gone
        ]
        title = "the whole config" if not base else f"what differs from {study.spec.members[0].name}"
        title += f"; begins from {member.base}" if member.base else ""
        commands = "\n".join(
            f"scaling-dit train --workdir={study.run(member.name, seed)}" for seed in study.seeds(member.name)
        )
        shown.append(
            f"<details><summary>{html.escape(member.name)}: {title}</summary>"
            f"<pre>{html.escape(chr(10).join(lines))}\n\n{html.escape(commands)}</pre></details>"
        )
        base = base or fields
    return "\n".join(shown)


def _samples(holders: Sequence[str], points: int, left_out: int) -> str:
    if not holders:
        return ""
    note = "The same prompts and noise at each point, of each member's first seed."
    if left_out:
        note += f" Left out to keep this page small: {left_out} of the members; their grids lie in the runs' folders."
    slider = (
        f'<p class="screen"><label for="point">Point of training</label><br><input type="range" id="point" min="0" '
        f'max="{points - 1}" value="{points - 1}"> <span id="point-label"></span></p>'
    )
    return _section("Samples", slider + f'<div class="grids">{"".join(holders)}</div>', note)


def _grids(study: Study) -> tuple[list[str], list[str], int, int]:
    """(images as base64, a holder for each member, points, members left out), within `_GRID_BYTES`."""
    images: list[str] = []
    holders, size, points, left_out = [], 0, 0, 0
    for member in study.spec.members:
        found = _grids_of(study, member.name)
        if not found:
            continue
        added = sum(len(text) for _, text in found)
        if size + added > _GRID_BYTES:
            left_out += 1
            continue
        size += added
        points = max(points, len(found))
        rows = [{"step": step, "image": len(images) + i} for i, (step, _) in enumerate(found)]
        images += [text for _, text in found]
        name = html.escape(member.name)
        holders.append(
            f'<figure data-member="{name}" data-grids="{html.escape(json.dumps(rows))}"><img alt="samples of {name}" '
            f'src="data:image/png;base64,{found[-1][1] if len(found) == 1 else ""}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return images, holders, points, left_out


def _grids_of(study: Study, member: str) -> list[tuple[int, str]]:
    """(step, PNG as base64) of the sample grids of a member's first seed that has some."""
    for seed in study.seeds(member):
        folder = study.run(member, seed).metrics
        steps = sorted({row["step"] for row in study.rows if row["member"] == member and row["seed"] == seed})
        paths = [(step, folder / f"samples-{step:08d}.png") for step in steps]
        found = [(step, _small_png(path)) for step, path in paths if path.exists()]
        if found:
            return found
    return []


def _small_png(path: epath.Path) -> str:
    with path.open("rb") as file:
        image = Image.open(file).convert("RGB")
    if image.width > _GRID_WIDTH:
        image = image.resize(
            (_GRID_WIDTH, round(image.height * _GRID_WIDTH / image.width)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    image.quantize(64).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()

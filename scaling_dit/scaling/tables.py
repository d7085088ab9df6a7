"""Tables of a study's report, as HTML, CSV and LaTeX."""

import csv
import functools
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_dit.scaling.audit import TOLERANCE, Audit
from scaling_dit.scaling.claims import RankStability
from scaling_dit.scaling.findings import Answered
from scaling_dit.scaling.fitted import Fit
from scaling_dit.scaling.tuned import Place

Row = Mapping[str, Any]
_HEADS = {
    "member": "member",
    "family": "family",
    "params": "parameters",
    "macs_total": "MACs",
    "steps": "steps",
    "samples": "samples",
    "train_flops": "training FLOPs",
    "inference_flops": "FLOPs an image",
    "seeds": "seeds",
}
_LATEX = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "^": r"\^{}",
          "~": r"\~{}", "\\": r"\textbackslash{}"}  # fmt: skip


def matched_csv(rows: Sequence[Row]) -> str:
    """The table by member with full precision, one line a member."""
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def matched_cells(rows: Sequence[Row], scores: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of the table by member; a score is "mean ± standard deviation over seeds"."""
    heads = [*_HEADS.values(), *scores]
    cells = []
    for row in rows:
        shown = [_plain(row.get(name)) for name in _HEADS]
        shown += [_score(row.get(name), row.get(f"{name}_sd")) for name in scores]
        cells.append(shown)
    return heads, cells


def matched_latex(rows: Sequence[Row], scores: Sequence[str], caption: str) -> str:
    """The table by member as LaTeX (package booktabs)."""
    heads, cells = matched_cells(rows, scores)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escape(caption)}}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
        r"\toprule",
        " & ".join(map(_escape, heads)) + r" \\",
        r"\midrule",
        *(" & ".join(_escape(cell).replace("±", r"$\pm$") for cell in row) + r" \\" for row in cells),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def claims_html(answered: Sequence[Answered], survival: Mapping[str, str]) -> str:
    """Each claim with its verdict, and whether it was registered before the first result.

    Args:
      survival: claim -> whether its answer holds at tuned learning rates (`tuned.survival`); without any no column.
    """
    rows = []
    for one in answered:
        verdict = one.answer.verdict if one.answer else "undecided"
        word = verdict if one.answer else "no such score" if one.lacks else "waiting"
        when = "before any run" if not one.after else f"after {one.after} runs had finished"
        rows.append(
            f'<tr><td class="text">{_h(one.claim.name)}</td><td class="{verdict}">{word}</td>'
            f'<td class="text">{_h(one.sentence)}</td><td>{when}</td>'
            + (f'<td class="text">{_h(survival[one.claim.name])}</td>' if survival else "")
            + "</tr>"
        )
    heads = ["claim", "answer", "what the runs say", "registered"]
    return _table([*heads, "holds at the tuned rate?"] if survival else heads, "".join(rows), words=True)


def fits_html(fitted: Sequence[Fit]) -> str:
    """Each law with its values, intervals, what it rests on and its warnings; those refused with the reason."""
    rows = []
    for fit in fitted:
        values = "; ".join(
            f"{name} {value:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")
            for name, value, low, high in fit.rows
        )
        said = _h(fit.formula) if fit.formula else f"not fitted: {_h(fit.refused)}"
        notes = "; ".join(fit.warnings)
        rows.append(
            f'<tr><td class="text">{_h(fit.name)}</td><td class="text">{said}</td><td class="text">{_h(values)}</td>'
            f'<td>{fit.points} points of {fit.runs} runs</td><td class="text">{_h(notes)}</td></tr>'
        )
    heads = ["law", "fit", "values with 90 % intervals", "rests on", "to know before using it"]
    return _table(heads, "".join(rows), words=True)


def audit_html(audits: Mapping[str, Audit | str]) -> str:
    """How well each size is predicted from the others."""
    rows = []
    for family, found in audits.items():
        if isinstance(found, str):
            rows.append(
                f'<tr><td>{_h(family)}</td><td class="text" colspan="4">no audit: {_h(found)}</td></tr>'
            )
            continue
        for held in found.held:
            trusted = "yes" if abs(held.error) <= TOLERANCE else "no"
            rows.append(
                f"<tr><td>{_h(family)}</td><td>{_plain(held.params)}</td><td>{held.beyond:.3g} x</td>"
                f"<td>{held.error:+.2%}</td><td>{trusted}</td></tr>"
            )
    heads = [
        "family",
        "size left out",
        "beyond the others",
        "error of its predicted loss",
        f"within {TOLERANCE:.0%}",
    ]
    return _table(heads, "".join(rows))


def ranking_html(ranked: RankStability) -> str:
    """The order of members, and the probability that each is above the next."""
    rows = []
    for place, name in enumerate(ranked.order):
        last = place == len(ranked.order) - 1
        above = "" if last else f"{ranked.above[place, place + 1]:.2f}"
        rows.append(f"<tr><td>{place + 1}. {_h(name)}</td><td>{above}</td></tr>")
    return _table(["member", "P(above the next)"], "".join(rows))


def places_html(places: Sequence[Place]) -> str:
    """Each member's place at the study's learning rate and at its best one."""
    rows = []
    for one in places:
        tried = best = "-"
        if one.sweep:
            tried = ", ".join(
                f"{rate:.2g}" for name, rate in one.sweep.rates.items() if name in one.sweep.losses
            )
            edge = " (at the end of those tried)" if one.sweep.at_edge else ""
            best = f"{one.sweep.rates[one.sweep.best]:.2g}{edge}"
        rows.append([one.member, str(one.own), str(one.tuned), tried, best])
    heads = [
        "member",
        "place at the study's rate",
        "place at its best rate",
        "rates tried",
        "best rate, by loss",
    ]
    return cells_html(heads, rows)


def cells_html(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of plain cells."""
    rows = "".join("<tr>" + "".join(f"<td>{_h(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: str, *, words: bool = False) -> str:
    """A table that scrolls by itself on a narrow screen; `words` aligns it for sentences."""
    top = "".join(f'<th scope="col">{_h(head)}</th>' for head in heads)
    kind = ' class="words"' if words else ""
    if words:
        rows = "".join(map(functools.partial(_headed, heads), rows.split("<tr>")[1:]))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table{kind}><thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _headed(heads: Sequence[str], row: str) -> str:
    """A row whose cells name their column, for narrow screens, which show no heads."""
    names = iter(heads)
    return "<tr>" + re.sub("<td", lambda _: f'<td data-head="{_h(next(names))}"', row)


def _plain(value: Any) -> str:
    """A number in short: as it is below 100,000, else with three digits and a power of ten; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) < 1e5 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def _score(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if deviation is None else f"{value:.4f} ± {deviation:.4f}"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _h(text: object) -> str:
    return html.escape(str(text))

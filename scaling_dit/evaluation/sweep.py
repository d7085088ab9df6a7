"""Results over a grid of guidance and several generation seeds: at the protocol's guidance, and at each metric's best.

The papers sample with guidance 7.5 (arXiv 2404.02883), but the best scale differs between models, so a ranking at one
scale can be an artefact. The best value is chosen on the same prompts that it is reported on, for each run alike.
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

PROTOCOL = 7.5


def summarize(rows: Iterable[Mapping[str, Any]], lower_is_better: Mapping[str, bool]) -> dict[str, Any]:
    """For each metric its first scalar at every guidance, at the protocol's, and at the best.

    Args:
      rows: results of one run and checkpoint, as in results.jsonl.
      lower_is_better: metric -> whether its best value is the smallest.

    Returns:
      metric -> {"scalar", "by_guidance": {guidance: {"mean", "stdev", "seeds"}}, "protocol", "best",
      "best_guidance"}; "stdev" is over generation seeds, None for one; "protocol" is None if the grid has not 7.5.
    """
    values: dict[str, dict[float, list[float]]] = {}
    names: dict[str, str] = {}
    for row in rows:
        name, value = next(iter(row["scalars"].items()))
        names[row["metric"]] = name
        values.setdefault(row["metric"], {}).setdefault(float(row["guidance"]), []).append(value)
    found = {}
    for metric, by_guidance in values.items():
        means = {scale: statistics.fmean(some) for scale, some in sorted(by_guidance.items())}
        choose = min if lower_is_better.get(metric) else max
        best = choose(means, key=lambda scale: means[scale])
        found[metric] = {
            "scalar": names[metric],
            "by_guidance": {
                str(scale): {
                    "mean": means[scale],
                    "stdev": statistics.stdev(some) if len(some) > 1 else None,
                    "seeds": len(some),
                }
                for scale, some in sorted(by_guidance.items())
            },
            "protocol": means.get(PROTOCOL),
            "best": means[best],
            "best_guidance": best,
        }
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people: a row for each metric, a column for each guidance."""
    scales = sorted({float(scale) for one in summary.values() for scale in one["by_guidance"]})
    head = ["metric", *(f"guidance {scale:g}" for scale in scales), f"protocol ({PROTOCOL:g})", "best"]
    lines = [head]
    for one in summary.values():
        cells = [one["scalar"]]
        for scale in scales:
            found = one["by_guidance"].get(str(scale))
            spread = f" ± {found['stdev']:.2g}" if found and found["stdev"] is not None else ""
            cells.append(f"{found['mean']:.4g}{spread}" if found else "-")
        cells.append("-" if one["protocol"] is None else f"{one['protocol']:.4g}")
        cells.append(f"{one['best']:.4g} at {one['best_guidance']:g}")
        lines.append(cells)
    return columns(lines)


def columns(lines: list[list[str]]) -> str:
    """Rows of cells as text, the first column to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )

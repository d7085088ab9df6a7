"""Puts the report of a study below docs/reports, and its answers, tables and figures into a page of the docs.

    python -m tools.study_page runs/shapes_core docs/core_study.md --scores=shapes_tifa,shapes_tifa_spatial

What stands between the page's two markers is written anew, the rest stays. A page that does not exist is made. With
`--samples=N` the page shows, of N prompts, the condition, the image of each member (first seed, last step) and the true
image.
"""

import argparse
import functools
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.evaluation import registry
from scaling_dit.model.build import open_source
from scaling_dit.monitor.grid import captioned_grid, read_png, write_png
from scaling_dit.scaling import figures as figures_lib
from scaling_dit.scaling import findings, machine, report, table
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.findings import Answered
from scaling_dit.scaling.folder import scores_folder
from scaling_dit.scaling.spec import LOSS
from scaling_dit.scaling.study import Study
from tools import marked

BEGIN, END = "<!-- study: written by tools/study_page.py -->", "<!-- /study -->"
_WIDTH = 140


def text(study: Study, report_at: str, scores: Sequence[str], samples: str = "") -> str:
    """The section of a page, with its markers.

    Args:
      study: with the results so far.
      report_at: folder of its report, seen from the page.
      scores: columns of the table by member: the metric, and scalars of it.
      samples: image of samples, seen from the page; none without.
    """
    answered = findings.answers(study)
    done = len({(row["member"], row["seed"]) for row in table.last_points(study.rows)})
    there = study.folder.report
    return "\n\n".join(
        [
            BEGIN,
            _wrapped(f"**{findings.headline(study, answered)}**"),
            _wrapped(
                f"{study.spec.question} {len(study.spec.members)} members with {len(study.spec.seeds)} training seeds "
                f"each; points of {done} runs are shown. [The whole report]({report_at}/index.html) is one page with "
                "every curve, sample grids over training, costs, configs and commands; its table is there as "
                f"[CSV]({report_at}/members.csv) and [LaTeX]({report_at}/members.tex)."
            ),
            _wrapped(" ".join(machine.lines(machine.read(study.folder)))),
            _members(study, scores),
            _claims(answered),
            *([f"![Samples]({samples})"] if samples else []),
            *(
                f"![{what}]({report_at}/{name})"
                for what, name in figures(scores).items()
                if (there / name).exists()
            ),
            END,
        ]
    )


def figures(scores: Sequence[str]) -> dict[str, str]:
    """What figures show, and their files in a report; not every report has each."""
    metric = scores[0] if scores else LOSS
    return {
        f"{metric} of every member: seeds, and their mean": "members.svg",
        "Each claim with its interval": "claims.svg",
        f"{metric} against training FLOPs": f"{figures_lib.file_name(metric, 'train_flops')}.svg",
        "Score by element type": "types.svg",
    }


def _wrapped(words: str) -> str:
    return textwrap.fill(words, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _members(study: Study, scores: Sequence[str]) -> str:
    """The table by member: costs, time on the machine and scores, means over seeds with their deviation."""
    seconds: dict[str, list[float]] = {}
    for row in study.measured:
        if row.get("wall_seconds") is not None:
            seconds.setdefault(row["member"], []).append(row["wall_seconds"])
    shown = [LOSS, *scores]
    head = ["member", "parameters", "steps", "images", "training FLOPs", "seconds a run", *shown, "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for one in findings.by_member(study):
        spent = seconds.get(one["member"], [])
        lines.append(
            _row(
                [
                    one["member"],
                    f"{one['params']:,}",
                    f"{one['steps']:,}",
                    f"{one['samples']:,}",
                    f"{one['train_flops']:.3g}",
                    f"{sum(spent) / len(spent):.0f}" if spent else "",
                    *(_score(one, name) for name in shown),
                    str(one["seeds"]),
                ]
            )
        )
    return "\n".join(lines)


def _score(one: dict[str, Any], name: str) -> str:
    if one.get(name) is None:
        return ""
    spread = one.get(f"{name}_sd")
    digits = 4 if name == LOSS else 3
    return f"{one[name]:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _claims(answered: Sequence[Answered]) -> str:
    lines = [_row(["claim", "of", "answer", "difference", "95 % interval", "p (Holm)"]), _row(["---"] * 6)]
    for one in answered:
        if one.answer is None:
            lines.append(
                _row(
                    [
                        one.claim.name,
                        one.metric,
                        "no such score" if one.lacks else "not answered yet",
                        "",
                        "",
                        "",
                    ]
                )
            )
            continue
        low, high = one.answer.interval
        late = f", registered after {one.after} runs" if one.after else ""
        lines.append(
            _row(
                [
                    one.claim.name,
                    one.metric,
                    f"{one.answer.verdict}{late}",
                    f"{one.answer.effect:+.3g}",
                    f"{low:+.3g} to {high:+.3g}",
                    f"{one.answer.p_holm:.2g}",
                ]
            )
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def samples(study: Study, count: int) -> np.ndarray:
    """Condition, images of each member and true image of the first `count` prompts, uint8 [height, width, 3]."""
    spec, seed = study.spec, study.spec.seeds[0]
    images, captions, items = list[np.ndarray](), list[str](), {}
    for member in spec.members:
        config = spec.run_config(member, seed, str(study.folder.compile_cache))
        chosen = registry.choose(config, spec.metrics[:1])[0]
        items[member.name] = chosen.prompts(functools.partial(open_source, config), spec.items).items
    for number in range(count):
        for place, member in enumerate(spec.members):
            item = items[member.name][number]
            if not place:
                for name, given in item.conditions.items():
                    images.append(np.asarray(given)[..., :3])
                    captions.append(f"{name}: {item.prompt}")
            run = study.folder.run(member.name, seed)
            out = scores_folder(run, member.config.steps, spec.generation_seeds[0], spec.items, None)
            found = next(iter(out.glob(f"images-*/{item.id}.png")), None)
            if found is None:
                raise SystemExit(f"{out} has no image of {item.id}: the run of {member.name} has not ended")
            images.append(read_png(found))
            captions.append(member.name)
        if item.truth is not None:
            images.append(item.truth)
            captions.append("true image")
    return captioned_grid(np.stack(images), captions, columns=len(images) // count)


def main(arguments: list[str] | None = None) -> int:
    """Writes the report, copies it, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="folder of the study")
    parser.add_argument("page", type=pathlib.Path, help="page of the docs")
    parser.add_argument("--title", default="A study's report", help="of a page that does not exist")
    parser.add_argument(
        "--scores", default="", help="columns of the table, with commas; the metrics by default"
    )
    parser.add_argument("--samples", type=int, default=0, help="prompts whose images are shown")
    given = parser.parse_args(arguments)
    study = study_lib.open_study(given.study)
    report.write(study)
    name = pathlib.Path(given.study).name
    reports = given.page.parent / "reports" / name
    scores = [one for one in given.scores.split(",") if one] or [
        study.columns.of_metric(metric) for metric in study.spec.metrics
    ]
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    # What the page shows or links; the page of the report holds the other figures.
    for path in ("index.html", "members.csv", "members.tex", *figures(scores).values()):
        if (found := study.folder.report / path).exists():
            shutil.copy(found, reports / path)
    shown = ""
    if given.samples:
        write_png(epath.Path(reports) / "samples.png", samples(study, given.samples))
        shown = f"reports/{name}/samples.png"
    section = text(study, f"reports/{name}", scores, shown)
    marked.write(given.page, section, BEGIN, END, f"# {given.title}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

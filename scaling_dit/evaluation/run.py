"""The `evaluate` verb: samples the prompts of each metric with a trained run, scores the images, and writes it all."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.errors import UserError, printable
from scaling_dit.evaluation import METRICS, tifa
from scaling_dit.evaluation.parts import InFolder
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import Scoring
from scaling_dit.model.build import open_source
from scaling_dit.sampling.folder import GRID, iterate
from scaling_dit.sampling.options import tag
from scaling_dit.sampling.pipeline import open_for_sampling

RESULT = "result.json"
ROWS = "rows.jsonl"
# Folder of the parts scored so far; removed at the end.
_PARTS = "parts"


def main(
    workdir: str,
    out: str | None = None,
    *,
    metrics: Sequence[str] | None = None,
    items: int = 500,
    as_json: bool = False,
    seed: int = 0,
    step: int | None = None,
    ema: str | None = None,
    changes: Mapping[str, Any] | None = None,
    own_code: bool = False,
) -> int:
    """Scores a run by each metric; images, rows and `result.json` go to OUT/METRIC. Returns the exit code.

    Without `out` they go to a folder of these settings under `evaluation/` in the workdir: the same command again only
    adds the missing rows there.

    Raises:
      UserError: no run, an unknown metric, or a metric that does not fit the run's data.
    """
    config = read_config(workdir, own_code=own_code)
    names = tuple(metrics or config.eval.metrics)
    if not names:
        raise UserError(
            f"the run in {workdir} names no metric in config.eval.metrics; give --metrics={','.join(METRICS)}"
        )
    chosen = choose(config, names)
    source = open_source(config)
    # Before loading, so that a metric that does not fit the data shows at once.
    scorings = [
        Scoring(one.section, one.metric, one.metric.items(source, items), one.fields["batch"])
        for one in chosen
    ]
    pipe, sampler, about = open_for_sampling(config, workdir, changes or {}, step=step, ema=ema)
    root = epath.Path(out) if out else Workdir(workdir).evaluation / f"{tag(about, seed)}-n{items}"
    results: dict[str, Any] = {}
    for one, scoring in zip(chosen, scorings, strict=True):
        folder = root / one.section
        images = iterate(sampler, pipe, scoring.prompts, folder, seed=seed, about=about)
        head = {"metric": one.name, "workdir": str(workdir), "seed": seed, "n": len(scoring.prompts)} | about
        head |= {"fields": _as_json(one.fields)} | one.metric.about()
        results[one.name] = score_to_folder(scoring, images, folder, head, seed)
        if not as_json:
            settings = ", ".join(f"{key} {value}" for key, value in about.items())
            print(f"{one.name} of {workdir}: n {len(scoring.prompts)}, seed {seed}, {settings}")
            print(printable(one.metric.table(results[one.name]), keep="\n"))
            print(f"images: {folder / GRID}\nscores of each: {folder / ROWS}\nresult: {folder / RESULT}")
    if as_json:
        print(json.dumps(results))
    return 0


def score_to_folder(
    scoring: Scoring, images: Iterable[np.ndarray], folder: epath.Path, head: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """The result of a metric, `head` first, which is written to `folder` with the rows and what TIFA's tools read.

    A call that was killed scores only the missing images when it is repeated.

    Args:
      images: uint8 [some, H, W, 3], any number at a time, in the order of the items.
      head: JSON values that say what was scored and how; parts of a call with another one are not taken up.

    Raises:
      UserError: the metric breaks its contract, or cannot read the images.
    """
    parts = InFolder(folder / _PARTS, dict(head))
    scoring.update(images, parts)
    parts.share()
    found, rows = scoring.result(parts, seed)
    result = {**head, **found}
    if jax.process_index() == 0:
        with files.staged(folder / ROWS) as local, local.open("w") as file:
            for row in rows:
                plain = {key: value for key, value in row.items() if not isinstance(value, np.ndarray)}
                file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        if scoring.items[0].questions:
            tifa.write_questions(folder / "questions.json", (item.questions for item in scoring.items))
            tifa.write_image_map(
                folder / "images.json", {item.id: f"{item.id}.png" for item in scoring.items}
            )
        files.write_whole(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    parts.remove()
    return result


def _as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config as JSON reads them back."""
    return json.loads(json.dumps(dict(fields)))

"""The `evaluate` verb: draws a metric's prompts with a trained run, scores the pictures, and writes both down."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation import METRICS, tifa
from scaling_dit.model.build import open_source
from scaling_dit.sampling.folder import GRID, sample_to_folder
from scaling_dit.sampling.options import tag
from scaling_dit.sampling.pipeline import open_for_sampling

RESULT = "result.json"


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
) -> int:
    """Scores a run by each metric; pictures, questions and `result.json` go to OUT/METRIC. Returns the exit code.

    Without `out` they go to a folder of these settings under `evaluation/` in the workdir: the same command again only
    adds what is missing there.

    Raises:
      UserError: no run, an unknown metric, or a metric that does not fit the run's data.
    """
    config = read_config(workdir)
    names = tuple(metrics or config.eval.metrics)
    if not names:
        raise UserError(
            f"the run in {workdir} names no metric in config.eval.metrics; give --metrics={','.join(METRICS)}"
        )
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics names {name!r}; {nearest(name, METRICS)}")
    source = open_source(config)
    # Before loading, so that a metric that does not fit the data shows at once.
    wanted = {name: METRICS[name].items(source, items) for name in names}
    pipe, chosen, about = open_for_sampling(config, workdir, changes or {}, step=step, ema=ema)
    root = epath.Path(out) if out else Workdir(workdir).evaluation / f"{tag(about, seed)}-n{items}"
    results: dict[str, Any] = {}
    for name, metric_items in wanted.items():
        folder = root / name
        prompts = [(item.id, item.prompt) for item in metric_items]
        images = sample_to_folder(chosen, pipe, prompts, folder, seed=seed, about=about)
        result = METRICS[name].score(list(images), metric_items, seed=seed)
        head = {"metric": name, "workdir": str(workdir), "seed": seed, "n": len(metric_items)}
        results[name] = head | about | result
        tifa.write_questions(folder / "questions.json", [item.questions for item in metric_items])
        tifa.write_image_map(folder / "images.json", {item.id: f"{item.id}.png" for item in metric_items})
        (folder / RESULT).write_text(json.dumps(results[name], indent=2) + "\n")
        if not as_json:
            settings = ", ".join(f"{key} {value}" for key, value in about.items())
            print(f"{name} of {workdir}: n {len(metric_items)}, seed {seed}, {settings}")
            print(METRICS[name].table(results[name]))
            print(f"pictures: {folder / GRID}\nfigures:  {folder / RESULT}")
    if as_json:
        print(json.dumps(results))
    return 0

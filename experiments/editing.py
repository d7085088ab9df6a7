"""What comes after text to image: inpainting, outpainting, edges to image, and edits by instruction.

P2 (arXiv 2412.12391, 5.1) claims that an image condition is better read as tokens of its own than as more input
channels, and does not compare them at equal compute. Here both are one field apart. On built-in shapes, on a laptop:

    scaling-dit train    --config=editing:inpaint-token --workdir=runs/inpaint
    scaling-dit evaluate --workdir=runs/inpaint

`inpaint`, `outpaint`, `edges` and `edit` each go with `-token` and `-channel`. `edit` has a source of its own, pairs of
scenes with an instruction. `:smoke` is `inpaint-token` in miniature, for tests.

`,uvit-h2048-d42-n16` or another row of `dit_scaling` behind it takes the papers' recipe (recipe.py) at that size: with
stand-in data, or with `,pretrained` behind that with the papers' encoders, on a set that `prepare` made with the same
condition.

Slice: none for the first kind, 2 CPU cores and about ten minutes; v5p:4x4x4 for the papers' sizes.

Expect the masked part right and the given one kept, by the metrics `inpaint`, `edges_f1` and `edits` (docs/editing.md).
"""

from ml_collections import ConfigDict
from scaling_dit.experiments import dit_scaling, shapes

TASKS = ("inpaint", "outpaint", "edges", "edit")
WAYS = ("token", "channel")
# Task -> its condition, and the metric that scores it.
CONDITIONS = {"inpaint": "inpaint", "outpaint": "inpaint", "edges": "edges", "edit": "edit"}
METRICS = {"inpaint": "inpaint", "outpaint": "inpaint", "edges": "edges_f1", "edit": "edits"}
# Masks that are borders alone.
_OUTPAINT = {"boxes": 0.0, "strokes": 0.0, "objects": 0.0, "outpaint": 1.0}


ARGUMENTS = ("smoke", *(f"{task}-{way}" for task in TASKS for way in WAYS))
OPTIONS = (
    *dit_scaling.ARGUMENTS,
    *(f"{row},{option}" for row in dit_scaling.ARGUMENTS for option in dit_scaling.OPTIONS),
)


def get_config(arg: str = "inpaint-token") -> ConfigDict:
    """A task, TASK-token or TASK-channel, on shapes; a row of `dit_scaling` behind a comma for the papers' recipe."""
    if arg == "smoke":
        config = condition(shapes.get_config("smoke"), "inpaint", "token")
        config.eval.update({"every": 4, "prompts": 4})
        return config
    name, _, row = arg.partition(",")
    task, _, way = name.partition("-")
    return condition(dit_scaling.get_config(row) if row else laptop(), task, way)


def laptop() -> ConfigDict:
    """The demo's run, longer."""
    config = shapes.get_config()
    config.steps = 2000
    config.eval.every = config.checkpoint.every = 500
    return config


def condition(config: ConfigDict, task: str, way: str) -> ConfigDict:
    """A run with the condition of a task, read as `way`, and evaluated by its metric."""
    name, metric = CONDITIONS[task], METRICS[task]
    fields = {"concat": way}
    scored = {}
    if task == "outpaint":
        fields, scored = fields | _OUTPAINT, dict(_OUTPAINT)
    config.conditioning = ConfigDict({"names": (name,)})
    config.conditions = ConfigDict({name: fields})
    on_shapes = config.source.name == "shapes"
    if task == "edit" and on_shapes:
        fields = {
            key: value for key, value in config.source.items() if key in ("preset", "shapes", "colours")
        }
        config.source = ConfigDict({"name": "shapes_edits", **fields})
    config.eval.metrics = (metric,) if on_shapes else ()
    config.metrics = ConfigDict({metric: scored} if on_shapes else {})
    return config

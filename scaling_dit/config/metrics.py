"""The metrics that a config may name in `eval.metrics`, and the section `metrics.NAME` with the fields of each.

Here a metric is a name and the place of its class, which is imported when a config names it.
"""

from typing import Any

from ml_collections import ConfigDict

from scaling_dit.components import Registry
from scaling_dit.config.named import NamedSections
from scaling_dit.errors import UserError
from scaling_dit.fields import BATCH, FROM_0, Field


def _check_class(candidate: Any, name: str) -> None:
    if not isinstance(candidate, type):
        raise UserError(f"metric {name} is no class but {type(candidate).__name__}; name a class")


REGISTRY = Registry(
    "metric",
    {
        "tifa": "scaling_dit.evaluation.metrics.tifa:Tifa",
        "soft_tifa": "scaling_dit.evaluation.metrics.soft_tifa:SoftTifa",
        "vqa_score": "scaling_dit.evaluation.metrics.vqa_score:VqaScore",
        "dpg": "scaling_dit.evaluation.metrics.dpg:Dpg",
        "shapes_tifa": "scaling_dit.evaluation.metrics.shapes_tifa:ShapesTifa",
        "digits": "scaling_dit.evaluation.metrics.digits:DigitAccuracy",
        "inpaint": "scaling_dit.evaluation.metrics.inpaint:InpaintMetric",
        "edges_f1": "scaling_dit.evaluation.metrics.edges_f1:EdgesF1",
        "edits": "scaling_dit.evaluation.metrics.edits:Edits",
        "emoji": "scaling_dit.evaluation.metrics.emoji:EmojiAccuracy",
        "clip_score": "scaling_dit.evaluation.metrics.clip_score:ClipScore",
        "hpsv2": "scaling_dit.evaluation.metrics.hpsv2:Hpsv2",
        "pickscore": "scaling_dit.evaluation.metrics.pickscore:Pickscore",
        "image_reward": "scaling_dit.evaluation.metrics.image_reward:ImageReward",
        "aesthetic": "scaling_dit.evaluation.metrics.aesthetic:Aesthetic",
        "fid": "scaling_dit.evaluation.metrics.fid:Fid",
        "kid": "scaling_dit.evaluation.metrics.kid:Kid",
        "mind": "scaling_dit.evaluation.metrics.mind:Mind",
        "cmmd": "scaling_dit.evaluation.metrics.cmmd:Cmmd",
        "fd_dinov2": "scaling_dit.evaluation.metrics.fd_dinov2:FdDinov2",
    },
    check=_check_class,
    kind="class",
)

# Judges that the fields `judge` and `second_judge` of a metric may name, and the field that follows a name's colon.
JUDGES: dict[str, str] = {
    "transformers": "scaling_dit.evaluation.vqa.transformers_models:TransformersJudge",
    "openai": "scaling_dit.evaluation.vqa.endpoint:Endpoint",
    "shapes": "scaling_dit.evaluation.vqa.scenes:Oracle",
}
JUDGE_PLACES: dict[str, str] = {"transformers": "folder", "openai": "url"}

# Fields that every metric's section has.
COMMON: dict[str, Field] = {
    "every": Field(
        0,
        "steps between evaluations in training, a multiple of config.eval.every; 0 = the same",
        FROM_0,
    ),
    "prompts": Field(0, "prompts in training; 0 = config.eval.prompts", FROM_0),
    "batch": Field(64, "images that the metric is given at once", BATCH),
    "prompt_set": Field(
        "", "published prompts in place of the metric's own, such as tifa:FOLDER (evaluation.prompt_sets)"
    ),
    "prompt_transform": Field(
        "none", "what is done to prompts before they are sampled: none | repeat:N | rewrite:FILE.jsonl"
    ),
}


SECTIONS = NamedSections("eval.metrics", "metrics", REGISTRY, COMMON)
metric_fields = SECTIONS.fields
sections = SECTIONS.sections


def check(config: ConfigDict) -> None:
    """Checks the fields that every metric has.

    Raises:
      UserError: names the first field at fault, its value and what would be right.
    """
    SECTIONS.check(config)
    for section, fields in config.metrics.items():
        if config.eval.every and fields.every % config.eval.every:
            right = f"a multiple of config.eval.every, which is {config.eval.every}, or 0 for the same"
            raise UserError(f"config.metrics.{section}.every is {fields.every}; it must be {right}")

"""The options of sampling, each declared once.

From here come the section `sample` of a config, the flags of the verbs that sample, the arguments of
`Pipeline.sample`, and what manifests and folder names say (`sampling/options.py`). This file imports nothing heavy, for
`--help` reads it.
"""

import dataclasses
from typing import Any, Literal

from scaling_dit.fields import BATCH, FROM_0, SHARE, Field, Rule

# Names of the built-in samplers, `diffusion.samplers.SAMPLERS`, which is too heavy for --help.
SAMPLERS = (
    "ddim",
    "dpmpp_2m",
    "euler",
    "heun",
)

# How the names of the samplers begin that `import` writes into a config, see published_samplers.py.
PUBLISHED = "scaling_dit.diffusion.published_samplers:"

# When manifests and folder names note an option.
Noted = Literal["always", "if changed", "never"]


def _option(declared: Field, noted: Noted = "if changed", label: str = "") -> Any:
    """One option.

    Args:
      declared: as a field of `config.sample`.
      noted: "never" for an option that does not change images. A new option that does is noted "if changed" from its
        default, so that folders begun without it can be resumed.
      label: what a folder's name calls it; its own name by default.
    """
    metadata = {"declared": declared, "noted": noted, "label": label}
    return dataclasses.field(default=declared.default, metadata=metadata)


def _is_interval(values: Any) -> bool:
    numbers = len(values) == 2 and all(isinstance(x, int | float) for x in values)
    return numbers and 0 <= values[0] <= values[1] <= 1000


@dataclasses.dataclass(frozen=True)
class SamplingFields:
    """The options of sampling: the fields of `config.sample`, but for two kinds.

    `ema` chooses the weights. The fields of a user's own sampler and guidance are those parts'.
    """

    sampler: str = _option(
        Field(
            "ddim",
            f"sampler: {', '.join(SAMPLERS)}",
            choices=SAMPLERS,
            own=True,
        ),
        "always",
    )
    steps: int = _option(Field(50, "sampler steps", Rule("from 1 to 999", lambda x: 1 <= x <= 999)), "always")
    guidance: float = _option(Field(7.5, "scale of classifier-free guidance; 1 = none", FROM_0), "always")
    guidance_method: str = _option(
        Field(
            "cfg",
            "how predictions with and without the prompt are combined: cfg",
            choices=("cfg",),
            own=True,
        ),
    )
    guidance_rescale: float = _option(
        Field(
            0.0,
            "0 to 1: how far guided predictions are rescaled to the spread of those for the prompt alone",
            SHARE,
        ),
        label="rescale",
    )
    guidance_interval: tuple[float, float] = _option(
        Field(
            (0.0, 1000.0),
            "(low, high) timesteps with guidance; outside, the scale is 1",
            Rule("two timesteps (low, high) from 0 to 1000", _is_interval),
        ),
        label="interval",
    )
    condition_guidance: float = _option(
        Field(
            1.0,
            "scale of guidance on image conditions, beside that on the text; 1 = none, other values cost a third call",
            FROM_0,
        ),
        label="condition",
    )
    strength: float = _option(
        Field(
            1.0,
            "share of the steps that are taken from a given image on (SDEdit); 1 = all, from noise alone",
            Rule("above 0, at most 1", lambda x: 0 < x <= 1),
        ),
    )
    keep: bool = _option(
        Field(False, "keep exactly, to the pixel, what a condition's mask says is given"),
    )
    batch: int = _option(
        Field(64, "images sampled at once, rounded up to what the mesh divides", BATCH), "never"
    )


def declared() -> dict[str, Field]:
    """Each option as a field of the config, by name."""
    return {field.name: field.metadata["declared"] for field in dataclasses.fields(SamplingFields)}

"""Which members of a study saw the same data: losses compare, and laws hold, over those alone.

A validation loss is the same measure for every backbone, prediction and noise schedule (`evaluation/validation.py`),
but not for other held-out images or captions, nor for latents of another codec.
"""

import collections
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.scaling.ladder import Member

_SECTIONS = ("source", "captions", "codec")
# Fields of the built-in scenes that held-out records, which say everything, do not depend on.
_TRAINING_ALONE = {
    f"source.{name}"
    for name in ("scenes", "mention_probability", "caption_level", "wrong_caption_rate", "paraphrases")
}
_BUILT_IN = ("shapes", "shapes_edits")

Fields = dict[str, Any]


def trained_on(config: ConfigDict) -> Fields:
    """The fields of a resolved config that say what data a run is trained on."""
    flat = config_lib.flatten(config)
    return {key: value for key, value in flat.items() if key.partition(".")[0] in _SECTIONS}


def measured_on(config: ConfigDict) -> Fields:
    """The fields that say what a run's validation loss is measured on."""
    fields = trained_on(config)
    left_out = _TRAINING_ALONE if fields["source.name"] in _BUILT_IN else set()
    # What a caption of training is chosen by.
    return {
        key: value for key, value in fields.items() if key not in left_out and not key.startswith("captions.")
    }


def difference(a: Fields, b: Fields) -> str:
    """The fields in which they differ, as in "config.source.preset is 'grid8' and 'grid16'"; "" where they agree."""
    return ", ".join(
        f"config.{key} is {a.get(key)!r} and {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    )


def same_losses(members: Sequence[Member]) -> set[str]:
    """The names of the most members whose losses compare; of two such sets the first."""
    return _largest({member.name: measured_on(member.config) for member in members})


def same_data(members: Sequence[Member]) -> set[str]:
    """The names of the most members that were trained on the same data; of two such sets the first."""
    return _largest({member.name: trained_on(member.config) for member in members})


def identity(fields: Fields) -> str:
    """A text that is the same for equal fields alone, whatever their order and types."""
    return repr(sorted((key, repr(value)) for key, value in fields.items()))


def _largest(fields: dict[str, Fields]) -> set[str]:
    sets: dict[str, set[str]] = collections.defaultdict(set)
    for name, found in fields.items():
        sets[identity(found)].add(name)
    return max(sets.values(), key=len, default=set())

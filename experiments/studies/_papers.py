"""What the studies of arXiv 2404.02883 ("P1") and 2412.12391 ("P2") share.

Their members are rows of `unet_scaling` and `dit_scaling` under one recipe. By default data and encoders are stand-ins
(see recipe.py), on which cost and speed are the papers' and quality is measured on shapes. With the argument
`pretrained` a study takes the papers' encoders and prepared sets, and is scored by its validation loss; name the places
of weights and sets in a copy of the file.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from scaling_dit.scaling import ladder
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member

PRETRAINED = "pretrained"
# P1 trains for 600,000 steps and evaluates every 50,000.
POINTS = 12


def unets(rows: Iterable[str], arg: str = "", **fields: Any) -> tuple[Member, ...]:
    """Rows of P1's table 1; `fields` are dotted keys with __ for the dot."""
    return _rows("unet_scaling", rows, arg, fields)


def transformers(rows: Iterable[str], arg: str = "", **fields: Any) -> tuple[Member, ...]:
    """Rows of P1's table 2 and of P2's ladders."""
    return _rows("dit_scaling", rows, arg, fields)


def changed(member: Member, name: str, changes: Mapping[str, Any], **groups: str) -> Member:
    """The member under another name, with some fields replaced."""
    return ladder.derive(member.config, changes, name, {**member.groups, **groups})


def metrics(arg: str) -> tuple[str, ...]:
    """The exact score on shapes; none where images are real, until a study names one."""
    return () if arg == PRETRAINED else ("shapes_tifa",)


def better(arg: str, name: str, a: str, b: str, margin: float = 0.0) -> Claim:
    """The claim that `a` is better than `b`: its score is more than `margin` above, or its loss below.

    A negative margin claims that `a` is worse by less than that, so as good. With a loss in place of the score the
    margin is left out, for the two have different units.
    """
    if arg == PRETRAINED:
        return Claim(name, b, a, metric="loss")
    return Claim(name, a, b, margin)


def _rows(experiment: str, rows: Iterable[str], arg: str, fields: Mapping[str, Any]) -> tuple[Member, ...]:
    option = f",{PRETRAINED}" if arg == PRETRAINED else ""
    made = []
    for row in rows:
        (member,) = ladder.experiments(experiment, (row + option,))
        # The study scores the images at its points.
        changes = {"eval.metrics": ()} | {key.replace("__", "."): value for key, value in fields.items()}
        made.append(ladder.derive(member.config, changes, row, member.groups))
    return tuple(made)

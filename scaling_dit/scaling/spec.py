"""What a study is before it runs: a question, members, seeds, metrics, and claims that are registered beforehand.

A study file is Python with `get_study(arg="") -> StudySpec`; `experiments/studies/` has those of this project.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.components import describe
from scaling_dit.config import experiment_files
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.registry import may_have
from scaling_dit.scaling import parity
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member

LOSS = "loss"
# Sections that may change at a resume, and that results depend on all the same.
_COUNTED = ("sample.", "eval.loss_")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_LOSS_COLUMN = re.compile(r"loss(_t\d+-\d+)?")

# Fields of a study that are tuples, what each holds, and such a tuple in words.
_SEQUENCES: tuple[tuple[str, Any, str], ...] = (
    ("members", Member, "members, as those of scaling_dit.scaling.ladder"),
    ("seeds", int, "whole numbers, such as (0, 1, 2)"),
    ("metrics", str, 'names, such as ("shapes_tifa",)'),
    ("claims", Claim, "claims, as scaling_dit.scaling.claims.Claim"),
    ("generation_seeds", int, "whole numbers, such as (0,)"),
    ("guidances", int | float, "numbers, such as (3.0,)"),
)
_OF_MEMBERS: tuple[tuple[str, Any, str], ...] = (
    ("name", str, "a text"),
    ("config", ConfigDict, "a config, as scaling_dit.config.load returns it"),
    ("changes", Mapping, "a dict"),
    ("groups", Mapping, "a dict of labels by axis"),
    ("base", str, 'the name of a member, or ""'),
)


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A study as its file states it.

    Attributes:
      question: one sentence that the report answers.
      members: what is compared; each is trained with every seed.
      seeds: of training. Two members run with the same seed see the same data in the same order.
      metrics: names of metrics that score generated images; the first is the study's own. A metric is about the first
        scalar of its results.
      claims: registered before the runs. Their metric is one of the table's columns, such as "shapes_tifa_spatial" or
        "loss", or the name of a metric, which stands for its first scalar; "" is the first metric.
      items: prompts that each metric scores.
      points: checkpoints of a run that are evaluated, evenly spread, the last included. With a constant learning rate
        each is an endpoint of a smaller budget.
      generation_seeds: seeds of the generated images; each scores all prompts at every point.
      guidances: other guidance scales that the last checkpoint is scored with; the config's own is always scored.

    Raises:
      UserError: a mistake in any of these.
    """

    question: str
    members: tuple[Member, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[str, ...] = ("shapes_tifa",)
    claims: tuple[Claim, ...] = ()
    items: int = 200
    points: int = 4
    generation_seeds: tuple[int, ...] = (0,)
    guidances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        if not self.question.strip():
            raise UserError("a study needs a question, in one sentence that its report can answer")
        if not self.members:
            raise UserError("a study needs members; see scaling_dit.scaling.ladder")
        names = [member.name for member in self.members]
        for name in names:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"member {name!r}: a name has letters, digits and . _ + - only, for it names a folder"
                )
        _unique("member", names)
        for number, member in enumerate(self.members):
            if member.base and member.base not in names[:number]:
                raise UserError(
                    f"member {member.name!r} begins from {member.base!r}, which is no member before it; put that first"
                )
        for what, values in (("seeds", self.seeds), ("generation_seeds", self.generation_seeds)):
            if not values or any(not 0 <= value < 2**32 for value in values):
                raise UserError(f"{what} is {values!r}; give at least one whole number from 0 to 2**32 - 1")
            _unique(what, values)
        for what, number in (("items", self.items), ("points", self.points)):
            if number < 1:
                raise UserError(f"{what} is {number}; it must be at least 1")
        if not self.metrics and any(not claim.metric for claim in self.claims):
            raise UserError('a study without metrics has only losses: give its claims metric="loss"')
        if any(not math.isfinite(scale) or scale < 1 for scale in self.guidances):
            raise UserError(f"guidances is {self.guidances!r}; guidance scales are 1 or more")
        measures = {(m.config.eval.loss_images, m.config.eval.loss_bins) for m in self.members}
        if len(measures) > 1:
            raise UserError(
                "members differ in config.eval.loss_images or loss_bins, so their losses do not compare; "
                "give all of them the same"
            )
        _unique("metrics", self.metrics)
        _unique("guidances", self.guidances)
        self._check_claims(names)

    def _check_types(self) -> None:
        """Makes tuples of lists, and sure that every field is of its type; raises UserError."""
        for name, kind, right in _SEQUENCES:
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise UserError(f"{name} is {_shown(given)}; give a tuple of {right}")
            for one in given:
                if not _is_a(one, kind):
                    raise UserError(f"{name} holds {_shown(one)}; give a tuple of {right}")
            object.__setattr__(self, name, tuple(given))
        for name, kind, right in (
            ("question", str, "a text"),
            ("items", int, "a whole number"),
            ("points", int, "a whole number"),
        ):
            if not _is_a(getattr(self, name), kind):
                raise UserError(f"{name} is {_shown(getattr(self, name))}; give {right}")
        for member in self.members:
            for name, kind, right in _OF_MEMBERS:
                if not isinstance(getattr(member, name), kind):
                    raise UserError(
                        f"member {member.name!r}: its {name} is {_shown(getattr(member, name))}; give {right}"
                    )

    def _check_claims(self, names: list[str]) -> None:
        _unique("claim", [claim.name for claim in self.claims])
        for claim in self.claims:
            for side in (claim.a, claim.b):
                if side not in names:
                    raise UserError(f"claim {claim.name!r} names member {side!r}; {nearest(side, names)}")
            if claim.a == claim.b:
                raise UserError(f"claim {claim.name!r} compares {claim.a} with itself")
            metric = self.metric_of(claim)
            if not (is_loss(metric) or any(may_have(name, metric) for name in self.metrics)):
                known = ", ".join((LOSS, *self.metrics))
                raise UserError(f"claim {claim.name!r}: no metric {metric!r}; the study measures {known}")
            self._check_loss(claim, metric)
        if self.claims and len(self.seeds) < 2:
            raise UserError(f"claims need at least 2 training seeds; the study has {len(self.seeds)}")

    def _check_loss(self, claim: Claim, metric: str) -> None:
        """Losses on other data, or of another codec's latents, do not compare."""
        if not is_loss(metric):
            return
        sides = [parity.measured_on(self.member(name).config) for name in (claim.a, claim.b)]
        if found := parity.difference(*sides):
            raise UserError(
                f"claim {claim.name!r} compares the losses of {claim.a} and {claim.b}, which are measured on "
                f"other data: {found}; give it a metric of images"
            )

    def metric_of(self, claim: Claim) -> str:
        """What a claim is about, as it says: a column of the table, or a metric, which stands for its first scalar."""
        return claim.metric or self.metrics[0]

    def member(self, name: str) -> Member:
        """A member by name; raises UserError for an unknown one."""
        found = {member.name: member for member in self.members}
        if name not in found:
            raise UserError(f"no member {name!r}; {nearest(name, found)}")
        return found[name]

    def run_config(self, member: Member, seed: int, compile_cache: str = "") -> ConfigDict:
        """The resolved config of one run: the member's with its seed, and evaluated at the study's points."""
        config = member.config.copy_and_resolve_references()
        config.unlock()
        every = point_every(config.steps, self.points)
        config.seed = seed
        config.eval.every = every
        config.checkpoint.update({"every": every, "keep_last": 1, "keep_every": every})
        # The study has one log folder for all runs.
        config.log.tensorboard = False
        if compile_cache:
            config.compile_cache = compile_cache
        return config_lib.resolve(config)


STUDY = experiment_files.Kind(
    "study",
    "get_study",
    StudySpec,
    f"{experiment_files.INSTALLED}.studies",
    "experiments/studies",
    "shapes_core",
)


def is_loss(column: str) -> bool:
    """Whether a column of the table is the validation loss, or that of some timesteps."""
    return _LOSS_COLUMN.fullmatch(column) is not None


def point_every(steps: int, points: int) -> int:
    """Steps between the points of a run; its last step is one, too."""
    return -(-steps // points)


def point_steps(steps: int, points: int) -> list[int]:
    """The steps of a run that are evaluated, ascending."""
    every = point_every(steps, points)
    return sorted({*range(every, steps + 1, every), steps})


def config_hash(config: ConfigDict) -> str:
    """Twelve hexadecimal digits of what a member computes.

    Its seed does not count, nor do fields that may change at a resume, but for those of sampling and of the validation
    loss.
    """
    fields = {
        key: value
        for key, value in config_lib.flatten(config).items()
        if key != "seed" and (key.startswith(_COUNTED) or not config_lib.is_free(key))
    }
    text = "".join(f"{key} = {value!r}\n" for key, value in sorted(fields.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def member_hash(member: Member) -> str:
    """As `config_hash`, of a member: where its runs begin counts as well."""
    digest = config_hash(member.config)
    return hashlib.sha256(f"{member.base} {digest}".encode()).hexdigest()[:12] if member.base else digest


def load(place: str) -> StudySpec:
    """The study of a file.

    Args:
      place: `path/to/file.py`, the name of an installed study such as `shapes_core`, or either with `:argument`.

    Raises:
      UserError: no such file, no `get_study` in it, an unknown argument, or whatever the study refuses.
    """
    spec: StudySpec = experiment_files.read(place, STUDY)
    return spec


def to_json(spec: StudySpec) -> dict[str, Any]:
    """What `study.json` holds of a spec: all of it, configs included."""
    return {
        "question": spec.question,
        "seeds": list(spec.seeds),
        "metrics": list(spec.metrics),
        "items": spec.items,
        "points": spec.points,
        "generation_seeds": list(spec.generation_seeds),
        "guidances": list(spec.guidances),
        "claims": [dataclasses.asdict(claim) for claim in spec.claims],
        "members": [
            {
                "name": member.name,
                "hash": member_hash(member),
                "base": member.base,
                "groups": dict(member.groups),
                "changes": {key: repr(value) for key, value in member.changes.items()},
                "config": member.config.to_dict(),
            }
            for member in spec.members
        ],
    }


def from_json(saved: Mapping[str, Any], where: str = "study.json") -> StudySpec:
    """The spec that `to_json` wrote.

    Args:
      where: the file that it was read from, for error lines.

    Raises:
      UserError: a damaged file, or configs of another version that this one cannot read.
    """
    try:
        for one in saved["members"]:
            config_lib.check_trusted(one["config"], f"study.json ({one['name']})")
        # Whatever `tuple` makes a name of below.
        metrics = {f"metrics[{number}]": str(name) for number, name in enumerate(saved["metrics"])}
        config_lib.check_names(metrics, "study.json")
        members = tuple(
            Member(
                one["name"],
                config_lib.resolve(config_lib.from_json(config_lib.to_json(ConfigDict(one["config"])))),
                one["changes"],
                one["groups"],
                one.get("base", ""),
            )
            for one in saved["members"]
        )
        claims = tuple(Claim(**claim) for claim in saved["claims"])
        return StudySpec(
            question=saved["question"],
            members=members,
            seeds=saved["seeds"],
            metrics=saved["metrics"],
            claims=claims,
            items=saved["items"],
            points=saved["points"],
            generation_seeds=saved["generation_seeds"],
            guidances=saved["guidances"],
        )
    except UserError as error:
        if type(error) is not UserError or str(error).startswith("study.json"):
            raise
        raise UserError(f"{where}: {error}") from error
    # Whatever a file may hold in place of what was written.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} is damaged or of another version: {type(error).__name__}: {error}"
        ) from None


def _shown(value: Any) -> str:
    """A value in an error line: as it is written, if it is short."""
    return repr(value) if value is None or isinstance(value, str | int | float) else describe(value)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _unique(what: str, values: Any) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{what} {value!r} is there twice; each must be one of a kind")
        seen.add(value)

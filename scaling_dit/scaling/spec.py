"""What a study is before it runs: a question, members, seeds, metrics, and claims that are registered beforehand.

A study file is Python with `get_study(arg="") -> StudySpec`; `experiments/studies/` has those of this project.
"""

import dataclasses
import hashlib
import importlib
import inspect
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.config import experiment_files
from scaling_dit.errors import UserError, nearest
from scaling_dit.scaling import parity
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.ladder import Member

INSTALLED = f"{experiment_files.INSTALLED}.studies"
LOSS = "loss"
# Sections that may change at a resume, and that results depend on all the same.
_COUNTED = ("sample.", "eval.loss_")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A study as its file states it.

    Attributes:
      question: one sentence that the report answers.
      members: what is compared; each is trained with every seed.
      seeds: of training. Two members run with the same seed see the same data in the same order.
      metrics: names of metrics that score generated images; the first is the study's own.
      claims: registered before the runs. Their metric is one of the table's columns, such as "shapes_tifa",
        "shapes_tifa_spatial" or "loss"; "" is the first metric.
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
            if not values or any(not isinstance(v, int) or not 0 <= v < 2**32 for v in values):
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

    def _check_claims(self, names: list[str]) -> None:
        _unique("claim", [claim.name for claim in self.claims])
        for claim in self.claims:
            for side in (claim.a, claim.b):
                if side not in names:
                    raise UserError(f"claim {claim.name!r} names member {side!r}; {nearest(side, names)}")
            if claim.a == claim.b:
                raise UserError(f"claim {claim.name!r} compares {claim.a} with itself")
            metric = self.metric_of(claim)
            if metric.split("_t")[0] != LOSS and not any(
                metric == name or metric.startswith(f"{name}_") for name in self.metrics
            ):
                known = ", ".join((LOSS, *self.metrics))
                raise UserError(f"claim {claim.name!r}: no metric {metric!r}; the study measures {known}")
            self._check_loss(claim, metric)
        if self.claims and len(self.seeds) < 2:
            raise UserError(f"claims need at least 2 training seeds; the study has {len(self.seeds)}")

    def _check_loss(self, claim: Claim, metric: str) -> None:
        """Losses on other data, or of another codec's latents, do not compare."""
        if not metric.startswith(LOSS):
            return
        sides = [parity.measured_on(self.member(name).config) for name in (claim.a, claim.b)]
        if found := parity.difference(*sides):
            raise UserError(
                f"claim {claim.name!r} compares the losses of {claim.a} and {claim.b}, which are measured on "
                f"other data: {found}; give it a metric of images"
            )

    def metric_of(self, claim: Claim) -> str:
        """The column of the table that a claim is about."""
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
    path, _, argument = place.partition(":")
    module = _load_module(path)
    where = getattr(module, "__file__", None) or path
    get_study = getattr(module, "get_study", None)
    if not callable(get_study):
        raise UserError(f"{where} has no get_study(arg='') function; a study file must define one")
    if argument:
        if not inspect.signature(get_study).parameters:
            raise UserError(f"get_study of {where} takes no argument; leave out ':{argument}'")
        known = tuple(getattr(module, "ARGUMENTS", ()))
        if known and argument not in known:
            raise UserError(f"{where} has no argument {argument!r}; {nearest(argument, known)}")
    with experiment_files.faults_of(str(where)):
        spec = get_study(argument) if argument else get_study()
    if not isinstance(spec, StudySpec):
        raise UserError(f"get_study of {where} returned {type(spec).__name__}; it must return a StudySpec")
    return spec


def _load_module(place: str) -> Any:
    if place.endswith(".py") or "/" in place:
        return experiment_files.load_file(pathlib.Path(place))
    try:
        return importlib.import_module(f"{INSTALLED}.{place}")
    except ModuleNotFoundError as error:
        if error.name not in (experiment_files.INSTALLED, INSTALLED, f"{INSTALLED}.{place}"):
            raise
    known = installed()
    raise UserError(f"--config: no study {place!r}; {nearest(place, known)} (or give path/to/file.py)")


def installed() -> list[str]:
    """The studies that can be given by name."""
    try:
        folders = importlib.import_module(INSTALLED).__path__
    except ModuleNotFoundError:
        return []
    return sorted(path.stem for folder in folders for path in pathlib.Path(folder).glob("[!_]*.py"))


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


def from_json(saved: Mapping[str, Any]) -> StudySpec:
    """The spec that `to_json` wrote.

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
            seeds=tuple(saved["seeds"]),
            metrics=tuple(saved["metrics"]),
            claims=claims,
            items=saved["items"],
            points=saved["points"],
            generation_seeds=tuple(saved["generation_seeds"]),
            guidances=tuple(saved["guidances"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"study.json is damaged or of another version: {error}") from None


def _unique(what: str, values: Any) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{what} {value!r} is there twice; each must be one of a kind")
        seen.add(value)

"""Ladders: members of a study, each derived from one base by replacing a few fields of its config.

A member is a name and a whole config. Its name says what it is: `uvit-0.6B-3e20` is U-ViT with 0.6e9 parameters,
trained with 3e20 FLOPs. Functions here make members along one axis (width, depth, family, data, captions, compute), and
sets that agree in parameters, in training compute or in the cost of an image. All costs are counted from the traced
backbone (`costs.count`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import backbones
from scaling_dit import config as config_lib
from scaling_dit.costs import count_table
from scaling_dit.costs.count import count
from scaling_dit.errors import UserError, nearest

# Model calls of a sampler for an image, from its steps; the others make one a step.
_CALLS: dict[str, Callable[[int], int]] = {"heun": lambda steps: 2 * steps - 1}
# A matched set may differ by this share.
TOLERANCE = 0.1
# Shapes of a latent, and of the tokens of a caption, and the image conditions that a backbone reads.
Inputs = tuple[tuple[int, int, int], tuple[int, int], tuple[Any, ...]]
# Fewer steps than this round a budget by more than 1 %, and train nothing.
_FEWEST_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Member:
    """One row of a study: a config that several seeds are trained with.

    Attributes:
      name: names its folder and the rows of the table.
      config: the whole config; `seed` is set for each run.
      changes: dotted key -> value of what was replaced in the base.
      groups: axis -> label, such as {"family": "uvit"}, for charts and tables.
      base: name of an earlier member: each run begins with the weights that the run of that member and of the same seed
        ended with (`train --from`). Costs do not count the base's. "" begins from nothing.
    """

    name: str
    config: ConfigDict
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a member costs.

    Attributes:
      params: of the backbone. macs_paper, macs_total: of one call on one image, see `costs.count`.
      batch, steps: of the run.
      inference_flops: of sampling one image with `config.sample`; None for a sampler of the user's own.
    """

    params: int
    macs_paper: int
    macs_total: int
    batch: int
    steps: int
    inference_flops: int | None

    @property
    def samples(self) -> int:
        """Images seen in training, repeats included."""
        return self.batch * self.steps

    def train_flops(self, steps: int | None = None, *, paper: bool = False) -> int:
        """FLOPs of this many steps, all by default: 6 x MACs x images; `paper` leaves out products inside attention."""
        macs = self.macs_paper if paper else self.macs_total
        return 6 * macs * self.batch * (self.steps if steps is None else steps)


def derive(
    base: ConfigDict,
    changes: Mapping[str, Any],
    name: str = "",
    groups: Mapping[str, str] | None = None,
) -> Member:
    """The member that a base becomes with some fields replaced; its config is resolved.

    Args:
      base: any config; it is not changed.
      changes: dotted key -> value. A section's name, such as "backbone", with a dict that holds `name` replaces the
        whole section; fields that the dict leaves out have their defaults.
      name: of the member; `auto_name` by default, which counts the backbone.
      groups: labels for charts; {"family": name of the backbone} is added.

    Raises:
      UserError: a field that does not exist, or a value that `config.resolve` refuses.
    """
    config = base.copy_and_resolve_references()
    config.unlock()
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        if isinstance(value, Mapping):
            config[key] = ConfigDict(dict(value))
            continue
        try:
            (config[section] if section else config)[field] = value
        except (KeyError, AttributeError) as error:
            raise UserError(
                f"config.{key}: {config_lib.why_unknown(key, config_lib.flatten(base))}"
            ) from error
        except TypeError:
            held = config_lib.flatten(base).get(key)
            raise UserError(
                f"config.{key} is {value!r}, but the base's {held!r} is of another type"
            ) from None
    resolved = config_lib.resolve(config)
    labels = {"family": str(resolved.backbone.name)} | dict(groups or {})
    return Member(name or auto_name(resolved), resolved, dict(changes), labels)


def experiments(
    name: str, arguments: Iterable[str], groups: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[Member, ...]:
    """Rows of an experiment file as members: `experiments("unet_scaling", ("sdxl", "sdxl-td4_4"))`.

    Args:
      name: of the experiment, as `--config` takes it.
      arguments: its rows, which name the members.
      groups: labels of each row, by axis: {"width": {"sdxl-c128": "128"}}.

    Raises:
      UserError: no such experiment or row.
    """
    members = []
    for argument in arguments:
        config = config_lib.load(f"{name}:{argument}" if argument else name)
        labels = {axis: of[argument] for axis, of in (groups or {}).items() if argument in of}
        family = {"family": str(config.backbone.name)}
        title = argument.replace(",", "-") or name
        members.append(Member(title, config, {"experiment": f"{name}:{argument}"}, family | labels))
    return tuple(members)


def widths(base: Member, values: Sequence[int]) -> tuple[Member, ...]:
    """Members that differ in width alone: a UNet's channels, or a transformer's hidden size at one head size."""
    return tuple(_named(base, width_changes(base.config, value), "w", value) for value in values)


def depths(base: Member, values: Sequence[int | tuple[int, ...]]) -> tuple[Member, ...]:
    """Members that differ in depth alone: blocks of a transformer, or a UNet's transformer blocks at each level."""
    members = []
    for value in values:
        field = "depth" if "depth" in base.config.backbone else "transformer_depth"
        if field not in base.config.backbone:
            field = "res_blocks"
        label = "_".join(map(str, value)) if isinstance(value, tuple) else value
        members.append(_named(base, {f"backbone.{field}": value}, "d", label))
    return tuple(members)


def families(
    base: ConfigDict, rows: Mapping[str, Mapping[str, Any]], groups: Mapping[str, str] | None = None
) -> tuple[Member, ...]:
    """Members that differ in the backbone alone: name of the member -> its section, `name` included."""
    return tuple(derive(base, {"backbone": row}, name, groups) for name, row in rows.items())


def data_sizes(base: Member, scenes: Sequence[int]) -> tuple[Member, ...]:
    """Members that differ in how many distinct training records there are; 0 is unlimited."""
    return tuple(_named(base, {"source.scenes": value}, "n", value or "all") for value in scenes)


def captions(base: Member, policies: Mapping[str, Mapping[str, Any]]) -> tuple[Member, ...]:
    """Members that differ in their training captions: label -> fields of `source` or `captions`, dotted."""
    return tuple(
        derive(base.config, fields, f"{base.name}-{label}", {**base.groups, "captions": label})
        for label, fields in policies.items()
    )


def at_compute(member: Member, flops: float, name: str = "") -> Member:
    """The member trained with so many FLOPs: its steps are replaced.

    Raises:
      UserError: fewer than 50 steps, which would round the budget by more than 1 %.
    """
    each = cost(member.config).train_flops(1)
    steps = round(flops / each)
    if steps < _FEWEST_STEPS:
        raise UserError(
            f"member {member.name}: {flops:.3g} FLOPs are {flops / each:.1f} steps of {each:.3g}; "
            f"raise the budget to at least {_FEWEST_STEPS * each:.3g}, or lower config.batch"
        )
    made = derive(
        member.config, {"steps": steps}, name or "-", {**member.groups, "budget": flops_label(flops)}
    )
    return dataclasses.replace(
        made, name=name or auto_name(made.config), changes={**member.changes, "steps": steps}
    )


def isoflop(sizes: Sequence[Member], budgets: Sequence[float]) -> tuple[Member, ...]:
    """The grid of an IsoFLOP study: every size at every budget, by its steps."""
    return tuple(at_compute(member, budget) for budget in budgets for member in sizes)


def matched(
    members: Sequence[Member], by: str, target: float | None = None, tolerance: float = TOLERANCE
) -> tuple[Member, ...]:
    """The members made equal in one cost, and otherwise as they are.

    Args:
      members: of any families.
      by: "compute" replaces steps; "params" and "inference" replace the width, which both grow with.
      target: training FLOPs, parameters, or FLOPs of one image; those of the first member by default.
      tolerance: the largest share by which a member may miss the target.

    Raises:
      UserError: another word, or a member that no width brings near enough.
    """
    measures: dict[str, Callable[[Cost], float | None]] = {
        "compute": lambda one: one.train_flops(),
        "params": lambda one: one.params,
        "inference": lambda one: one.inference_flops,
    }
    if by not in measures:
        raise UserError(f"matched: by is {by!r}; {nearest(by, measures)}")
    if target is None:
        target = measures[by](cost(members[0].config))
    if target is None:
        raise UserError(f"matched: the cost of an image is unknown for the sampler of {members[0].name}")
    if by == "compute":
        return tuple(at_compute(member, target, member.name) for member in members)
    return tuple(_of_width(member, measures[by], float(target), tolerance) for member in members)


def spread(members: Sequence[Member], by: str) -> float:
    """Largest over smallest of a set: "params", "compute" or "inference"."""
    found = []
    for member in members:
        one = cost(member.config)
        values = {"params": one.params, "compute": one.train_flops(), "inference": one.inference_flops}
        if by not in values:
            raise UserError(f"spread: by is {by!r}; {nearest(by, values)}")
        value = values[by]
        if value is None:
            raise UserError(f"spread: the cost of an image is unknown for the sampler of {member.name}")
        found.append(value)
    return max(found) / min(found)


def cost(config: ConfigDict) -> Cost:
    """The cost of a resolved config; each config is counted once a process."""
    text = config_lib.dump(config)
    if text not in _COSTS:
        _COSTS[text] = _cost(config)
    return _COSTS[text]


def latent_side(config: ConfigDict) -> int:
    """The height of a resolved config's latents: what its resolution is to its backbone."""
    return _inputs(config)[0][0]


# Text of a config -> its cost.
_COSTS: dict[str, Cost] = {}
# Text of some sections of a config -> its inputs.
_INPUTS: dict[str, Inputs] = {}


def _inputs(config: ConfigDict) -> Inputs:
    # The sections that the shapes of a backbone's inputs follow from.
    sections = ("source", "codec", "text_encoder", "conditioning", "conditions")
    key = "\n".join(config_lib.dump(config[name]) for name in sections)
    if key not in _INPUTS:
        # Opens the source where its config does not say how large images are.
        first = count_table.of_experiment(config)
        _INPUTS[key] = first.latents, first.text, tuple(getattr(first.module, "conditions", ()))
    return _INPUTS[key]


def _cost(config: ConfigDict) -> Cost:
    fields = tuple(sorted(config_lib.flatten(config.backbone).items()))
    latents, text, conditions = _inputs(config)
    params, paper, total = _counted(fields, latents, text, conditions)
    sample = config.sample
    calls: int | None = _CALLS.get(sample.sampler, lambda steps: steps)(sample.steps)
    flops = None
    if ":" not in sample.sampler and calls is not None:
        # Of text and conditions each its own: three calls.
        apart = bool(conditions) and sample.condition_guidance != 1
        flops = 2 * total * calls * (3 if apart else 1 if sample.guidance == 1 else 2)
    return Cost(params, paper, total, config.batch, config.steps, flops)


@functools.lru_cache(maxsize=1024)
def _counted(
    fields: tuple[tuple[str, Any], ...],
    latents: tuple[int, int, int],
    text: tuple[int, int],
    conditions: tuple[Any, ...],
) -> tuple[int, int, int]:
    section = dict(fields)
    module = backbones.create_for(in_channels=latents[2], text_dim=text[1], conditions=conditions, **section)
    found = count(module, latents, text)
    return found.params, found.macs_paper, found.macs_total


def auto_name(config: ConfigDict) -> str:
    """`uvit-0.6B-3e20`: family, parameters and training FLOPs."""
    one = cost(config)
    return f"{config.backbone.name}-{size_label(one.params)}-{flops_label(one.train_flops())}"


def size_label(params: float) -> str:
    """A number of parameters in short: 0.6B, 2.3B, 25M, 1.1M, 48K."""
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if params >= 10 ** (power - (1 if unit == "B" else 0)):
            text = f"{params / 10**power:.1f}"
            return text.removesuffix(".0") + unit
    return str(int(params))


def flops_label(flops: float) -> str:
    """A number of FLOPs in short: 3e20."""
    digits, power = f"{flops:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def width_changes(config: ConfigDict, width: int) -> dict[str, Any]:
    """What to replace for another width: `channels`, or `hidden` with `heads` such that heads keep their size.

    Raises:
      UserError: a width that heads of that size do not divide, or a backbone with neither field.
    """
    if "channels" in config.backbone:
        return {"backbone.channels": width}
    if "hidden" not in config.backbone:
        raise UserError(f"backbone {config.backbone.name!r} has neither hidden nor channels to widen")
    module: Any = _module(config)
    hidden, _, heads = module.widths
    size = hidden // heads
    if width % size:
        raise UserError(f"width {width} is no multiple of the head size {size} of {config.backbone.name}")
    return {"backbone.hidden": width, "backbone.heads": width // size}


def _module(config: ConfigDict) -> Any:
    return backbones.create(**config_lib.flatten(config.backbone))


def _named(base: Member, changes: Mapping[str, Any], letter: str, value: Any) -> Member:
    axis = {"w": "width", "d": "depth", "n": "scenes"}[letter]
    groups = {**base.groups, axis: str(value)}
    made = derive(base.config, changes, f"{base.name}-{letter}{value}", groups)
    return dataclasses.replace(made, changes={**base.changes, **changes})


def _of_width(
    member: Member, measure: Callable[[Cost], float | None], target: float, tolerance: float
) -> Member:
    """The member at the width whose cost is nearest to the target; costs grow with width, so it is bisected."""
    step, now = _width_step(member.config)

    def value(multiple: int) -> float:
        changed = derive(member.config, _width(member.config, step * multiple), "-")
        found = measure(cost(changed.config))
        if found is None:
            raise UserError(f"matched: the cost of an image is unknown for the sampler of {member.name}")
        return found

    low, high = 1, max(2, now // step)
    while value(high) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) < target else (low, middle)
    best = min((low, high), key=lambda multiple: abs(math.log(value(multiple) / target)))
    off = value(best) / target - 1
    if abs(off) > tolerance:
        raise UserError(
            f"member {member.name}: no width comes within {tolerance:.0%} of {target:.4g}; the nearest, "
            f"{step * best}, is off by {off:+.0%}; change its depth, or raise the tolerance"
        )
    changes = _width(member.config, step * best)
    made = derive(member.config, changes, member.name, member.groups)
    return dataclasses.replace(made, changes={**member.changes, **changes})


def _width_step(config: ConfigDict) -> tuple[int, int]:
    """(step between widths that the backbone can have, its width now)."""
    module = _module(config)
    if "channels" in config.backbone:
        shape = module.shape
        # Group norms have 32 groups.
        return math.lcm(32, shape.head_dim), int(shape.widths[0])
    hidden, _, heads = module.widths
    # Rotary positions in two dimensions need head sizes of a multiple of 4.
    return 4 * heads, hidden


def _width(config: ConfigDict, width: int) -> dict[str, Any]:
    """Any width with the heads that there are, for a match in cost; their size changes."""
    return {"backbone.channels" if "channels" in config.backbone else "backbone.hidden": width}

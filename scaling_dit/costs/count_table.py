"""The verb `count`: prints the cost of a backbone, or of an experiment's backbone."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from scaling_dit.model.build import build_model, countable_tokenizer

# Loading flax takes longer than reporting a mistake in the command.
if TYPE_CHECKING:
    from flax import linen as nn

    from scaling_dit.costs.count import Cost, Count
    from scaling_dit.model.adapters import Adapters

# 256-pixel images through an 8x autoencoder, and CLIP-H text.
LATENTS, TEXT = (32, 32, 4), (77, 1024)


class Counted(NamedTuple):
    """A backbone to count, and the shapes of its inputs.

    Attributes:
      name: name of the backbone.
      module: the backbone.
      latents: height, width and channels of a latent.
      text: tokens and their width.
      training: "batch" and "steps" of an experiment, for its training FLOPs; empty for a single backbone.
      adapters: those that the experiment trains in place of the backbone's parameters.
    """

    name: str
    module: "nn.Module"
    latents: tuple[int, int, int]
    text: tuple[int, int]
    training: dict[str, int]
    adapters: "Adapters | None" = None


def of_experiment(
    config: ConfigDict, latents: Sequence[int] | None = None, text: Sequence[int] | None = None
) -> Counted:
    """The backbone of a resolved config, with the given shapes, else the shapes of its data and text encoder."""
    model = build_model(config, countable_tokenizer(config))
    shapes = latents or model.latent_shape, text or (model.text_encoder.length, model.text_encoder.dim)
    rows = tuple(one.row(shapes[0][2]) for one in model.conditions)
    counted = _counted(config.backbone, *shapes, {"batch": config.batch, "steps": config.steps}, rows)
    if not config.adapter.rank:
        return counted
    from scaling_dit.costs.step import adapters_of

    return counted._replace(adapters=adapters_of(config, model))


def of_backbone(
    section: ConfigDict, latents: Sequence[int] | None = None, text: Sequence[int] | None = None
) -> Counted:
    """A single backbone from the section `backbone` of a resolved config, by default with `LATENTS` and `TEXT`."""
    return _counted(section, latents or LATENTS, text or TEXT, {})


def main(counted: Counted, *, depth: int = 1, as_json: bool = False) -> int:
    """Prints the count as a table or as one JSON object; returns the exit code.

    Args:
      counted: the backbone and its shapes.
      depth: levels of modules to list separately.
    """
    from scaling_dit.costs.count import count

    result = count(counted.module, counted.latents, counted.text)
    about = {"backbone": counted.name, "latents": counted.latents, "text": counted.text}
    rows = _numbers(result, counted.training, counted.adapters)
    modules = result.by_module(depth)
    if as_json:
        costs = {name: dataclasses.asdict(cost) for name, cost in modules.items()}
        print(json.dumps(about | counted.training | rows | {"modules": costs}))
    else:
        print(_table(about | counted.training, rows, modules))
    return 0


def _counted(
    section: ConfigDict,
    latents: Sequence[int],
    text: Sequence[int],
    training: dict[str, int],
    conditions: tuple[Any, ...] = (),
) -> Counted:
    from scaling_dit import backbones

    height, width, channels = latents
    length, dim = text
    module = backbones.create_for(
        in_channels=channels, text_dim=dim, conditions=conditions, **section.to_dict()
    )
    return Counted(section.name, module, (height, width, channels), (length, dim), training)


def _numbers(result: "Count", training: dict[str, int], adapters: "Adapters | None") -> dict[str, int]:
    names = ("params", "macs_paper", "macs_attention", "macs_total", "activation_bytes")
    numbers = {name: getattr(result, name) for name in names}
    if adapters is not None:
        numbers["params_adapters"] = adapters.size
    if training:
        from scaling_dit.costs.step import frozen_macs

        saved = 2 * frozen_macs(result, adapters) * training["batch"] * training["steps"]
        for convention in ("paper", "total"):
            flops = result.train_flops(**training, convention=convention)
            numbers[f"train_flops_{convention}"] = flops - saved
    return numbers


_MEANING = {
    "params": "parameters",
    "macs_paper": "multiply-accumulates per image, convolutions and linear layers",
    "macs_attention": "the part of macs_paper inside attention and transformer modules",
    "macs_total": "multiply-accumulates per image, with the products inside attention",
    "activation_bytes": "bytes per image kept for the backward pass, about",
    "params_adapters": "parameters of the adapters, which alone are trained",
    "train_flops_paper": "training FLOPs, without the products inside attention",
    "train_flops_total": "training FLOPs",
}


def _table(about: dict[str, Any], numbers: dict[str, int], modules: dict[str, "Cost"]) -> str:
    """The inputs, the backbone's numbers, and the cost of each module."""
    lines = [", ".join(f"{name} {_plain(value)}" for name, value in about.items()), ""]
    lines += [
        f"{name:17}  {value:>29,}  {_short(value):>7}  {_MEANING[name]}" for name, value in numbers.items()
    ]
    width = max(map(len, [*modules, "module"]))
    columns = {
        "params": "params",
        "macs_paper": "MACs paper",
        "macs_attention": "in attention",
        "macs_total": "MACs total",
    }
    lines += ["", f"{'module':{width}}" + "".join(f"  {title:>18}" for title in columns.values())]
    for name, cost in modules.items():
        lines.append(f"{name:{width}}" + "".join(f"  {getattr(cost, column):18,}" for column in columns))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _short(value: int) -> str:
    """A number with three digits and a unit: 1.37 G."""
    for power, unit in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return str(value)

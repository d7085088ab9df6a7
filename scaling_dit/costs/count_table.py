"""The `count` verb: what a backbone, or the backbone of an experiment, costs."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from scaling_dit.model.build import build_model, make_tokenizer

if TYPE_CHECKING:  # loading flax takes longer than telling a mistake in the command
    from flax import linen as nn

    from scaling_dit.costs.count import Cost, Count

LATENTS, TEXT = (32, 32, 4), (77, 1024)  # 256-pixel images through an 8x autoencoder; CLIP-H text


class Counted(NamedTuple):
    """What is counted: a backbone and the shapes of its inputs.

    name: the backbone's; module: the backbone; latents: height, width, channels; text: tokens and their width;
    training: "batch" and "steps" of an experiment, for its training FLOPs; empty for a backbone alone.
    """

    name: str
    module: "nn.Module"
    latents: tuple[int, int, int]
    text: tuple[int, int]
    training: dict[str, int]


def of_experiment(
    config: ConfigDict, latents: Sequence[int] | None = None, text: Sequence[int] | None = None
) -> Counted:
    """The backbone of a resolved config; its data and text encoder give the shapes that are not given."""
    model = build_model(config, make_tokenizer(config))
    shapes = latents or model.latent_shape, text or (model.text_encoder.length, model.text_encoder.dim)
    return _counted(config.backbone, *shapes, {"batch": config.batch, "steps": config.steps})


def of_backbone(
    section: ConfigDict, latents: Sequence[int] | None = None, text: Sequence[int] | None = None
) -> Counted:
    """A backbone alone, from the section `backbone` of a resolved config; by default of `LATENTS` and `TEXT`."""
    return _counted(section, latents or LATENTS, text or TEXT, {})


def main(counted: Counted, *, depth: int = 1, as_json: bool = False) -> int:
    """Prints the count as a table or as one JSON object; returns the exit code.

    Args:
      depth: levels of modules in the breakdown.
    """
    from scaling_dit.costs.count import count

    result = count(counted.module, counted.latents, counted.text)
    about = {"backbone": counted.name, "latents": counted.latents, "text": counted.text}
    rows = _figures(result, counted.training)
    modules = result.by_module(depth)
    if as_json:
        costs = {name: dataclasses.asdict(cost) for name, cost in modules.items()}
        print(json.dumps(about | counted.training | rows | {"modules": costs}))
    else:
        print(_table(about | counted.training, rows, modules))
    return 0


def _counted(
    section: ConfigDict, latents: Sequence[int], text: Sequence[int], training: dict[str, int]
) -> Counted:
    from scaling_dit import backbones

    height, width, channels = latents
    length, dim = text
    module = backbones.create_for(in_channels=channels, text_dim=dim, **section.to_dict())
    return Counted(section.name, module, (height, width, channels), (length, dim), training)


def _figures(result: "Count", training: dict[str, int]) -> dict[str, int]:
    names = ("params", "macs_paper", "macs_attention", "macs_total", "activation_bytes")
    figures = {name: getattr(result, name) for name in names}
    if training:
        for convention in ("paper", "total"):
            figures[f"train_flops_{convention}"] = result.train_flops(**training, convention=convention)
    return figures


_MEANING = {
    "params": "parameters",
    "macs_paper": "multiply-accumulates per picture, convolutions and linear layers",
    "macs_attention": "those of them inside attention and transformer modules",
    "macs_total": "multiply-accumulates per picture, with the products inside attention",
    "activation_bytes": "bytes per picture kept for the backward pass, about",
    "train_flops_paper": "training FLOPs, without the products inside attention",
    "train_flops_total": "training FLOPs",
}


def _table(about: dict[str, Any], figures: dict[str, int], modules: dict[str, "Cost"]) -> str:
    """The inputs, the figures, and the cost of each module."""
    lines = [", ".join(f"{name} {_plain(value)}" for name, value in about.items()), ""]
    lines += [
        f"{name:17}  {value:>29,}  {_short(value):>7}  {_MEANING[name]}" for name, value in figures.items()
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
        lines.append(f"{name:{width}}" + "".join(f"  {getattr(cost, figure):18,}" for figure in columns))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _short(value: int) -> str:
    """Three digits and a unit: 1.37 G."""
    for power, unit in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return str(value)

"""The `count` verb: what a backbone, or the backbone of an experiment, costs."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.config import override_key, schema
from scaling_dit.errors import UserError
from scaling_dit.model.build import build_model, make_tokenizer

if TYPE_CHECKING:  # loading flax takes longer than telling a mistake in the command
    from flax import linen as nn

    from scaling_dit.costs.count import Cost, Count

LATENTS, TEXT = (32, 32, 4), (77, 1024)  # 256-pixel images through an 8x autoencoder; CLIP-H text


def main(
    spec: str | None,
    backbone: str | None,
    overrides: Sequence[str] = (),
    *,
    latents: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    depth: int = 1,
    as_json: bool = False,
) -> int:
    """Prints the count of an experiment's backbone, or of a backbone alone, as a table or as JSON.

    Args:
      spec: the experiment, as for `config.load`; its data and text encoder give the shapes, its batch and steps the
        training FLOPs.
      backbone: instead of `spec`, a backbone's name.
      overrides: `--config.key=value` arguments; with `backbone`, those of `config.backbone`.
      latents: height, width, channels of a latent; by default the experiment's, or `LATENTS`.
      text: tokens and their width; by default the experiment's, or `TEXT`.
      depth: levels of modules that are told apart.
      as_json: one JSON object instead of a table.

    Raises:
      UserError: neither or both of `spec` and `backbone`, or shapes that are not whole numbers.
    """
    if (spec is None) == (backbone is None):
        raise UserError("count needs either --config or --backbone; for example --backbone=uvit")
    latents_HWC = _shape("--latents", latents, "height,width,channels")
    text_LD = _shape("--text", text, "length,width")
    if spec is not None:
        config = config_lib.load(spec, overrides)
        module, latents_HWC, text_LD = _of_experiment(config, latents_HWC, text_LD)
        training = {"batch": config.batch, "steps": config.steps}
    else:
        for override in overrides:
            if schema.derived(override_key(override)):
                raise UserError(
                    f"{override}: with --backbone it follows from --latents and --text; set those"
                )
            if not override.lstrip("-").startswith(("config.backbone.", "noconfig.backbone.")):
                raise UserError(f"{override}: with --backbone only --config.backbone.KEY=VALUE can be set")
        config = config_lib.defaults()
        config.backbone.name = backbone
        fields = config_lib.resolve(config, overrides).backbone.to_dict()
        latents_HWC, text_LD = latents_HWC or LATENTS, text_LD or TEXT
        module = _create(fields, latents_HWC, text_LD)
        training = {}
    from scaling_dit.costs.count import count

    height, width, channels = latents_HWC
    length, dim = text_LD
    result = count(module, (height, width, channels), (length, dim))
    about = {"backbone": config.backbone.name, "latents": latents_HWC, "text": text_LD}
    rows = _figures(result, training)
    modules = result.by_module(depth)
    if as_json:
        costs = {name: dataclasses.asdict(cost) for name, cost in modules.items()}
        print(json.dumps(about | training | rows | {"modules": costs}))
    else:
        print(_table(about | training, rows, modules))
    return 0


def _of_experiment(
    config: ConfigDict, latents: tuple[int, ...] | None, text: tuple[int, ...] | None
) -> tuple["nn.Module", tuple[int, ...], tuple[int, ...]]:
    """The experiment's backbone and the shapes that its data and text encoder give it, where none are given."""
    model = build_model(config, make_tokenizer(config))
    latents = latents or model.latent_shape
    text = text or (model.text_encoder.length, model.text_encoder.dim)
    return _create(config.backbone.to_dict(), latents, text), latents, text


def _create(fields: dict[str, Any], latents: tuple[int, ...], text: tuple[int, ...]) -> "nn.Module":
    from scaling_dit import backbones

    return backbones.create_for(in_channels=latents[2], text_dim=text[1], **fields)


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


def _shape(flag: str, values: Sequence[str] | None, names: str) -> tuple[int, ...] | None:
    if values is None:
        return None
    if len(values) != names.count(",") + 1 or not all(value.isdigit() and int(value) > 0 for value in values):
        raise UserError(f"{flag}={','.join(values)}: must be {names} in whole numbers above 0")
    return tuple(map(int, values))

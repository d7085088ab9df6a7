"""The config of a run beside that of its base (`train --from`): what must be equal, and what else differs.

Arrays that fit are not yet the same function: heads, positions, the schedule and what is predicted change it with no
shape that says so. A stage may change what its training can make good, and says so; a run of adapters, whose base stays
as it is, may not.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from scaling_dit import backbones
from scaling_dit import config as config_lib
from scaling_dit.config.named import section_of
from scaling_dit.errors import UserError
from scaling_dit.model.build import image_size_of
from scaling_dit.model.model import Model
from scaling_dit.training.base import FileBase, RunBase

# Fields by which a run may differ from its base: how it is computed, where its files lie, and where positions lie.
_FREE = {
    "backbone": (
        "attention", "remat", "dtype", "param_dtype", "positions", "base_size", "rope_scaling", "table_side",
    ),
    "text_encoder": ("weights", "tokenizer_files", "length", "dtype", "param_dtype"),
    "codec": ("weights", "dtype", "param_dtype"),
}  # fmt: skip
# Fields that a transformer's `size` stands for as well.
_SIZE = ("size", "hidden", "depth", "heads")
# What the network reads and says at a timestep; `diffusion.time_shift` only says where timesteps lie.
_MEANING = (
    "text_mask", "diffusion.prediction", "diffusion.prediction_fields", "diffusion.schedule",
    "diffusion.schedule_fields", "diffusion.zero_snr", "diffusion.resolution_shift",
)  # fmt: skip
# Differences that a stage names when it begins: what step 0 computes, or at which noise, may follow from them.
_SAID = (*_MEANING, "diffusion.time_shift", "backbone.base_size", "backbone.rope_scaling")
# Differences that an error names.
_SHOWN = 3


def check_configs(base: RunBase | FileBase, config: ConfigDict, model: Model) -> None:
    """Makes sure that a run's base has its family, sizes, text encoder and codec, and reads conditions as it does.

    Of a run that trains adapters the base must also have its diffusion.

    Raises:
      UserError: names the fields that differ, with both values.
    """
    if base.config is None:
        return
    found = []
    for section in _FREE:
        there, here = base.config[section].to_dict(), config[section].to_dict()
        if there["name"] != here["name"]:
            found.append(_line(f"{section}.name", there["name"], here["name"]))
            continue
        free = _FREE[section] if section != "backbone" or here["name"] in backbones.BACKBONES else ()
        if section == "backbone" and not found:
            there, here = _sized(there, model), _sized(here, model)
        found += [
            _line(f"{section}.{field}", there.get(field, "absent"), here.get(field, "absent"))
            for field in sorted(there.keys() | here.keys())
            if field not in free and there.get(field, "absent") != here.get(field, "absent")
        ]
    if base.trains_text and not config.train_text_encoder:
        found.append(
            "config.train_text_encoder is True there and False here (optim.groups with factor 0 freeze trained weights)"
        )
    found += _of_conditions(base.config, config)
    if config.adapter.rank:
        fixed = (*_MEANING, *_position_fields(base.config.backbone))
        different = changed(base.config, config)
        found += [_line(key, *both) for key, both in different.items() if _is_of(key, fixed)]
    # The grid of another model would be of no use.
    found = found or _of_base_size(base.config, config, model)
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            f"--from={base.start} cannot be the base of this run: {'; '.join(found[:_SHOWN])}{more}"
        )


def _line(key: str, there: Any, here: Any) -> str:
    return f"config.{key} is {there!r} there and {here!r} here"


def _sized(section: dict[str, Any], model: Model) -> dict[str, Any]:
    """The fields of a transformer with what its size stands for, so that two ways to say it are one."""
    if not set(_SIZE) <= set(section):
        return section
    made: Any = backbones.create_for(
        in_channels=model.codec.channels, text_dim=model.text_encoder.dim, **section
    )
    return section | {"size": None} | dict(zip(_SIZE[1:], made.widths, strict=True))


def _of_conditions(there: ConfigDict, here: ConfigDict) -> list[str]:
    """Conditions of both runs that the backbone would read in another way, or at other positions."""
    before, now = _read(there), _read(here)
    found = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        for field in ("concat", "positions"):
            if old[field] != new[field]:
                found.append(_line(f"conditions.{name}.{field}", old[field], new[field]))
                break
        else:
            if old["place"] != new["place"]:
                found.append(
                    f"config.conditioning.names puts {name} beside the image as number {old['place']} there and "
                    f"{new['place']} here (name the base's conditions first, in its order)"
                )
    return found


def _read(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Condition -> how it is read; `place` counts those with positions beside the image, 0 for all others."""
    found: dict[str, dict[str, Any]] = {}
    count = 0
    for name in map(section_of, config.conditioning.names):
        fields = config.conditions[name]
        # As channels a condition has no positions.
        positions = fields.positions if fields.concat == "token" else None
        count += positions == "shifted"
        place = count if positions == "shifted" else 0
        found[name] = {"concat": fields.concat, "positions": positions, "place": place}
    return found


def _position_fields(backbone: ConfigDict) -> tuple[str, ...]:
    """Fields that move the positions which a base was trained with; one that counts on is scaled beyond them alone."""
    if backbone.name not in backbones.BACKBONES or "base_size" not in backbone:
        return ()
    if "rope_scaling" not in backbone:
        return ("backbone.base_size",)
    return () if backbone.rope_scaling == "none" else ("backbone.rope_scaling",)


def _of_base_size(there: ConfigDict, here: ConfigDict, model: Model) -> list[str]:
    """A `base_size` of scaled rotary positions that is not the grid which the base's own count on."""
    before, now = there.backbone, here.backbone
    if now.name not in backbones.BACKBONES or now.get("rope_scaling", "none") == "none":
        return []
    if before.rope_scaling != "none":
        wanted, why = before.base_size, f"{before.base_size} in the base, whose positions are scaled already"
    else:
        # Codec and patch are the base's.
        wanted = model.codec.shape(image_size_of(there))[0] // before.patch
        why = f"the base's grid {wanted}x{wanted}"
    if now.base_size == wanted:
        return []
    return [f"config.backbone.base_size is {now.base_size}, and {why}; set it to {wanted}"]


def changed(base: ConfigDict, config: ConfigDict) -> dict[str, list[Any]]:
    """Fields that differ from the base's and may not change between starts, dotted key -> [there, here]."""
    there, here = config_lib.flatten(base), config_lib.flatten(config)
    return {
        key: [_plain(there.get(key)), _plain(here.get(key))]
        for key in sorted(there.keys() | here.keys())
        if not config_lib.is_free(key) and there.get(key) != here.get(key)
    }


def in_words(different: dict[str, list[Any]], record: str) -> str:
    """The end of a stage's first line: fields of `changed` that change what the base's weights compute, by name.

    Args:
      different: as `changed` gives it.
      record: name of the file that has them all.
    """
    said = [
        f"; {key} is {before!r} there and {now!r} here"
        for key, (before, now) in different.items()
        if _is_of(key, _SAID)
    ]
    if rest := len(different) - len(said):
        said.append(f"; {rest} {'more ' if said else ''}fields differ, see {record}")
    return "".join(said)


def _is_of(key: str, fields: tuple[str, ...]) -> bool:
    return any(key == field or key.startswith(f"{field}.") for field in fields)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Which codec encoded a prepared set. A run that reads the set must have the same one."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.config import conditions
from scaling_dit.data.prepared.source import PreparedSource
from scaling_dit.data.sources import Source
from scaling_dit.encoders.codec import Codec, init_codec
from scaling_dit.errors import UserError
from scaling_dit.model.frozen import frozen_hash
from scaling_dit.weights import places

# Fields of a codec that say where its weights lie or how it runs; `size` stands for its architecture.
_NOT_IDENTITY = ("weights", "dtype", "tile", "size")


def codec_weights(config: ConfigDict, codec: Codec) -> Any:
    """The weights of a config's codec: loaded from the place it names, or initialised from the seed as a run does.

    Raises:
      UserError: the codec needs weights and the config names none.
    """
    component: Any = codec
    if hasattr(component, "load"):
        if component.weights == places.NONE:
            raise places.missing("codec.weights")
        if places.is_place(component.weights):
            return component.load()
    return jax.jit(lambda key: trees.unbox(init_codec(codec, key)))(jax.random.key(config.seed))


def codec_identity(config: ConfigDict, codec: Codec, params: Any) -> dict[str, Any]:
    """What determines a codec's output, as JSON types: name, fields, architecture, and sha256 of the weights.

    The sha256 is "" for a codec without weights.
    """
    fields = {key: value for key, value in config.codec.to_dict().items() if key not in _NOT_IDENTITY}
    # It holds the scale and shift of the latents too.
    architecture = getattr(codec, "architecture", None)
    if dataclasses.is_dataclass(architecture) and not isinstance(architecture, type):
        fields |= dataclasses.asdict(architecture)
    identity = {**fields, "sha256": frozen_hash({"codec": params})}
    return dict(json.loads(json.dumps(identity)))


def check_source(source: Source, config: ConfigDict, codec: Codec, params: Any) -> None:
    """Makes sure that a run that reads a prepared set has the codec that encoded it; other sources always fit.

    Args:
      source: of the run.
      config: of the run.
      codec: of the run.
      params: the frozen weights of that codec.

    Raises:
      UserError: another codec, another field of it, other weights, or moments of another shape.
    """
    if not isinstance(source, PreparedSource):
        return
    check_codec(source.manifest.codec, codec_identity(config, codec, params), source.path)
    held = source.manifest.conditions
    check_conditions(held, conditions.own_fields(config), source.path)
    made_by: dict[str, dict[str, Any]] = {
        one.name: {"masks": one.condition.masks} for one in conditions.chosen(config)
    }
    for name, entry in conditions.classes(config).items():
        made_by[name]["name"] = entry
    check_makers(held, made_by, source.path)
    right = codec.moments_shape(source.image_size)
    if source.moments_shape != right:
        raise UserError(f"{source.path} holds moments of {source.moments_shape}; the codec's are {right}")


def check_conditions(held: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], place: str) -> None:
    """Makes sure that a prepared set has the conditions of a run, made as the run would make them.

    Args:
      held: the conditions in the manifest of the set.
      wanted: section -> fields of each condition of the run.
      place: folder of the set, which the error names.

    Raises:
      UserError: one is missing, or was made with another value of a field.
    """
    for name, fields in wanted.items():
        if name not in held:
            there = f"it holds {', '.join(sorted(held))}" if held else "it holds none"
            raise UserError(
                f"{place} holds no condition {name!r}; {there}; prepare it with config.conditioning.names={(name,)}"
            )
        for field, now in fields.items():
            then = held[name]["fields"].get(field)
            if then != (list(now) if isinstance(now, tuple) else now):
                raise UserError(
                    f"{place} was prepared with conditions.{name}.{field} {then!r}; the run has {now!r}; set "
                    f"config.conditions.{name}.{field} so"
                )


def check_makers(held: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], place: str) -> None:
    """Makes sure that classes of the run made the conditions of a prepared set, which has all of the run's.

    Args:
      held: as in `check_conditions`; of a set that does not say it any name is right.
      wanted: section -> name of the class and number of masks.
      place: as in `check_conditions`.

    Raises:
      UserError: another class made one, or one has another number of masks.
    """
    for section, own in wanted.items():
        for what, now in own.items():
            then = held[section].get(what, now)
            if then != now:
                raise UserError(
                    f"{place} was prepared with a condition {section!r} of {what} {then!r}; the run's has {now!r}; set "
                    "config.conditioning.names to those it was prepared with, or prepare it again"
                )


def check_codec(made_by: Mapping[str, Any], here: Mapping[str, Any], place: str) -> None:
    """Makes sure that a run samples latents from moments with the codec that encoded them.

    Args:
      made_by: the identity in the manifest of the set.
      here: the identity of the run's codec.
      place: folder of the set, which the error names.

    Raises:
      UserError: another codec, another field of it, or other weights.
    """
    keys = sorted(here.keys() | made_by.keys(), key=lambda key: (key == "sha256", key != "name", key))
    for key in keys:
        then, now = made_by.get(key), here.get(key)
        if then == now:
            continue
        if key == "sha256":
            raise UserError(
                f"{place} was prepared with other weights of codec {here['name']!r} (sha256 "
                f"{str(then)[:12] or 'none'}, here {str(now)[:12] or 'none'}); set config.codec.weights to those"
            )
        raise UserError(
            f"{place} was prepared with codec {key} {then!r}; the run has {now!r}; set config.codec so"
        )

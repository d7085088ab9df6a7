"""Builds what one run is made of from its config: source, tokenizer, and the model of codec, encoder and backbone."""

from typing import Any

from ml_collections import ConfigDict

from scaling_dit import backbones, encoders, trees
from scaling_dit.backbones import contract
from scaling_dit.config import conditions
from scaling_dit.data import sources
from scaling_dit.diffusion import predictions, schedules
from scaling_dit.encoders import scratch
from scaling_dit.encoders.codec import Codec, check_own_codec, create_codec
from scaling_dit.errors import UserError
from scaling_dit.model.model import Model
from scaling_dit.trees import Params


def build_model(config: ConfigDict, tokenizer: Any, source: sources.Source | None = None) -> Model:
    """The model that a config describes.

    Args:
      config: of the run, resolved.
      tokenizer: from `make_tokenizer`, or `load_tokenizer` of the workdir.
      source: the run's, if it is open already. Without it, a source whose `image_size` the config states is not
        opened, so that a trained run samples where its data are missing.

    Raises:
      UserError: parts that do not fit together.
    """
    text_encoder = encoders.create_text_encoder(tokenizer=tokenizer, **config.text_encoder.to_dict())
    codec = create_codec(**config.codec.to_dict())
    image_size = image_size_of(config) if source is None else source.image_size
    check_own_codec(codec, config.codec.name, image_size)
    read = conditions.chosen(config)
    _check_conditions(read, codec, config.codec.name, image_size)
    backbone = backbones.create_for(
        in_channels=codec.channels,
        text_dim=text_encoder.dim,
        conditions=tuple(one.row(codec.channels) for one in read),
        **config.backbone.to_dict(),
    )
    extras = getattr(backbone, "EXTRAS", {})
    if extras:
        raise UserError(
            f"backbone {config.backbone.name!r} needs the extras {', '.join(extras)}, which no source here supplies"
        )
    if config.backbone.name not in backbones.BACKBONES:
        text = (text_encoder.length, text_encoder.dim)
        where = f"backbone {config.backbone.name!r}"
        contract.check_own(backbone, codec.shape(image_size), text, where)
    diffusion = config.diffusion
    schedule = schedules.make_schedule(
        diffusion.schedule,
        zero_snr=diffusion.zero_snr,
        time_shift=diffusion.time_shift,
        resolution_shift=diffusion.resolution_shift,
        fields=diffusion.schedule_fields,
    )
    prediction = predictions.create_prediction(diffusion.prediction, diffusion.prediction_fields)
    predictions.check_prediction(prediction, schedule)
    return Model(
        codec=codec,
        text_encoder=text_encoder,
        backbone=backbone,
        schedule=schedule,
        prediction=prediction,
        image_size=image_size,
        train_text_encoder=config.train_text_encoder,
        text_mask=config.text_mask,
        conditions=read,
    )


def _check_conditions(read: tuple[conditions.Chosen, ...], codec: Codec, name: str, image_size: int) -> None:
    """Makes sure that a codec can encode conditions."""
    if read and not callable(getattr(codec, "mean", None)):
        raise UserError(
            f"config.codec {name!r} has no mean(params, moments) -> latents [B, h, w, C], which image conditions need"
        )
    height, width, _ = codec.shape(image_size)
    masked = [one.name for one in read if one.condition.masks]
    if masked and (image_size % height or image_size % width):
        raise UserError(
            f"condition {masked[0]!r} has a mask, and latents of {height}x{width} do not divide images of "
            f"{image_size}x{image_size} px, over which it is averaged; choose another image size or codec"
        )


def image_size_of(config: ConfigDict) -> int:
    """Side of a run's images in pixels; a source whose size the config does not state is opened."""
    if "image_size" in config.source:
        return int(config.source.image_size)
    return open_source(config).image_size


def open_source(config: ConfigDict) -> sources.Source:
    """The training split of the run's data.

    Raises:
      UserError: as `create_source`, or no records to train on.
    """
    source = sources.create_source(**config.source.to_dict())
    if not config.buckets and not len(source):
        raise UserError(f"config.source has no records to train on: {source.describe()}")
    return source


def make_tokenizer(config: ConfigDict, source: sources.Source | None = None) -> Any:
    """The tokenizer of a new run: read from where the text encoder's fields say, or built from the captions' words.

    None where the text encoder reads its tokenizer from files and the fields name none; a model can be counted
    without it.

    Args:
      config: of the run, resolved.
      source: the run's, if it is open already; else it is opened where captions are needed.

    Raises:
      UserError: no tokenizer where the fields say, or damaged files.
    """
    kind = encoders.tokenizer_type(config.text_encoder.name)
    if hasattr(kind, "read"):
        return kind.read(config.text_encoder)
    source = open_source(config) if source is None else source
    return scratch.build_tokenizer(source, buckets=config.buckets)


def countable_tokenizer(config: ConfigDict) -> Any:
    """A tokenizer that is good enough to count a model: one built from captions gets no words, so no data are read.

    Shapes of a caption's tokens follow from the text encoder's fields alone.

    Raises:
      UserError: as `make_tokenizer`, where the tokenizer is read from files.
    """
    if hasattr(encoders.tokenizer_type(config.text_encoder.name), "read"):
        return make_tokenizer(config)
    return scratch.WordTokenizer(())


def abstract_params(config: ConfigDict) -> Params:
    """Shapes and dtypes of everything a config trains or holds frozen; nothing is allocated."""
    model = build_model(config, make_tokenizer(config))
    params, frozen = model.shapes()
    return trees.unbox({**params, **{name: tree for name, tree in frozen.items() if tree}})

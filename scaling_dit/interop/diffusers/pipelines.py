"""A run as a folder that `diffusers.DiffusionPipeline.from_pretrained` loads, and the config that such a folder means.

The folder holds `model_index.json` and one folder each for backbone, autoencoder, text encoder, tokenizer and
scheduler. UNets become a StableDiffusionPipeline, which feeds CLIP's padding to the backbone; PixArt becomes a
PixArtAlphaPipeline, which hides T5's. A run that does otherwise cannot be sampled by these classes and is refused.
"""

import dataclasses
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.backbones.declared import diffusers_class
from scaling_dit.encoders import clip, t5, vae, vae_config, vae_weights
from scaling_dit.errors import UserError
from scaling_dit.interop.diffusers import schedulers, text_encoders
from scaling_dit.sampling.pipeline import Pipeline
from scaling_dit.weights import files, state_dicts
from scaling_dit.weights.diffusers_class import VERSION

INDEX = "model_index.json"
VAE, TEXT_ENCODER, TOKENIZER, SCHEDULER = "vae", "text_encoder", "tokenizer", "scheduler"
_CONFIG = "config.json"
_SCHEDULER_CONFIG = "scheduler_config.json"
# Their folders.
_BACKBONES = ("unet", "transformer")
# It gives the backbone the mode of the autoencoder's posterior as it is.
_UNSCALED = "StableDiffusionInstructPix2PixPipeline"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A pipeline class of diffusers.

    Attributes:
      class_name: its name.
      folder: of the backbone.
      backbone: class of the backbone in diffusers.
      text_encoder: ours, with the names of its class and of its tokenizer's in transformers.
      text_mask: whether the pipeline hides padding from the backbone.
      absent: optional components, which are left out.
    """

    class_name: str
    folder: str
    backbone: str
    text_encoder: tuple[type[Any], str, str]
    text_mask: bool
    absent: tuple[str, ...] = ()


_CLIP = (clip.ClipText, "CLIPTextModel", "CLIPTokenizer")
_T5 = (t5.T5Text, "T5EncoderModel", "T5Tokenizer")
KINDS = (
    Kind(
        "StableDiffusionPipeline", "unet", "UNet2DConditionModel", _CLIP, text_mask=False,
        absent=("safety_checker", "feature_extractor", "image_encoder"),
    ),
    Kind("PixArtAlphaPipeline", "transformer", "PixArtTransformer2DModel", _T5, text_mask=True),
)  # fmt: skip


def kind_of(pipe: Pipeline) -> Kind:
    """The pipeline class that samples what a run does.

    Raises:
      UserError: there is none; says which part of the run is the reason.
    """
    name, model = pipe.config.backbone.name, pipe.model
    family = diffusers_class(type(model.backbone))
    kind = next((kind for kind in KINDS if family and kind.backbone == family.class_name), None)
    if kind is None:
        raise UserError(
            f"no pipeline of diffusers samples with backbone {name!r} from CLIP or T5; --to=diffusers or "
            "--to=safetensors writes its weights alone"
        )
    if model.conditions:
        raise UserError(
            f"{kind.class_name} reads no image conditions, and this run reads "
            f"{', '.join(one.name for one in model.conditions)}; --to=diffusers writes the backbone alone"
        )
    encoder, class_name, _ = kind.text_encoder
    if not isinstance(model.text_encoder, encoder):
        raise UserError(
            f"{kind.class_name} needs a {class_name}; this run has text encoder {pipe.config.text_encoder.name!r}"
        )
    if not isinstance(model.codec, vae.Autoencoder):
        raise UserError(
            f"{kind.class_name} needs an {vae_config.CLASS_NAME}; this run has codec {pipe.config.codec.name!r}"
        )
    if model.text_mask != kind.text_mask:
        does = "hides padding from" if kind.text_mask else "shows padding to"
        raise UserError(
            f"{kind.class_name} {does} the backbone; this run was trained with text_mask {model.text_mask}"
        )
    return kind


def write(
    folder: epath.Path, pipe: Pipeline, weights: Any, described: dict[str, Any], shard_bytes: int
) -> None:
    """Writes all parts of a run into an existing folder, `model_index.json` last.

    Args:
      pipe: the run.
      weights: of the backbone, by upstream name.
      described: `config.json` of the backbone.
      shard_bytes: weights beyond this are split over several files.

    Raises:
      UserError: diffusers has no pipeline for this run.
    """
    kind, model = kind_of(pipe), pipe.model
    scheduler = schedulers.write(pipe.config)
    encoder: Any = model.text_encoder
    codec: Any = model.codec
    text_params = (pipe.params if model.train_text_encoder else pipe.frozen)[TEXT_ENCODER]
    vae_params = trees.unbox(pipe.frozen["codec"])
    vae_arrays = state_dicts.save(
        vae_weights.rows(codec.architecture), vae_params, vae_params, vae_config.CLASS_NAME
    )
    parts = {
        kind.folder: (described, weights, files.STEMS[0]),
        VAE: (
            vae_config.write_architecture(codec.architecture, model.image_size),
            vae_arrays,
            files.STEMS[0],
        ),
        TEXT_ENCODER: (
            text_encoders.describe(encoder),
            text_encoders.state_dict(encoder, text_params),
            files.STEMS[1],
        ),
    }
    for name, (config, arrays, stem) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        files.write(folder / name, stem, arrays, shard_bytes)
        (folder / name / _CONFIG).write_text(_json(config))
    text_encoders.write_tokenizer(encoder, folder / TOKENIZER)
    (folder / SCHEDULER).mkdir(exist_ok=True)
    (folder / SCHEDULER / _SCHEDULER_CONFIG).write_text(_json(scheduler))
    _, text_class, tokenizer_class = kind.text_encoder
    index: dict[str, Any] = {
        "_class_name": kind.class_name,
        "_diffusers_version": VERSION,
        kind.folder: ["diffusers", kind.backbone],
        VAE: ["diffusers", vae_config.CLASS_NAME],
        TEXT_ENCODER: ["transformers", text_class],
        TOKENIZER: ["transformers", tokenizer_class],
        SCHEDULER: ["diffusers", scheduler["_class_name"]],
        **{name: [None, None] for name in kind.absent},
    }
    if kind.absent:
        index["requires_safety_checker"] = False
    (folder / INDEX).write_text(_json(index))


def is_pipeline(path: epath.Path) -> bool:
    """Whether a place is the folder of a whole pipeline."""
    return path.is_dir() and (path / INDEX).exists()


def check_latents(path: epath.Path) -> None:
    """Makes sure that a pipeline, or the one that the folder of a backbone is part of, scales latents as is done here.

    Raises:
      UserError: one whose conditions are latents of another scale, so that its weights would compute something else.
    """
    for folder in (path, path.parent):
        if is_pipeline(folder) and files.read_json(folder / INDEX).get("_class_name") == _UNSCALED:
            raise UserError(
                f"{folder} is a {_UNSCALED}, whose backbone reads unscaled latents of the image to edit; here they "
                "are scaled as those of the noise, so its weights would compute something else and are not read"
            )


def backbone_folder(path: epath.Path) -> epath.Path:
    """The folder of a pipeline's backbone.

    Raises:
      UserError: it has none.
    """
    for name in _BACKBONES:
        if (path / name / _CONFIG).exists():
            return path / name
    raise UserError(
        f"{path} is a pipeline without a backbone; one of {', '.join(_BACKBONES)} must hold a {_CONFIG}"
    )


def set_components(config: ConfigDict, path: epath.Path, *, sampling: bool = True) -> None:
    """Sets what a pipeline's folder decides of a run, in place: codec, text encoder, noise schedule and sampler.

    Autoencoder and text encoder stay where they are, frozen: the config names the folder.

    Args:
      config: of the experiment.
      path: the folder.
      sampling: False where the user has chosen a sampler, so that the scheduler's own way is not read.

    Raises:
      UserError: a part that is missing, or of an architecture that is not here.
    """
    if "://" not in str(path):
        path = path.absolute()
    for part in (VAE, TEXT_ENCODER, SCHEDULER):
        if not (path / part).is_dir():
            raise UserError(f"{path} is a pipeline without the folder {part!r}, which a run needs")
    text = text_encoders.read_fields(path)
    config.codec = ConfigDict({"name": "vae", "weights": str(path)})
    config.text_encoder = ConfigDict(text)
    config.train_text_encoder = False
    config.text_mask = text["name"] == "t5"
    file = path / SCHEDULER / _SCHEDULER_CONFIG
    pipeline = str(files.read_json(path / INDEX).get("_class_name"))
    diffusion, sample = schedulers.read(
        files.read_json(file), str(file), sampling=sampling, pipeline=pipeline
    )
    for section, fields in (("diffusion", diffusion), ("sample", sample)):
        if section not in config:
            config[section] = ConfigDict()
        if "sampler" in fields and "sampler_fields" in config[section]:
            # Those of the experiment's sampler.
            del config[section].sampler_fields
        for name, value in fields.items():
            config[section][name] = ConfigDict(value) if isinstance(value, dict) else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"

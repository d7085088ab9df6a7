"""Every field of a run, declared once: its default, what it means and which values it takes.

Flags, error lines, `config.defaults()`, the check that a workdir is resumed by the same run, and docs/config.md come
from `SECTIONS`. To add a field, add a line there and use it; docs/extending.md shows how.

A component section names a component and carries the fields of that component's class, which the class declares.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.diffusion import sampling_fields
from scaling_dit.fields import BATCH, COUNT, FEW, FROM_0, MANY, POSITIVE, SEED, SHARE, Field, Rule


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that belong together.

    Attributes:
      doc: one line, for docs/config.md.
      fields: name -> field, in the order of the config.
      free: whether all of them are free, as `Field.free`.
    """

    doc: str
    fields: Mapping[str, Field]
    free: bool = False


# Relative width of the plain mean, which bounds those of `optim.ema_power`.
WIDEST_EMA_POWER = 12**-0.5

DECAY = Rule("at least 0 and below 1", lambda x: 0 <= x < 1)
AXIS = Rule("at least 1, or -1 for the remaining devices", lambda x: 1 <= x < 2**31 or x == -1)
FINITE = Rule("a finite number", math.isfinite)


def _numbers_below(limit: float, text: str) -> Rule:
    def fits(values: Any) -> bool:
        return all(isinstance(x, float) and 0 < x < limit for x in values) and len(set(values)) == len(values)

    return Rule(f"a tuple of different numbers {text}", fits)


def _is_span(values: Any) -> bool:
    steps = len(values) == 2 and all(isinstance(x, int) for x in values)
    return not values or (steps and 1 <= values[0] <= values[1])


SECTIONS: dict[str, Section] = {
    "": Section(
        "The run.",
        {
            "seed": Field(
                0,
                "seed of the initial parameters, the order of the data, the noise and the timesteps",
                SEED,
            ),
            "steps": Field(1000, "optimizer updates", COUNT),
            "batch": Field(128, "global batch, over all devices and microbatches", BATCH),
            "train_text_encoder": Field(True, "train the text encoder along with the backbone, or freeze it"),
            "text_mask": Field(
                True, "hide padded text from the backbone, whatever its family; False for CLIP"
            ),
            "buckets": Field(
                False,
                "train on images of seven aspect ratios, one to a batch, and not on square crops: a source of "
                "image files, or a set of `prepare --buckets`",
            ),
            "compile_cache": Field(
                "",
                'folder of compiled programs, so that a restart compiles nothing: a path, or "workdir"',
                free=True,
            ),
        },
    ),
    "captions": Section(
        "Which of an image's captions is shown, and how much of it.",
        {
            "policy": Field(
                "uniform",
                "choose among all captions alike, or first a kind by its share",
                choices=("uniform", "mix"),
            ),
            "alt": Field(0.5, "share of alt-text under `mix`; the three shares sum to 1", SHARE),
            "synthetic": Field(0.5, "share of synthetic captions under `mix`", SHARE),
            "long": Field(0.0, "share of long captions under `mix`", SHARE),
            "random_length": Field(0.0, "share of captions cut to a random number of units", SHARE),
            "unit": Field("words", "unit that a caption is cut by", choices=("words", "sentences")),
        },
    ),
    "loader": Section(
        "Reading the data.",
        {
            "threads": Field(4, "reading threads of each process", FEW),
            "prefetch": Field(8, "batches read ahead", FEW),
        },
        free=True,
    ),
    "diffusion": Section(
        "Noise, objective and timesteps.",
        {
            "schedule": Field(
                "scaled_linear",
                "noise schedule",
                choices=("scaled_linear", "linear", "cosine", "flow"),
                own=True,
            ),
            "zero_snr": Field(False, "rescale the schedule so that its last timestep holds no signal"),
            "prediction": Field(
                "eps", "what the backbone predicts", choices=("eps", "x0", "v", "flow"), own=True
            ),
            "weighting": Field(
                "none", "weight of each timestep in the loss", choices=("none", "min_snr"), own=True
            ),
            "min_snr_gamma": Field(5.0, "gamma of weighting `min_snr`", POSITIVE),
            "time_sampling": Field(
                "uniform",
                "distribution of the training timesteps",
                choices=("uniform", "stratified", "logit_normal"),
                own=True,
            ),
            "time_location": Field(0.0, "mean before the sigmoid of `logit_normal`", FINITE),
            "time_scale": Field(1.0, "standard deviation before the sigmoid of `logit_normal`", POSITIVE),
            "time_shift": Field(
                1.0, "shift of schedule `flow`, in training and sampling: more than 1 = more noise", POSITIVE
            ),
            "resolution_shift": Field(
                1.0,
                "shift of the other schedules: side of the images over the side that the schedule was made for; "
                "sigma / alpha is multiplied by it, so more than 1 = more noise",
                POSITIVE,
            ),
            "caption_drop": Field(
                0.1, "share of captions replaced by the empty one, for classifier-free guidance", SHARE
            ),
        },
    ),
    "conditioning": Section(
        "Images that the backbone reads beside the text.",
        {
            "names": Field(
                (),
                "image conditions that the backbone reads; the fields of each are in config.conditions.NAME",
            ),
        },
    ),
    "optim": Section(
        "The optimizer and the moving averages of the parameters.",
        {
            "name": Field("adamw", "optimizer", choices=("adamw",), own=True),
            "learning_rate": Field(8e-5, "learning rate after warm-up", POSITIVE),
            "warmup_steps": Field(100, "steps over which the learning rate rises from 0", FROM_0),
            "decay": Field("constant", "learning rate after warm-up", choices=("constant", "cosine")),
            "final_fraction": Field(0.0, "`cosine` ends at this fraction of learning_rate", SHARE),
            "mup_base": Field(
                0,
                "hidden size that learning_rate was tuned at: muP keeps it right at others (transformers); 0 = off",
                FROM_0,
            ),
            "b1": Field(0.9, "decay of Adam's first moment", DECAY),
            "b2": Field(0.999, "decay of Adam's second moment", DECAY),
            "eps": Field(1e-8, "Adam's epsilon", POSITIVE),
            "weight_decay": Field(0.01, "decoupled weight decay", FROM_0),
            "clip_norm": Field(1.0, "largest global norm of the gradients; 0 = no clipping", FROM_0),
            "accumulate": Field(
                1, "microbatches of a step; microbatch j of n holds positions j::n of the batch", COUNT
            ),
            "groups": Field(
                (),
                "(regex over parameter paths, learning-rate factor, weight decay) each; the first match wins",
            ),
            "ema": Field((0.999,), "decays of the averages kept", _numbers_below(1.0, "between 0 and 1")),
            "ema_power": Field(
                (),
                "relative widths of power-function averages, such as (0.05, 0.1), from which any decay can be rebuilt",
                _numbers_below(WIDEST_EMA_POWER, "above 0 and below 0.2887"),
            ),
            "text_encoder_rate": Field(
                1.0,
                "learning rate of a trained text encoder, as a factor of learning_rate; `groups` come first",
                POSITIVE,
            ),
            "max_nonfinite": Field(10, "consecutive skipped updates before the run stops", COUNT),
        },
    ),
    "adapter": Section(
        "Low-rank adapters: with a rank the run trains these alone, beside the frozen parameters of the run that "
        "`train --from` names.",
        {
            "rank": Field(0, "rank of the adapters; 0 = train the parameters themselves", FROM_0),
            "alpha": Field(
                0.0, "an adapted kernel is W + alpha / rank A B; 0 = the rank, so a factor of 1", FROM_0
            ),
            "targets": Field(
                (r"^backbone/.*(attn|attention)(_\d+)?/(q|kv|qkv|text_kv|proj|out)/kernel$",),
                "regexes over the paths of kernels; by default q, k, v and out of every attention of the backbone",
            ),
        },
    ),
    "processes": Section(
        "Runs of several processes.",
        {
            "heartbeat": Field(
                100,
                "seconds without a sign of life after which a process is lost and the others stop",
                Rule("from 10 to 3600 seconds", lambda x: 10 <= x <= 3600),
            ),
            "start_up": Field(
                300,
                "seconds to wait for all processes at the start",
                Rule("from 1 to 86400 seconds", lambda x: 1 <= x <= 86400),
            ),
        },
        free=True,
    ),
    "mesh": Section(
        "The axes of the device mesh; one may be -1, which takes the remaining devices.",
        {
            "data": Field(-1, "replicas of the parameters, each on its own part of the batch", AXIS),
            "fsdp": Field(1, "parts of the batch whose devices also shard the parameters", AXIS),
            "context": Field(1, "parts of the token axis; for UNets, of the batch", AXIS),
            "tensor": Field(1, "parts of the attention heads and of the MLPs", AXIS),
            "slices": Field(1, "TPU slices; only `data` crosses them", COUNT),
        },
        free=True,
    ),
    "sharding": Section(
        "How a step communicates over the mesh.",
        {
            "gather_once": Field(
                False,
                "gather all parameters once a step, in rings, not layer by layer: faster on v4 and v5p, for the memory "
                "of one copy of the parameters and of the gradients in backbone.dtype; not with context or tensor",
            ),
            "sparse_core": Field(
                False,
                "with gather_once, on TPUs with SparseCores (v5p, v6e): these gather and sum, beside the computation",
            ),
        },
        free=True,
    ),
    "sample": Section(
        "Sampling: the defaults of `sample` and `evaluate`, and of evaluation in training.",
        {
            # Declared with what else follows from them: flags, manifests and folder names.
            **sampling_fields.declared(),
            "ema": Field(
                -1.0,
                "weights to sample with: a decay of optim.ema, -1 = its largest, 0 = the raw weights",
            ),
        },
        free=True,
    ),
    "eval": Section(
        "Evaluation in training.",
        {
            "every": Field(500, "steps between evaluations; 0 = none", FROM_0),
            "loss_images": Field(256, "fixed (image, timestep, noise) triples of the validation loss", MANY),
            "loss_bins": Field(
                5,
                "timestep bins that the validation loss is split into",
                Rule("from 1 to 1000", lambda x: 1 <= x <= 1000),
            ),
            "grid": Field(16, "images of the sample grid", FEW),
            "metrics": Field((), "names of metrics; the fields of each are in config.metrics.NAME"),
            "prompts": Field(64, "held-out prompts of the metrics", MANY),
        },
        free=True,
    ),
    "checkpoint": Section(
        "Checkpoints.",
        {
            "every": Field(500, "steps between checkpoints", COUNT),
            "keep_last": Field(2, "newest checkpoints kept", COUNT),
            "keep_every": Field(
                0, "also keep each checkpoint at a multiple of so many steps; 0 = none", FROM_0
            ),
            "retry": Field(
                60.0,
                "seconds to try again while the disk or bucket refuses to be written; then exit code 74",
                FROM_0,
            ),
            "ema_every": Field(
                100, "steps between snapshots of the averages of optim.ema_power, all of them kept", COUNT
            ),
        },
        free=True,
    ),
    "log": Section(
        "Metrics written during training.",
        {
            "every": Field(20, "steps between rows of metrics", COUNT),
            "tensorboard": Field(True, "write TensorBoard files beside JSON lines"),
            "profile": Field(
                (),
                "(first, last) step of a profiler trace; () = none",
                Rule("() for none, or (first, last) step, from 1 on", _is_span),
            ),
        },
        free=True,
    ),
    # Acts only when a loss spikes; what it did is in the workdir. So it is free.
    "rewind": Section(
        "What to do about a spike of the loss.",
        {
            "factor": Field(
                0.0,
                "a loss above factor x the median of the last ones is a spike; 0 = never",
                Rule("0 for never, or more than 1", lambda x: x == 0 or 1 < x < math.inf),
            ),
            "window": Field(100, "losses that the median is over", COUNT),
            "back": Field(100, "return to a checkpoint at least so many steps before the spike", COUNT),
            "ahead": Field(100, "and skip the data up to so many steps after it", FROM_0),
            "limit": Field(3, "rewinds before the run stops instead", COUNT),
        },
        free=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A section that names a component and carries the fields of that component's class.

    Attributes:
      doc: one line, for docs/config.md.
      default: the component's name by default.
      fields_of: name of a component -> its fields with their defaults.
      derived: fields that follow from another one of the run, so that a config does not have them -> what to set.
      free: fields that a run may be resumed with other values of.
    """

    doc: str
    default: str
    fields_of: Callable[[str], dict[str, Any]]
    derived: Mapping[str, str] = dataclasses.field(default_factory=dict)
    free: tuple[str, ...] = ()


def _from(module: str, function: str) -> Callable[[str], dict[str, Any]]:
    """`function(name)` of `module`, which is imported at the first call."""
    return lambda name: getattr(importlib.import_module(module), function)(name)


COMPONENTS: dict[str, Component] = {
    "backbone": Component(
        "The network that predicts the noise, or what config.diffusion.prediction says.",
        "uvit",
        _from("scaling_dit.backbones", "backbone_fields"),
        derived={
            "in_channels": "follows from the codec; set config.codec.name",
            "text_dim": (
                "follows from the text encoder; set config.text_encoder.dim, or the size of a pretrained one"
            ),
            "conditions": "follows from the run's conditions; set config.conditioning.names",
        },
    ),
    "text_encoder": Component(
        "What makes token embeddings of captions.",
        "scratch",
        _from("scaling_dit.encoders", "text_encoder_fields"),
        # Files may move: a checkpoint holds the hash of the weights, and a workdir keeps the tokenizer.
        free=("weights", "tokenizer_files"),
    ),
    "codec": Component(
        "What makes latents of images, and images of latents.",
        "pixels",
        _from("scaling_dit.encoders.codec", "codec_fields"),
        free=("weights",),
    ),
    "source": Component(
        "The data set.",
        "shapes",
        _from("scaling_dit.data.sources", "source_fields"),
        # It decides when to stop, not what is read.
        free=("max_damaged",),
    ),
}


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """The fields of a user's own part that a single field names; a built-in part has none.

    Attributes:
      section: the dotted key of the section of these fields, beside the field that names the part.
      fields_of: name of the part -> its fields with their defaults.
    """

    section: str
    fields_of: Callable[[str], dict[str, Any]]


def _own_part(section: str, module: str) -> OwnPart:
    """With the fields that `SEAM` of `module`, a `components.Seam`, finds."""
    return OwnPart(section, lambda name: importlib.import_module(module).SEAM.fields(name))


# Each field with `own`. The modules are imported for a user's own part only.
OWN_PARTS: dict[str, OwnPart] = {
    "diffusion.schedule": _own_part("diffusion.schedule_fields", "scaling_dit.diffusion.schedules"),
    "diffusion.prediction": _own_part("diffusion.prediction_fields", "scaling_dit.diffusion.predictions"),
    "diffusion.weighting": _own_part("diffusion.weighting_fields", "scaling_dit.diffusion.weightings"),
    "diffusion.time_sampling": _own_part(
        "diffusion.time_sampling_fields", "scaling_dit.diffusion.time_sampling"
    ),
    "optim.name": _own_part("optim.fields", "scaling_dit.training.optim"),
    "sample.sampler": _own_part("sample.sampler_fields", "scaling_dit.diffusion.samplers"),
    "sample.guidance_method": _own_part("sample.guidance_method_fields", "scaling_dit.diffusion.guidance"),
}

# "section.name" -> field, in the order of the config. The fields of components are those of their classes.
FIELDS: dict[str, Field] = {
    (f"{name}.{field}" if name else field): declared
    for name, group in SECTIONS.items()
    for field, declared in group.fields.items()
}

# `metrics` has a section for each metric that eval.metrics names (named.py).
FREE_SECTIONS: tuple[str, ...] = (*(name for name, group in SECTIONS.items() if group.free), "metrics")
# Free fields of other sections.
FREE_FIELDS: tuple[str, ...] = (
    *(key for key, field in FIELDS.items() if field.free),
    *(f"{name}.{field}" for name, component in COMPONENTS.items() for field in component.free),
)


def section(name: str) -> dict[str, Field]:
    """The fields of a section by name, in the order of the config; "" holds those of no section."""
    return dict(SECTIONS[name].fields)


def is_free(key: str) -> bool:
    """Whether a run may be resumed with another value of this field, a dotted key."""
    return key in FREE_FIELDS or key.split(".")[0] in FREE_SECTIONS


def owner(section: str) -> str:
    """The field that names the part whose fields stand in this section; "" for any other section."""
    return next((key for key, part in OWN_PARTS.items() if part.section == section), "")


def own_fields(key: str, name: str) -> dict[str, Any]:
    """The fields, with their defaults, of the part called `name` that a field of `OWN_PARTS` names."""
    return OWN_PARTS[key].fields_of(name) if ":" in name else {}


def derived(key: str) -> str:
    """What to set in place of a component's field that follows from others; "" for any other key."""
    name, _, field = key.rpartition(".")
    return COMPONENTS[name].derived.get(field, "") if name in COMPONENTS else ""


def defaults() -> ConfigDict:
    """Every field of a run with its default; experiments replace some of them."""
    config = ConfigDict({name: ConfigDict({"name": part.default}) for name, part in COMPONENTS.items()})
    for name, group in SECTIONS.items():
        values = {field: declared.default for field, declared in group.fields.items()}
        if name:
            config[name] = ConfigDict(values)
        else:
            config.update(values)
    for part in OWN_PARTS.values():
        name, _, field = part.section.rpartition(".")
        config[name][field] = ConfigDict()
    config.metrics = ConfigDict()
    config.conditions = ConfigDict()
    return config

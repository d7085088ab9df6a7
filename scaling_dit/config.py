"""One run as data: the defaults of every config field, and what is checked before anything starts.

A config is an `ml_collections.ConfigDict`. Four of its sections (`backbone`, `text_encoder`, `codec`, `source`) name a
component and carry that component's own fields, so each can be set from the command line and a typo is caught.
"""

import difflib
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from scaling_dit import config_files
from scaling_dit.components import tuples
from scaling_dit.data.captions import CaptionPolicy, check_policy
from scaling_dit.errors import UserError, nearest


def _fields(module: str, function: str) -> Callable[[str], dict[str, Any]]:
    """`function(name)` of `module`, imported when it is first asked."""
    return lambda name: getattr(importlib.import_module(module), function)(name)


# Section -> the fields and defaults of the component that the section names.
COMPONENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "backbone": _fields("scaling_dit.backbones", "backbone_fields"),
    "text_encoder": _fields("scaling_dit.encoders", "text_encoder_fields"),
    "codec": _fields("scaling_dit.encoders.codec", "codec_fields"),
    "source": _fields("scaling_dit.data.sources", "source_fields"),
}

# Fields of a component that follow from another one of the run, so that a config does not have them, and what to set.
DERIVED: dict[str, str] = {
    "backbone.in_channels": "follows from the codec; set config.codec.name",
    "backbone.text_dim": "follows from the text encoder; set config.text_encoder.dim, or the size of a pretrained one",
}

# A run may be resumed with other values here: they change how it runs and what it reports, not what it computes.
# That of `rewind` acts only when a loss spikes, and what it did is on disk.
FREE_SECTIONS = ("mesh", "processes", "loader", "log", "eval", "checkpoint", "sample", "rewind")
# The same for single fields of other sections.
FREE_FIELDS = (
    "source.max_damaged",  # when to stop, not what to read
    "compile_cache",
    "codec.weights",  # files may move: a checkpoint holds the hash of what is in them
    "text_encoder.weights",
    "text_encoder.tokenizer_files",  # a workdir keeps what was in them
)

CHOICES: dict[str, tuple[str, ...]] = {
    "captions.policy": ("uniform", "mix"),
    "captions.unit": ("words", "sentences"),
    "diffusion.schedule": ("scaled_linear", "linear", "cosine", "flow"),
    "diffusion.prediction": ("eps", "x0", "v", "flow"),
    "diffusion.weighting": ("none", "min_snr"),
    "diffusion.time_sampling": ("uniform", "stratified", "logit_normal"),
    "optim.decay": ("constant", "cosine"),
    "sample.sampler": ("ddim", "dpmpp_2m", "euler", "heun"),
}

WIDEST_EMA_POWER = 12**-0.5  # relative width of the plain mean, which bounds those of `optim.ema_power`

Rule = tuple[str, Callable[[Any], bool]]  # what is right, and its test; comparisons are false for nan
_COUNT: Rule = ("at least 1", lambda x: x >= 1)
_BATCH: Rule = ("from 1 to 2**20 = 1,048,576", lambda x: 1 <= x <= 2**20)
_FROM_0: Rule = ("0 or more", lambda x: 0 <= x < math.inf)
_POSITIVE: Rule = ("more than 0", lambda x: 0 < x < math.inf)
_SHARE: Rule = ("from 0 to 1", lambda x: 0 <= x <= 1)
_DECAY: Rule = ("at least 0 and below 1", lambda x: 0 <= x < 1)
_AXIS: Rule = ("at least 1, or -1 for the remaining devices", lambda x: x >= 1 or x == -1)
_DECAYS: Rule = (
    "a tuple of different numbers between 0 and 1",
    lambda xs: all(isinstance(x, float) and 0 < x < 1 for x in xs) and len(set(xs)) == len(xs),
)
RANGES: dict[str, Rule] = {
    "seed": ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "steps": _COUNT,
    "batch": _BATCH,
    "captions.alt": _SHARE,
    "captions.synthetic": _SHARE,
    "captions.long": _SHARE,
    "captions.random_length": _SHARE,
    "loader.threads": _COUNT,
    "loader.prefetch": _COUNT,
    "diffusion.min_snr_gamma": _POSITIVE,
    "diffusion.time_location": ("a finite number", math.isfinite),
    "diffusion.time_scale": _POSITIVE,
    "diffusion.time_shift": _POSITIVE,
    "diffusion.caption_drop": _SHARE,
    "optim.learning_rate": _POSITIVE,
    "optim.warmup_steps": _FROM_0,
    "optim.final_fraction": _SHARE,
    "optim.b1": _DECAY,
    "optim.b2": _DECAY,
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _FROM_0,
    "optim.clip_norm": _FROM_0,
    "optim.accumulate": _COUNT,
    "optim.ema": _DECAYS,
    "optim.ema_power": (
        "a tuple of different numbers above 0 and below 0.2887",
        lambda xs: (
            all(isinstance(x, float) and 0 < x < WIDEST_EMA_POWER for x in xs) and len(set(xs)) == len(xs)
        ),
    ),
    "optim.max_nonfinite": _COUNT,
    "processes.heartbeat": ("from 10 to 3600 seconds", lambda x: 10 <= x <= 3600),
    "processes.start_up": ("from 1 to 86400 seconds", lambda x: 1 <= x <= 86400),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.context": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.slices": _COUNT,
    "sample.steps": ("from 1 to 999", lambda x: 1 <= x <= 999),
    "sample.guidance": _FROM_0,
    "sample.guidance_rescale": _SHARE,
    "sample.guidance_interval": (
        "two timesteps (low, high) from 0 to 1000",
        lambda xs: (
            len(xs) == 2 and all(isinstance(x, int | float) for x in xs) and 0 <= xs[0] <= xs[1] <= 1000
        ),
    ),
    "sample.batch": _BATCH,
    "eval.every": _FROM_0,
    "eval.loss_images": _COUNT,
    "eval.loss_bins": ("from 1 to 1000", lambda x: 1 <= x <= 1000),
    "eval.grid": _COUNT,
    "eval.prompts": _COUNT,
    "checkpoint.every": _COUNT,
    "checkpoint.ema_every": _COUNT,
    "checkpoint.keep_last": _COUNT,
    "checkpoint.keep_every": _FROM_0,
    "log.every": _COUNT,
    "log.profile": (
        "() for none, or (first, last) step, from 1 on",
        lambda xs: not xs or (len(xs) == 2 and all(isinstance(x, int) for x in xs) and 1 <= xs[0] <= xs[1]),
    ),
    "rewind.factor": ("0 for never, or more than 1", lambda x: x == 0 or 1 < x < math.inf),
    "rewind.window": _COUNT,
    "rewind.back": _COUNT,
    "rewind.ahead": _FROM_0,
    "rewind.limit": _COUNT,
}


def defaults() -> ConfigDict:
    """Every field of a run with its default; experiments replace some of them."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000  # optimiser updates
    config.batch = 128  # global batch, over all devices and microbatches

    # Components: a name plus that component's fields (see `complete`).
    config.backbone = ConfigDict({"name": "uvit"})
    config.text_encoder = ConfigDict({"name": "scratch"})
    config.codec = ConfigDict({"name": "pixels"})
    config.source = ConfigDict({"name": "shapes"})

    config.captions = ConfigDict(
        {
            "policy": "uniform",  # uniform | mix: which of an image's captions is shown (data/captions.py)
            "alt": 0.5,  # shares of the kinds of captions under mix; they sum to 1
            "synthetic": 0.5,
            "long": 0.0,
            "random_length": 0.0,  # share of captions cut to a random number of units
            "unit": "words",  # words | sentences
        }
    )
    config.loader = ConfigDict({"threads": 4, "prefetch": 8})  # reading threads; batches read ahead
    config.train_text_encoder = True  # in state.params and optimised, else frozen
    config.text_mask = True  # hide padded text from the backbone; False for CLIP (recipe.py)

    config.diffusion = ConfigDict(
        {
            "schedule": "scaled_linear",  # scaled_linear | linear | cosine | flow
            "zero_snr": False,  # rescale the schedule so that its last timestep holds no signal
            "prediction": "eps",  # what the backbone predicts: eps | x0 | v | flow
            "weighting": "none",  # none | min_snr
            "min_snr_gamma": 5.0,
            "time_sampling": "uniform",  # uniform | stratified | logit_normal
            "time_location": 0.0,  # of logit_normal: mean and standard deviation before the sigmoid
            "time_scale": 1.0,
            "time_shift": 1.0,  # of schedule flow, in training and sampling: more than 1 = more noise
            "caption_drop": 0.1,  # share of captions replaced by the empty one, for guidance
        }
    )
    config.optim = ConfigDict(
        {
            "learning_rate": 8e-5,
            "warmup_steps": 100,
            "decay": "constant",  # constant | cosine, after warm-up
            "final_fraction": 0.0,  # cosine ends at this fraction of learning_rate
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "accumulate": 1,  # microbatches per step; microbatch j of n holds positions j::n
            "groups": (),  # (regex over parameter paths, learning-rate factor, weight decay), first match wins
            "ema": (0.999,),  # any number of decays
            "ema_power": (),  # relative widths, such as (0.05, 0.1): any decay can then be rebuilt afterwards
            "max_nonfinite": 10,  # consecutive skipped updates before the run stops
        }
    )
    config.compile_cache = (
        ""  # folder of compiled programs, so that a restart compiles nothing: a path, or "workdir"
    )
    config.processes = ConfigDict(
        {
            "heartbeat": 100,  # seconds without a sign of life after which a process is lost and the others stop
            "start_up": 300,  # seconds to wait for all processes at the start
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1, "slices": 1})
    # Each device gathers all parameters once a step, ring by ring, in place of layer by layer: faster on v4 and v5p,
    # for the memory of one copy of the parameters and of the gradients in backbone.dtype. Not with context or tensor.
    config.mesh.gather_once = False
    # With gather_once, on TPUs with SparseCores (v5p, v6e): these gather and sum, beside the computation.
    config.mesh.sparse_core = False
    config.sample = ConfigDict(
        {
            "sampler": "ddim",  # ddim | dpmpp_2m | euler | heun
            "steps": 50,
            "guidance": 7.5,
            "guidance_rescale": 0.0,  # how far guided predictions go back to the spread of unguided ones
            "guidance_interval": (0.0, 1000.0),  # timesteps with guidance; outside it is 1
            "batch": 64,  # pictures drawn at once
            "ema": -1.0,  # the weights drawn with: a decay of optim.ema, -1 = its largest, 0 = the raw weights
        }
    )
    config.eval = ConfigDict(
        {
            "every": 500,  # steps between evaluations, 0 = none
            "loss_images": 256,  # fixed (image, timestep, noise) triples of the validation loss
            "loss_bins": 5,  # timestep bins it is split into
            "grid": 16,  # pictures of the sample grid
            "metrics": (),  # names in evaluation.METRICS, on `prompts` held-out prompts
            "prompts": 64,
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every": 500,  # steps
            "keep_last": 2,
            "keep_every": 0,  # steps; 0 = none
            "ema_every": 100,  # steps between snapshots of the averages of optim.ema_power, all of them kept
        }
    )
    config.log = ConfigDict(
        {
            "every": 20,
            "tensorboard": True,
            "profile": (),  # (first, last) step of a profiler trace
        }
    )
    config.rewind = ConfigDict(
        {
            "factor": 0.0,  # a loss above factor x the median of the last ones is a spike; 0 = never
            "window": 100,  # losses the median is over
            "back": 100,  # go back to a checkpoint at least so many steps before the spike
            "ahead": 100,  # and skip the data up to so many steps after it
            "limit": 3,  # rewinds before the run stops instead
        }
    )
    return config


def complete(config: ConfigDict) -> ConfigDict:
    """A full config: the defaults and each component's own fields, under the values that `config` sets.

    Args:
      config: any part of a config; it is not changed.

    Raises:
      UserError: an unknown key or component, or a value of another type than the field's.
    """
    full = defaults()
    given = config.copy_and_resolve_references()
    for section, fields_of in COMPONENTS.items():
        chosen = given.get(section, ConfigDict())
        if not isinstance(chosen, ConfigDict):
            raise UserError(f"config.{section} is {chosen!r}; set config.{section}.name and its fields")
        name = chosen.get("name", full[section].name)
        fields = {k: _settable(v) for k, v in fields_of(name).items() if f"{section}.{k}" not in DERIVED}
        full[section] = ConfigDict({"name": name} | fields)
    known = flatten(full)
    for key, value in flatten(given).items():
        if key not in known:
            raise UserError(f"config.{key}: {why_unknown(key, known)}")
        section, _, field = key.rpartition(".")
        try:
            (full[section] if section else full)[field] = value
        except TypeError:
            expected = type(known[key]).__name__
            raise UserError(
                f"config.{key} is {value!r}, but its default {known[key]!r} is of type {expected}"
            ) from None
    return full


def resolve(config: ConfigDict, overrides: Sequence[str] = ()) -> ConfigDict:
    """What a run starts with: `config` completed, overridden, validated and locked.

    Args:
      config: any part of a config; it is not changed. A config already resolved comes back equal.
      overrides: arguments such as `--config.optim.learning_rate=1e-3`, typed as ml_collections.config_flags does.
        A component's name is set first, so its fields can be set along with it. Another name than the config's
        keeps the values of the section that the new component has a field for; the rest are its own defaults.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range.
    """
    config = config.copy_and_resolve_references()
    for section, name in config_files.component_names(overrides, COMPONENTS).items():
        _switch_component(config, section, name)
    config = complete(config)
    config_files.apply_overrides(config, overrides)
    config = config.copy_and_resolve_references()
    for key, value in flatten(config).items():
        if isinstance(value, list | tuple):
            section, _, field = key.rpartition(".")
            # As a saved config comes back, so that a run finds itself again.
            (config[section] if section else config)[field] = tuples(value)
    if config.sample.ema == -1:
        config.sample.ema = max(config.optim.ema, default=0.0)
    validate(config)
    return config.lock()


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of an experiment, ready to run.

    Args:
      spec: `path/to/file.py`, the name of an installed experiment such as `shapes`, or either with `:argument`.
      overrides: as in `resolve`.

    Raises:
      UserError: no such experiment or argument, or a config that `resolve` refuses.
    """
    return resolve(config_files.read_experiment(spec), overrides)


def validate(config: ConfigDict) -> None:
    """Checks every choice and range of a complete config, before anything is built from it.

    Raises:
      UserError: names the first field at fault, its value and what would be right.
    """
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise UserError(f"config.{key} is {config[key]!r}; {nearest(config[key], choices)}")
    for key in RANGES:
        check_range(key, config[key])
    check_policy(CaptionPolicy(**config.captions))
    if config.batch % config.optim.accumulate:
        right = f"a multiple of config.optim.accumulate, which is {config.optim.accumulate}"
        raise UserError(f"config.batch is {config.batch}; it must be {right}")
    if list(config.mesh.values()).count(-1) > 1:
        raise UserError("config.mesh has -1 on more than one axis; only one can take the remaining devices")
    reach = config.checkpoint.every * (config.checkpoint.keep_last - 1)
    if config.rewind.factor and config.rewind.back > reach:
        right = "at most config.checkpoint.every x (keep_last - 1), so that a checkpoint so old is there"
        raise UserError(f"config.rewind.back is {config.rewind.back}; it must be {right}, here {reach}")
    if config.log.profile and config.log.profile[0] > config.steps:
        right = f"begin at most at config.steps, which is {config.steps}"
        raise UserError(f"config.log.profile is {config.log.profile}; it must {right}")
    if config.sample.ema not in (0, -1, *config.optim.ema):
        right = f"0 (raw weights), -1 (largest) or one of config.optim.ema, {config.optim.ema}"
        raise UserError(f"config.sample.ema is {config.sample.ema!r}; it must be {right}")
    for group in config.optim.groups:
        parse_group(group)
    if config.eval.metrics:
        from scaling_dit.evaluation import METRICS  # metrics load the oracle, which few commands need

        for name in config.eval.metrics:
            if name not in METRICS:
                raise UserError(f"config.eval.metrics names {name!r}; {nearest(name, METRICS)}")


def check_range(key: str, value: Any) -> None:
    """Checks a value against `RANGES`; a field that is not there takes any.

    Raises:
      UserError: names the field, its value and what would be right.
    """
    right, fits = RANGES.get(key, ("", lambda _: True))
    if value is None or not fits(value):
        raise UserError(f"config.{key} is {value!r}; it must be {right}")


def parse_group(group: Any) -> tuple[re.Pattern[str], float, float]:
    """One of `config.optim.groups`: compiled regex over parameter paths, learning-rate factor and weight decay.

    Raises:
      UserError: it is not made of these, or one of the numbers is negative.
    """
    try:
        pattern, factor, decay = group
        compiled, factor, decay = re.compile(pattern), float(factor), float(decay)
        if not (factor >= 0 and decay >= 0):
            raise ValueError("the numbers must be 0 or more")
    except (TypeError, ValueError, re.error) as error:
        right = "a group is (regex over parameter paths, learning-rate factor, weight decay)"
        raise UserError(f"config.optim.groups holds {group!r}; {right}: {error}") from None
    return compiled, factor, decay


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every field, in the order of the config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def dump(config: ConfigDict) -> str:
    """One `key = value` line per field, sorted: the same config always gives the same text."""
    return "".join(f"{key} = {value!r}\n" for key, value in sorted(flatten(config).items()))


def to_json(config: ConfigDict) -> str:
    """The config as sorted JSON; `from_json` gives back an equal one."""
    return json.dumps(config.to_dict(), sort_keys=True, indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; sequences come back as tuples, as every sequence of a config is one.

    Raises:
      UserError: `text` is not JSON.
    """
    try:
        return ConfigDict(tuples(json.loads(text)))
    except json.JSONDecodeError as error:
        raise UserError(f"the saved config is not valid JSON: {error}") from None


def check_same_run(saved: ConfigDict, config: ConfigDict) -> None:
    """Makes sure that a run goes on with the config it was started with, except for `FREE_SECTIONS` and `FREE_FIELDS`.

    `steps` may be raised where the learning rate stays constant after warm-up: nothing computed so far would be other.

    Raises:
      UserError: lists the fields that differ.
    """
    then, now = flatten(saved), flatten(config)
    absent = "absent"
    if saved.optim.decay == config.optim.decay == "constant" and saved.steps < config.steps:
        then["steps"] = config.steps
    differences = [
        f"{key} is {then.get(key, absent)!r} there and {now.get(key, absent)!r} here"
        for key in sorted(then.keys() | now.keys())
        if key.split(".")[0] not in FREE_SECTIONS
        and key not in FREE_FIELDS
        and then.get(key, absent) != now.get(key, absent)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"the workdir was written by another experiment: {', '.join(differences[:3])}{more};"
            " give another --workdir, or the config it was started with"
        )


def why_unknown(key: str, known: Iterable[str]) -> str:
    """Why a dotted key is none of `known`, and what would be right: the same field elsewhere, a near one, or all."""
    if key in DERIVED:
        return f"it {DERIVED[key]}"
    known = list(known)
    section, _, field = key.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in known if section and name.rpartition(".")[0] == section
    }
    elsewhere = [name for name in known if name.rpartition(".")[2] == field]
    close = elsewhere or [
        siblings[near] for near in difflib.get_close_matches(field, siblings, n=1, cutoff=0.5)
    ]
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif siblings:
        hint = f"{section} has {', '.join(sorted(siblings))}"
    else:
        hint = nearest(key, known)
        if not hint.startswith("did you mean"):
            hint = nearest(key, {name.split(".")[0] for name in known})
    return f"no such field; {hint}"


def _switch_component(config: ConfigDict, section: str, name: str) -> None:
    """Renames a section's component in place, keeping the values that the new one has a field for."""
    old = config.get(section, ConfigDict())
    if old.get("name") == name:
        return
    fields = COMPONENTS[section](name)
    shared = {k: v for k, v in old.items() if k in fields and isinstance(v, type(fields[k]))}
    config[section] = ConfigDict({"name": name} | shared)


def _settable(value: Any) -> Any:
    """A field's default; one of None accepts a value of any type."""
    if value is None:
        return placeholder(object)
    return tuples(value)

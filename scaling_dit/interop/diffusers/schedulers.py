"""The `scheduler_config.json` of diffusers' pipelines and our noise schedule and sampler, each from the other.

A scheduler of diffusers is two things of ours: the noise schedule with what is predicted, and the sampler. Where one
of the built-in samplers does exactly the same, the config names that one, else a class of
`diffusion.published_samplers` with every setting. What neither can represent is refused, with class, setting and value.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from scaling_dit.diffusion import published_samplers
from scaling_dit.errors import UserError, nearest
from scaling_dit.weights.diffusers_class import VERSION

# Our name -> diffusers', with the first and last beta where they are parameters.
_SCHEDULES: dict[str, tuple[str, float, float]] = {
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "linear": ("linear", 0.0001, 0.02),
    # Which reads no betas.
    "cosine": ("squaredcos_cap_v2", 0.0001, 0.02),
}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
_OWN = {
    f"{kind.__module__}:{kind.__name__}": (kind, name) for kind, name in published_samplers.SCHEDULERS.items()
}
# Which sample as another class does.
_SAME = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}
# What every class has of the noise schedule, and its defaults.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_NOISE_OF = {
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "DPMSolverSDEScheduler": _SD_BETAS,
}
# The others have no `rescale_betas_zero_snr`, and diffusers passes over it in their files.
_ZERO_SNR = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
# Settings of each class that are here for one value only.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "EulerDiscreteScheduler": {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    "DPMSolverMultistepScheduler": {
        "variance_type": (None,),
        "use_dynamic_shifting": (False,),
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_small"},
    "PNDMScheduler": {"skip_prk_steps": False},
    "EulerDiscreteScheduler": {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": {"variance_type": None, "use_dynamic_shifting": False},
}
# Schedulers of rectified flow -> our sampler; of their settings only the shift may differ from the default.
_FLOW = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
_FLOW_OFF = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
# Classes whose noise schedule is read here, but not their way of sampling.
_NOISE_ONLY = (
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# Settings that other classes have; diffusers passes over them in the file of a class without them.
_PASSED_OVER = (
    "skip_prk_steps",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "sample_max_value",
    "interpolation_type",
    "timestep_type",
    "variance_type",
    "solver_order",
    # Of rectified flow alone.
    "flow_shift",
    "time_shift_type",
)


def write(config: ConfigDict) -> dict[str, Any]:
    """The scheduler that samples as a run with `config.diffusion` and `config.sample.sampler` does.

    Raises:
      UserError: rectified flow, which diffusers' pipelines of these models do not have, or another sampler.
    """
    diffusion, sampler = config.diffusion, config.sample.sampler
    if diffusion.schedule not in _SCHEDULES or diffusion.prediction not in _PREDICTIONS:
        raise UserError(
            f"config.diffusion is {diffusion.schedule} with prediction {diffusion.prediction}, which no pipeline of "
            "diffusers for this backbone samples with; --to=diffusers writes the backbone alone"
        )
    if diffusion.resolution_shift != 1.0:
        raise UserError(
            f"config.diffusion.resolution_shift is {diffusion.resolution_shift}, which no scheduler of diffusers has; "
            "--to=diffusers writes the backbone alone"
        )
    betas, start, end = _SCHEDULES[diffusion.schedule]
    noise = {
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "beta_schedule": betas,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": _PREDICTIONS[diffusion.prediction],
        "rescale_betas_zero_snr": bool(diffusion.zero_snr),
    }
    if sampler in _OWN:
        described = _write_published(*_OWN[sampler], dict(config.sample.sampler_fields), noise)
    elif sampler in _CLASSES:
        spacing = "linspace" if sampler == "dpmpp_2m" else "leading"
        described = noise | {
            "_class_name": _CLASSES[sampler],
            "timestep_spacing": "trailing" if diffusion.zero_snr else spacing,
            "steps_offset": 1 if spacing == "leading" and not diffusion.zero_snr else 0,
        }
        if sampler == "ddim":
            described |= {"clip_sample": False, "set_alpha_to_one": False}
    else:
        raise UserError(
            f"config.sample.sampler is {sampler!r}, which diffusers has no scheduler for; set it to one of "
            f"{', '.join(_CLASSES)}, or write the backbone alone by --to=diffusers"
        )
    if described["_class_name"] in ("HeunDiscreteScheduler", "PNDMScheduler"):
        # They have none.
        described.pop("rescale_betas_zero_snr")
        if diffusion.zero_snr:
            raise UserError(
                f"diffusers' {described['_class_name']} has no zero terminal SNR; export with sampler ddim"
            )
    return described


def _write_published(
    kind: type[Any], name: str, fields: dict[str, Any], noise: Mapping[str, Any]
) -> dict[str, Any]:
    """The scheduler of one of `published_samplers`; raises UserError for fields that contradict the run."""
    sampler = dataclasses.asdict(kind(**fields))
    described = dict(noise) | {"_class_name": name}
    for setting, value in sampler.items():
        if setting == "cosine" or setting in ("sigma_min", "sigma_max"):
            described |= {setting: value} if setting != "cosine" and value else {}
        elif setting == "prediction_type" and value != noise["prediction_type"]:
            raise UserError(
                f"config.sample.sampler_fields.prediction_type is {value}, but the run predicts "
                f"{noise['prediction_type']}; set it so"
            )
        else:
            described[setting] = value
    return described | ({"skip_prk_steps": True} if name == "PNDMScheduler" else {})


def read(
    described: Mapping[str, Any], where: str, *, sampling: bool = True, pipeline: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.diffusion` that a scheduler means, and those of `config.sample`.

    Args:
      described: the contents of `scheduler_config.json`; settings that it leaves out have the defaults of its class.
      where: names the file in errors.
      sampling: False for the noise schedule alone, where the user has chosen a sampler; the second is then empty.
      pipeline: class of the pipeline. StableDiffusionPipeline sets two settings of any scheduler itself.

    Raises:
      UserError: a class, a setting or a noise schedule that we do not have; names class, setting and value.
    """
    named = str(described.get("_class_name"))
    name = _SAME.get(named, named)
    found = dict(described)
    if pipeline == "StableDiffusionPipeline":
        found |= {key: value for key, value in (("steps_offset", 1), ("clip_sample", False)) if key in found}
    if name in _FLOW:
        return _read_flow(found, name, where, sampling)
    known = set(_CLASSES.values()) | set(published_samplers.SCHEDULERS.values())
    if name not in known and name not in _NOISE_ONLY:
        raise UserError(
            f"{where} is of a {named}, whose noise schedule is not here; schedulers here are "
            f"{', '.join(sorted(known | set(_FLOW)))}: import the backbone's folder with config.diffusion set"
        )
    if found.get("use_flow_sigmas"):
        return _read_flow_solver(found, name, where, sampling)
    diffusion = _read_noise(found, name, where)
    if not sampling:
        return diffusion, {}
    if name not in known:
        raise UserError(
            f"{where} is of a {named}, which no sampler here equals; schedulers here are {', '.join(sorted(known))}: "
            "choose how to sample with a flag, such as --config.sample.sampler=dpmpp_2m, and only its noise schedule "
            "is read"
        )
    return diffusion, _read_sampler(found, name, where, diffusion)


def _read_noise(found: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    noise = _NOISE | _NOISE_OF.get(name, {})
    noise |= {key: found[key] for key in noise if key in found}
    if noise["trained_betas"] is not None or noise["num_train_timesteps"] != 1000:
        raise UserError(
            f"{where} has betas of its own ({name} with trained_betas, or num_train_timesteps "
            f"{noise['num_train_timesteps']}), which no schedule here has; 1000 timesteps of a named beta_schedule "
            "would be right"
        )
    for schedule, (betas, start, end) in _SCHEDULES.items():
        same = schedule == "cosine" or (noise["beta_start"], noise["beta_end"]) == (start, end)
        if noise["beta_schedule"] == betas and same:
            break
    else:
        betas = f"{noise['beta_schedule']} from {noise['beta_start']} to {noise['beta_end']}"
        raise UserError(
            f"{where} is of a {name} with betas {betas}; schedules here are {', '.join(_SCHEDULES)}"
        )
    kinds = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    kind = noise["prediction_type"]
    if kind not in kinds:
        raise UserError(f"{where} is of a {name} with prediction_type {kind!r}; {nearest(str(kind), kinds)}")
    zero_snr = bool(noise["rescale_betas_zero_snr"]) and name in _ZERO_SNR
    return {
        "schedule": schedule,
        "prediction": kinds[kind],
        "zero_snr": zero_snr,
        "resolution_shift": 1.0,
    }


def _read_sampler(
    found: Mapping[str, Any], name: str, where: str, diffusion: Mapping[str, Any]
) -> dict[str, Any]:
    kind = next(kind for kind, theirs in published_samplers.SCHEDULERS.items() if theirs == name)
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.init}
    fixed = _FIXED.get(name, {})
    for setting, right in fixed.items():
        value = found.get(setting, _DEFAULTS[name][setting])
        if value not in right:
            raise UserError(
                f"{where} is of a {name} with {setting} {value!r}, which no sampler here has; right would be "
                f"{' or '.join(map(repr, right))}, or choose a sampler with a flag, such as "
                "--config.sample.sampler=ddim, and only the noise schedule is read"
            )
    noise = {*_NOISE, "prediction_type"}
    for setting, value in found.items():
        if setting.startswith("_") or setting in noise or setting in fixed:
            continue
        if setting in fields:
            fields[setting] = _typed(setting, value, fields[setting], name, where)
        elif value not in (None, False) and setting not in _others(setting) and setting not in _PASSED_OVER:
            raise UserError(f"{where} is of a {name} with {setting} {value!r}, which is not known here")
    if name == "DDPMScheduler":
        large = found.get("variance_type") == "fixed_large"
        fields["variance_type"] = "fixed_large" if large else "fixed_small"
    if name == "PNDMScheduler":
        fields["prediction_type"] = str(found.get("prediction_type", "epsilon"))
        if fields["prediction_type"] == "sample":
            raise UserError(
                f"{where} is of a PNDMScheduler with prediction_type 'sample', which diffusers has not either; "
                "'epsilon' or 'v_prediction' would be right"
            )
    if name == "DPMSolverMultistepScheduler":
        fields |= _solver_fields(fields, diffusion)
    built_in = _built_in(name, fields, diffusion)
    if built_in:
        return {"sampler": built_in}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {key: value for key, value in fields.items() if value != defaults[key]}
    return {"sampler": f"{kind.__module__}:{kind.__name__}", "sampler_fields": given}


def _solver_fields(fields: Mapping[str, Any], diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of DPM-Solver whose names diffusers takes in another sense, or that JSON cannot hold."""
    changed: dict[str, Any] = {"cosine": diffusion["schedule"] == "cosine"}
    changed["lambda_min_clipped"] = max(float(fields["lambda_min_clipped"]), -1e9)
    if fields["algorithm_type"] == "deis":
        changed["algorithm_type"] = "dpmsolver++"
    if fields["solver_type"] in ("logrho", "bh1", "bh2"):
        changed["solver_type"] = "midpoint"
    return changed


def _built_in(name: str, fields: Mapping[str, Any], diffusion: Mapping[str, Any]) -> str:
    """The built-in sampler that does exactly what these settings do, "" if there is none."""
    sampler = next((ours for ours, theirs in _CLASSES.items() if theirs == name), "")
    # Euler's and Heun's change with zero terminal SNR, to trailing timesteps.
    placed = {
        "ddim": ("leading", 1, False),
        "euler": ("trailing", None, True) if diffusion["zero_snr"] else ("leading", 1, False),
        "heun": ("leading", 1, False),
        "dpmpp_2m": ("linspace", None, False),
    }.get(sampler)
    offset = fields["steps_offset"] if fields["timestep_spacing"] == "leading" else None
    spacing = placed == (fields["timestep_spacing"], offset, diffusion["zero_snr"])
    known: dict[str, dict[str, Any]] = {
        "ddim": {"set_alpha_to_one": False, "clip_sample": False, "thresholding": False},
        "euler": {"final_sigmas_type": "zero"},
        "heun": {"clip_sample": False},
        "dpmpp_2m": {
            "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
            "final_sigmas_type": "zero", "lambda_min_clipped": -1e9, "thresholding": False,
        },
    }  # fmt: skip
    rest = known.get(sampler)
    switches = [value for key, value in fields.items() if key.startswith("use_")]
    same = rest is not None and all(fields[key] == value for key, value in rest.items())
    return sampler if spacing and same and not any(switches) else ""


def _read_flow(
    found: Mapping[str, Any], name: str, where: str, sampling: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rectified flow with a fixed shift, which the built-in samplers compute as diffusers does."""
    if found.get("num_train_timesteps", 1000) != 1000:
        raise UserError(
            f"{where} is of a {name} with num_train_timesteps {found['num_train_timesteps']}; 1000 would be right"
        )
    on = [setting for setting in _FLOW_OFF if found.get(setting)]
    if on:
        raise UserError(
            f"{where} is of a {name} with {on[0]} {found[on[0]]!r}, which no sampler here has; off would be right"
        )
    diffusion = {
        "schedule": "flow",
        "prediction": "flow",
        "zero_snr": False,
        "time_shift": float(found.get("shift", 1.0)),
        "resolution_shift": 1.0,
    }
    return diffusion, {"sampler": _FLOW[name]} if sampling else {}


def _read_flow_solver(
    found: Mapping[str, Any], name: str, where: str, sampling: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """DPM-Solver++ on rectified flow: refused. diffusers cuts its timesteps to integers, ours are exact."""
    del sampling
    raise UserError(
        f"{where} is of a {name} with use_flow_sigmas True: rectified flow, whose timesteps diffusers cuts to integers "
        f"here (flow_shift {found.get('flow_shift', 1.0)}); import the backbone's folder with config.diffusion set, "
        "such as schedule flow and sampler dpmpp_2m"
    )


def _typed(setting: str, value: Any, default: Any, name: str, where: str) -> Any:
    """A setting in the type of our field; None stands for the field's default, as diffusers has it."""
    if value is None:
        return default
    kind = type(default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if kind in (int, float) else False
    if kind in (bool, str):
        fits = isinstance(value, kind)
    if not fits or (kind is int and int(value) != value) or (kind is float and math.isnan(value)):
        raise UserError(
            f"{where} is of a {name} with {setting} {value!r}; it must be of type {kind.__name__}, such as {default!r}"
        )
    return kind(value)


def _others(setting: str) -> set[str]:
    """The setting itself where some class here has it: diffusers passes over settings of other classes."""
    kinds = published_samplers.SCHEDULERS
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.name == setting}

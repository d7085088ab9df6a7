"""The `scheduler_config.json` of diffusers' pipelines and our noise schedule, each from the other.

A scheduler of diffusers is two things of ours: the noise schedule with what is predicted, and the sampler. Which of
diffusers' settings make its samplers equal to ours is tested step by step in tests/diffusion/test_samplers.py.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

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
_BY_CLASS = {name: sampler for sampler, name in _CLASSES.items()}
_DEFAULTS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"}


def write(config: ConfigDict) -> dict[str, Any]:
    """The scheduler that samples as a run with `config.diffusion` and `config.sample.sampler` does.

    Raises:
      UserError: rectified flow, which diffusers' pipelines of these models do not have.
    """
    diffusion, sampler = config.diffusion, config.sample.sampler
    if diffusion.schedule not in _SCHEDULES or diffusion.prediction not in _PREDICTIONS:
        raise UserError(
            f"config.diffusion is {diffusion.schedule} with prediction {diffusion.prediction}, which no pipeline of "
            "diffusers for this backbone samples with; --to=diffusers writes the backbone alone"
        )
    if sampler not in _CLASSES:
        raise UserError(
            f"config.sample.sampler is {sampler!r}, which diffusers has no scheduler for; set it to one of "
            f"{', '.join(_CLASSES)}, or write the backbone alone by --to=diffusers"
        )
    betas, start, end = _SCHEDULES[diffusion.schedule]
    spacing = "linspace" if sampler == "dpmpp_2m" else "leading"
    described: dict[str, Any] = {
        "_class_name": _CLASSES[sampler],
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "beta_schedule": betas,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": _PREDICTIONS[diffusion.prediction],
        "rescale_betas_zero_snr": bool(diffusion.zero_snr),
        "timestep_spacing": "trailing" if diffusion.zero_snr else spacing,
        "steps_offset": 1 if spacing == "leading" and not diffusion.zero_snr else 0,
    }
    if sampler == "ddim":
        described |= {"clip_sample": False, "set_alpha_to_one": False}
    if sampler == "heun":
        # It has none.
        described.pop("rescale_betas_zero_snr")
        if diffusion.zero_snr:
            raise UserError(
                "diffusers' HeunDiscreteScheduler has no zero terminal SNR; export with sampler ddim"
            )
    return described


def read(described: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `config.diffusion` that a scheduler means, and those of `config.sample`.

    Of a scheduler whose sampler we do not have, the second is empty.

    Raises:
      UserError: a noise schedule that we do not have.
    """
    found = _DEFAULTS | dict(described)
    if found.get("trained_betas") is not None or found.get("num_train_timesteps", 1000) != 1000:
        raise UserError(f"{where} has betas of its own, which no schedule here has")
    if found.get("use_flow_sigmas") or str(found.get("_class_name", "")).startswith("FlowMatch"):
        raise UserError(
            f"{where} is of rectified flow; import its backbone's folder with config.diffusion set"
        )
    for name, (betas, start, end) in _SCHEDULES.items():
        if found["beta_schedule"] == betas and (
            name == "cosine" or (found["beta_start"], found["beta_end"]) == (start, end)
        ):
            break
    else:
        betas = f"{found['beta_schedule']} from {found['beta_start']} to {found['beta_end']}"
        raise UserError(f"{where} has betas {betas}; schedules here are {', '.join(_SCHEDULES)}")
    kinds = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    if found["prediction_type"] not in kinds:
        raise UserError(
            f"{where} has prediction_type {found['prediction_type']!r}; {nearest(str(found['prediction_type']), kinds)}"
        )
    diffusion = {
        "schedule": name,
        "prediction": kinds[found["prediction_type"]],
        "zero_snr": bool(found.get("rescale_betas_zero_snr", False)),
    }
    sampler = _BY_CLASS.get(str(found.get("_class_name")))
    return diffusion, {} if sampler is None else {"sampler": sampler}

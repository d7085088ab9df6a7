"""Reference tensors of the published U-ViT and Large-DiT code (parameters, inputs, outputs, gradients)."""

import dataclasses
import functools
import json
import operator

import jax
import numpy as np

from scaling_dit import backbones, trees
from tests.support.paths import GOLDEN

NAMES = ("uvit_tiny", "uvit_tiny_noskip_timemlp")
LARGE_DIT_NAMES = ("large_dit_tiny", "large_dit_tiny_gqa")
_FIELDS = {
    "uvit": ("long_skips", "time_mlp", "final_conv"),
    "large_dit": ("kv_heads", "qk_norm", "learn_sigma"),
}


@dataclasses.dataclass(frozen=True)
class Golden:
    # Name of our backbone.
    family: str
    # Of our backbone.
    fields: dict
    # Upstream name -> array.
    params: dict
    grads: dict
    # Latents [B, H, W, C], timesteps, text, and text_mask of Large-DiT.
    inputs: tuple
    # [B, H, W, C].
    prediction: np.ndarray
    cotangent: np.ndarray
    grad_latents: np.ndarray

    def backbone(self, **fields):
        return backbones.create(self.family, **(self.fields | fields))


def load(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    config = json.loads(str(data["config"]))

    def nhwc(key):
        return data[key].transpose(0, 2, 3, 1)

    family = "large_dit" if name in LARGE_DIT_NAMES else "uvit"
    kept = ("in_channels", "hidden", "depth", "heads", "text_dim", *_FIELDS[family])
    fields = {key: config[key] for key in kept} | {"patch": config["patch_size"]}
    inputs = [nhwc("input/latents_nchw"), data["input/timesteps"], data["input/text"]]
    if "input/text_mask" in data:
        inputs.append(data["input/text_mask"])

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}

    return Golden(
        family=family,
        fields=fields,
        params=part("param/"),
        grads=part("grad/"),
        inputs=tuple(inputs),
        prediction=nhwc("output/prediction_nchw"),
        cotangent=nhwc("output/cotangent_nchw"),
        grad_latents=nhwc("output/grad_latents_nchw"),
    )


# Of initial values, whose distribution is looked at: it compiles in a fraction of the time of the default.
FAST_KEY = jax.random.key(0, impl="rbg")


def run(function, *args):
    """The function jitted and run once."""
    return jax.jit(function)(*args)


def initial(module, inputs, *names):
    """Initial values by name, of these parameters (paths with "/") alone: each that is made has to be compiled."""

    def init(key, *inputs):
        params = trees.unbox(module.init(key, *inputs))["params"]
        return {name: functools.reduce(operator.getitem, name.split("/"), params) for name in names}

    # Of numpy, for what a test asks of an array of jax is a program as well.
    return jax.device_get(run(init, FAST_KEY, *inputs))


def fill(abstract, seed=0):
    """Random arrays for a tree of shapes, boxes of axis names kept: quicker than compiling an `init`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), abstract)


def relative_error(found, wanted) -> float:
    """Largest difference over the largest value of the reference."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())

"""torch-fidelity as the reference of feature distances and of Inception.

The package imports torchvision for its data sets, and for two functions that tests need. A module with these stands in
for it while the package is imported, because torchvision need not be installed, nor fit torch's build.
"""

import contextlib
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from scaling_dit.evaluation.features import sharded
from tests.support import references

_NEEDED = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Compose:
    """Functions one after the other."""

    def __init__(self, functions: list[Callable[[Any], Any]]) -> None:
        self._functions = functions

    def __call__(self, value: Any) -> Any:
        for function in self._functions:
            value = function(value)
        return value


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Puts a module in place of torchvision."""
    kept = {name: sys.modules.get(name) for name in _NEEDED}
    for name in _NEEDED:
        module = types.ModuleType(name)
        module.__path__ = []
        if name == "torchvision.datasets":
            module.CIFAR10 = module.CIFAR100 = module.STL10 = object
        sys.modules[name] = module
    transforms, functional = (sys.modules[name] for name in _NEEDED[2:])
    sys.modules["torchvision"].transforms, transforms.functional = transforms, functional
    transforms.Compose = _Compose
    functional.pil_to_tensor = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)
    try:
        yield
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


references.look()
with _without_torchvision():
    from torch_fidelity import calculate_metrics, metric_fid, metric_kid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as tensorflow1,
    )

__all__ = ["fid", "inception", "kid", "mind", "of_folders", "tensorflow1"]

SEED = 2020


def fid(one: np.ndarray, other: np.ndarray) -> float:
    """FID of features, computed in float64 as for doubles."""
    stats = [
        metric_fid.fid_features_to_statistics(torch.tensor(x, dtype=torch.float64)) for x in (one, other)
    ]
    return metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def kid(one: np.ndarray, other: np.ndarray, *, subsets: int, size: int) -> tuple[float, float]:
    """(mean, standard deviation) of KID in the features' type."""
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    found = metric_kid.kid_features_to_metric(torch.tensor(one), torch.tensor(other), **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def mind(one: np.ndarray, other: np.ndarray, *, directions: int) -> float:
    """MIND as arXiv 2605.06797 defines it, with the choices of torch-fidelity's: its subsets, then its directions."""
    generator = torch.Generator().manual_seed(SEED)
    count = min(len(one), len(other))
    sets = []
    for x in (one, other):
        chosen = (
            torch.randperm(len(x), generator=generator)[:count] if len(x) > count else torch.arange(count)
        )
        sets.append(torch.tensor(x)[chosen].double())
    units = torch.nn.functional.normalize(torch.randn(directions, one.shape[1], generator=generator), dim=1)
    one_sorted, other_sorted = (torch.sort(x @ units.double().T, dim=0).values for x in sets)
    return 3 * one.shape[1] * float(((one_sorted - other_sorted) ** 2).mean())


def of_folders(
    one: pathlib.Path, other: pathlib.Path, weights: pathlib.Path, **options: Any
) -> dict[str, float]:
    """FID and KID of the images in two folders, as its command computes them with these weights (.pth)."""
    fixed = {"cuda": False, "fid": True, "kid": True, "cache": False, "verbose": False, "save_cpu_ram": True}
    fixed |= {"feature_extractor_weights_path": str(weights), "batch_size": 8}
    return calculate_metrics(input1=str(one), input2=str(other), **fixed, **options)


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    """Until the patch ends, networks run on one device: each of eight would compute at least one image."""
    patch.setattr(sharded, "_mesh", lambda: jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("rows",)))


def inception(folder: pathlib.Path, seed: int = 0) -> FeatureExtractorInceptionV3:
    """Its Inception with random weights that keep values in range; `folder`/inception.pth holds them."""
    path = folder / "inception.pth"
    # Only its constructor names the entries; a file that exists is not downloaded.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        original, torch.load = torch.load, lambda *args, **options: None
        keep = FeatureExtractorInceptionV3.load_state_dict
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        try:
            model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        finally:
            torch.load, FeatureExtractorInceptionV3.load_state_dict = original, keep
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.weight, 1.0, 0.1)
                torch.nn.init.normal_(module.bias, 0.0, 0.1)
                torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
                torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    torch.save(model.state_dict(), path)
    return model

"""Controlled scaling studies of text-to-image diffusion backbones.

The public API is what `__all__` lists; everything else may move. Each name is loaded on first use, so that
`import scaling_dit` costs nothing.

    train(config, workdir) -> TrainState      trains, or resumes, a run
    load(workdir, step, ema) -> Pipeline      opens a trained run to sample from it
    study(spec, workdir) -> Study             runs, or resumes, all members of a study
    create(name, **fields) -> nn.Module       makes a backbone
    count(backbone, ...)                      parameters, multiply-accumulates and training FLOPs of a backbone
    interop                                   weights in and out under upstream names
"""

import importlib
from typing import TYPE_CHECKING, Any

from scaling_dit._version import __version__ as __version__

if TYPE_CHECKING:
    from scaling_dit import interop as interop
    from scaling_dit.backbones import create as create
    from scaling_dit.costs.count import count as count
    from scaling_dit.sampling.pipeline import load as load
    from scaling_dit.scaling.study import study as study
    from scaling_dit.training.loop import train as train

__all__ = ["__version__", "count", "create", "interop", "load", "study", "train"]

# Public name -> (module, attribute, or None for the module itself).
_LAZY = {
    "count": ("scaling_dit.costs.count", "count"),
    "create": ("scaling_dit.backbones", "create"),
    "interop": ("scaling_dit.interop", None),
    "load": ("scaling_dit.sampling.pipeline", "load"),
    "study": ("scaling_dit.scaling.study", "study"),
    "train": ("scaling_dit.training.loop", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""Controlled scaling studies of text-to-image diffusion backbones.

The public API is what `__all__` lists; everything else may move. Each name is loaded on first use, so that
`import scaling_dit` costs nothing.

    train(config, workdir) -> TrainState      trains, or resumes, a run
    load(workdir, step, ema) -> Pipeline      opens a trained run to sample from it
    create(name, **fields) -> nn.Module       makes a backbone
    count(backbone, ...)                      parameters, multiply-accumulates and training FLOPs of a backbone
    interop                                   weights in and out under upstream names
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_dit import interop as interop
    from scaling_dit.backbones import create as create
    from scaling_dit.model.model import load as load
    from scaling_dit.costs.count import count as count
    from scaling_dit.training.loop import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "count", "create", "interop", "load", "train"]

_LAZY = {  # public name -> (module, attribute, or None for the module itself)
    "count": ("scaling_dit.costs.count", "count"),
    "create": ("scaling_dit.backbones", "create"),
    "interop": ("scaling_dit.interop", None),
    "load": ("scaling_dit.model.model", "load"),
    "train": ("scaling_dit.train", None),  # a callable module, see below
}


class _CallableTrain(types.ModuleType):
    """The module `scaling_dit.train`, which calls its function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["train"](*args, **kwargs)


class _Package(types.ModuleType):
    """This package, whose `train` is both a public function and the module that holds it.

    Importing that module anywhere binds it here, whatever was bound before. So the module answers the call:
    `scaling_dit.train` is one object in every order of imports, `scaling_dit.train(config, workdir)` works, and
    so does `scaling_dit.train.main`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, types.ModuleType):
            value.__class__ = _CallableTrain
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


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

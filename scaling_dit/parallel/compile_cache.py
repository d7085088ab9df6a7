"""Keeps compiled programs on disk, so that a restarted run compiles nothing."""

import os
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from scaling_dit.files import expand

IN_WORKDIR = "workdir"


def use(place: str, own: epath.PathLike) -> None:
    """Makes jax keep compiled programs in a folder. Call it before the first compilation.

    jax reuses a program if the program, its options, the version of jax, and the kind and layout of devices are the
    same. A cache folder that is already set, for example by JAX_COMPILATION_CACHE_DIR, is left alone.

    Args:
      place: `config.compile_cache`: "" for none, "workdir" for a folder in the workdir, else a folder, local or gs://.
      own: the folder in the workdir.
    """
    settings: Any = jax.config
    if not place or settings.jax_compilation_cache_dir:
        return
    folder = epath.Path(own if place == IN_WORKDIR else expand(place))
    # jax may have decided already that there is no cache.
    compilation_cache.reset_cache()
    settings.update("jax_compilation_cache_dir", os.fspath(folder))
    # Keep programs that compile fast as well: a start has hundreds of them.
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings.update("jax_persistent_cache_min_entry_size_bytes", -1)

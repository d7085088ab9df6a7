"""The `sample` verb: images of prompts with a trained run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.sampling.folder import GRID, sample_to_folder
from scaling_dit.sampling.options import tag
from scaling_dit.sampling.pipeline import open_for_sampling
from scaling_dit.sampling.prompts import Prompt


def sample_prompts(
    workdir: str,
    prompts: Sequence[Prompt],
    out: str | None = None,
    *,
    num: int = 1,
    seed: int = 0,
    step: int | None = None,
    ema: str | None = None,
    changes: Mapping[str, Any] | None = None,
    own_code: bool = False,
) -> int:
    """Writes images, grid and manifest of (id, prompt) pairs; returns the exit code.

    Args:
      out: folder to write to. By default one of this request under `samples/` in the workdir: the same request again
        adds what is missing there, another one gets its own.
      num: images of each prompt.
      step, ema: as in `pipeline.open_for_sampling`.
      changes: options of sampling in place of those of the run's `config.sample`.
      own_code: as in `workdir.read_config`.
    """
    config = read_config(workdir, own_code=own_code)
    pipe, sampler, about = open_for_sampling(config, workdir, changes or {}, step=step, ema=ema)
    items = [(id_ if num == 1 else f"{id_}-{k}", prompt) for id_, prompt in prompts for k in range(num)]
    asked = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]
    folder = epath.Path(out) if out else Workdir(workdir).samples / f"{tag(about, seed)}-{asked}"
    sample_to_folder(sampler, pipe, items, folder, seed=seed, about=about)
    settings = ", ".join(f"{name} {value}" for name, value in about.items())
    print(f"{len(items)} images in {folder} ({settings}); all on one page: {folder / GRID}")
    return 0

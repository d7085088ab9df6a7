"""The `sample` verb: images of prompts with a trained run."""

import hashlib
import json
from collections.abc import Sequence

from etils import epath

from scaling_dit.sampling.folder import GRID, sample_to_folder, tag
from scaling_dit.sampling.pipeline import open_for_sampling


def sample_prompts(
    workdir: str,
    prompts: Sequence[tuple[str, str]],
    out: str | None = None,
    *,
    num: int = 1,
    seed: int = 0,
    step: int | None = None,
    ema: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_rescale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    batch: int | None = None,
) -> int:
    """The `sample` verb: pictures, grid and manifest of (id, prompt) pairs; returns the exit code.

    Without `out` they go to a folder of this request under `samples/` in the workdir: the same request again adds what
    is missing there, another one gets its own.
    """
    pipe, chosen, about = open_for_sampling(
        workdir, step=step, ema=ema, sampler=sampler, steps=steps, guidance=guidance,
        guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, batch=batch,
    )  # fmt: skip
    items = [(id_ if num == 1 else f"{id_}-{k}", prompt) for id_, prompt in prompts for k in range(num)]
    asked = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]
    folder = epath.Path(out) if out else epath.Path(workdir) / "samples" / f"{tag(about, seed)}-{asked}"
    sample_to_folder(chosen, pipe, items, folder, seed=seed, about=about)
    settings = ", ".join(f"{name} {value}" for name, value in about.items())
    print(f"{len(items)} pictures in {folder} ({settings}); all on one page: {folder / GRID}")
    return 0

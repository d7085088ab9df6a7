"""Images of prompts with a trained run: every guidance with every seed, each in a folder of its own."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.model.model import Model
from scaling_dit.sampling.folder import GRID, Images, Inputs, sample_to_folder
from scaling_dit.sampling.given import Given, check_name
from scaling_dit.sampling.options import SamplingOptions, tag
from scaling_dit.sampling.pipeline import open_for_sampling
from scaling_dit.sampling.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class OwnConditions:
    """The image conditions of prompts that have some each.

    Attributes:
      names: of the conditions.
      read: numbers of prompts and the side of an image in pixels -> name -> uint8 [N, side, side, 3 + masks].
      sha256: of all of them.
    """

    names: Sequence[str]
    read: Callable[[list[int], int], Mapping[str, Any]]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the `sample` verb samples with.

    Attributes:
      workdir: of the run.
      out: folder to write to. By default one of this request under `samples/` in the workdir: the same request again
        adds what is missing there, another one gets its own. With several guidances or seeds, a folder for each in it.
      num: images of each prompt.
      seed, guidance: of each folder; no guidance is the run's.
      step, ema: as in `pipeline.open_for_sampling`.
      store: how images are kept; see `shards`.
      condition: images that the backbone reads beside every prompt, NAME:FILE or NAME:IMAGE,MASK each.
      image: file of an image to start from.
      changes: options of sampling in place of those of the run's `config.sample`.
      own_code: as in `workdir.read_config`.
    """

    workdir: str
    out: str | None = None
    num: int = 1
    seed: Sequence[int] = (0,)
    guidance: Sequence[float] = ()
    step: int | None = None
    ema: str | None = None
    store: str = ""
    condition: Sequence[str] = ()
    image: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_code: bool = False

    def items(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """(id, prompt) of each image: ID, or ID-0, ID-1, ... where each prompt has several."""
        if self.num == 1:
            return list(prompts)
        return [(f"{id_}-{k}", prompt) for id_, prompt in prompts for k in range(self.num)]

    def run(self, prompts: Sequence[Prompt], own: OwnConditions | None = None) -> Iterator[Images]:
        """Writes images, grid and manifest of each setting.

        Args:
          own: the conditions of each prompt, in place of `condition`.

        Raises:
          UserError: as `pipeline.open_for_sampling` and `folder.sample_to_folder`.
        """
        config = read_config(self.workdir, own_code=self.own_code)
        # Before weights are read.
        for given in self.guidance:
            SamplingOptions.of(config.sample, **{**self.changes, "guidance": given})
        pipe, _, _ = open_for_sampling(config, self.workdir, self.changes, step=self.step, ema=self.ema)
        items = self.items(prompts)
        images_given = Given.read(pipe.model, self.condition, self.image)
        given_about = images_given.about()
        inputs: Inputs = images_given.rows
        if own:
            for name in own.names:
                check_name(name, pipe.model)
            given_about, inputs = (
                given_about | {"conditions": own.sha256},
                self._with_own(own, inputs, pipe.model),
            )
        request = [items, given_about] if given_about else items
        asked = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]
        scales: Sequence[float | None] = tuple(self.guidance) or (None,)
        several = len(scales) * len(self.seed) > 1
        for scale in scales:
            sampler = pipe.sampler(**{**self.changes, **({} if scale is None else {"guidance": scale})})
            images_given.check(sampler.options, pipe.model, own.names if own else ())
            about = {"step": pipe.step, "ema": pipe.ema or "none", **sampler.options.about}
            for seed in self.seed:
                name = f"{tag(about, seed)}-{asked}"
                if self.out:
                    folder = epath.Path(self.out) / name if several else epath.Path(self.out)
                else:
                    folder = Workdir(self.workdir).samples / name
                images = sample_to_folder(
                    sampler, pipe, items, folder,
                    seed=seed, about=about | given_about, store=self.store, inputs=inputs,
                )  # fmt: skip
                if jax.process_index() == 0:
                    settings = ", ".join(f"{name} {value}" for name, value in about.items())
                    print(f"{len(items)} images in {folder} ({settings}); all on one page: {folder / GRID}")
                yield images

    def _with_own(self, own: OwnConditions, inputs: Inputs, model: Model) -> Inputs:
        """What gives the sampler's inputs of some images, with the conditions of their prompts."""

        def give(numbers: Sequence[int]) -> dict[str, Any]:
            conditions = own.read([number // self.num for number in numbers], model.image_size)
            return {**inputs(numbers), "conditions": conditions}

        return give

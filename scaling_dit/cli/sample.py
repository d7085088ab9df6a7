"""The verbs that sample from a trained run: `sample` and `evaluate`."""

import dataclasses
from typing import Any

from scaling_dit.cli.options import changes, flag, group
from scaling_dit.cli.verb import Verb, json_flag, own_code_flag
from scaling_dit.diffusion.sampling_fields import SamplingFields
from scaling_dit.fields import FROM_0, MANY, SEED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The flags that say what is sampled from: seed, checkpoint, weights, and whether code of the run may run."""

    seed: int = flag("seed of the initial noise", 0, SEED)
    step: int | None = flag("checkpoint to use; the latest by default", None, FROM_0)
    ema: str | None = flag(
        "weights to sample with: an EMA decay or power-WIDTH, none for the raw ones; config.sample.ema by default"
    )
    own_code: bool = own_code_flag()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Generates images of prompts with a trained run."""

    EXAMPLE = "scaling-dit sample --workdir=runs/shapes 'a red circle left of a blue square'"
    ARGUMENTS = "[PROMPT ...]"

    workdir: str = flag("folder of the trained run", required=True, path=True)
    request: Request = group(Request)
    options: dict[str, Any] = changes(SamplingFields)
    prompt: tuple[str, ...] = flag("a prompt; repeat it, or give prompts as arguments", (), repeat=True)
    prompts_file: str | None = flag("file of prompts: one a line, or .jsonl with id and prompt", path=True)
    out: str | None = flag(
        "folder to write to; by default one named after this request, under WORKDIR/samples", path=True
    )
    num: int = flag("images of each prompt", 1, MANY)

    def run(self) -> int:
        """Writes the images, a page of them and their manifest."""
        from scaling_dit.sampling.prompts import gather_prompts

        prompts = gather_prompts([*self.prompt, *self.arguments], self.prompts_file)

        from scaling_dit.sampling.sample import sample_prompts

        request = dataclasses.asdict(self.request)
        return sample_prompts(self.workdir, prompts, self.out, num=self.num, changes=self.options, **request)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Scores a trained run on held-out prompts."""

    EXAMPLE = "scaling-dit evaluate --workdir=runs/shapes --items=500"

    workdir: str = flag("folder of the trained run", required=True, path=True)
    request: Request = group(Request)
    options: dict[str, Any] = changes(SamplingFields)
    metrics: tuple[str, ...] | None = flag("comma-separated metrics; the run's by default")
    items: int = flag("held-out prompts", 500, MANY)
    out: str | None = flag(
        "folder to write to; by default one named after the settings, under WORKDIR/evaluation", path=True
    )
    json: bool = json_flag()

    def run(self) -> int:
        """Samples the prompts of each metric, scores the images and writes the results."""
        from scaling_dit.evaluation import run

        return run.main(
            self.workdir,
            self.out,
            metrics=self.metrics,
            items=self.items,
            as_json=self.json,
            changes=self.options,
            **dataclasses.asdict(self.request),
        )

"""The verbs that sample from a trained run: `sample` and `evaluate`."""

import dataclasses
from typing import Any, Literal

from scaling_dit.cli.options import changes, flag, group
from scaling_dit.cli.train import Processes
from scaling_dit.cli.verb import Verb, json_flag, own_code_flag, trust_if
from scaling_dit.diffusion.sampling_fields import SamplingFields
from scaling_dit.errors import UserError
from scaling_dit.fields import FROM_0, MANY, SEED, Rule, each

_PROMPT_SET = "published prompts, NAME:PATH, such as tifa:FOLDER; docs/evaluation.md lists them"
_GRID = ("guidance",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The flags that say what is sampled from: seeds, checkpoint and weights, and how images are kept."""

    seed: tuple[int, ...] = flag("seed of the initial noise; one or several", (0,), each(SEED))
    step: int | None = flag("checkpoint to use; the latest by default", None, FROM_0)
    ema: str | None = flag(
        "weights to sample with: an EMA decay or power-WIDTH, none for the raw ones; config.sample.ema by default"
    )
    store: Literal["png", "tar", "array_record"] | None = flag(
        "how images are kept: a file for each, or shards of 256; by default png, and tar in remote folders"
    )
    own_code: bool = own_code_flag()

    def settings(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self) | {"store": self.store or ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Generates images of prompts with a trained run."""

    EXAMPLE = "scaling-dit sample --workdir=runs/shapes 'a red circle left of a blue square'"
    ARGUMENTS = "[PROMPT ...]"

    workdir: str = flag("folder of the trained run", required=True, path=True)
    request: Request = group(Request)
    options: dict[str, Any] = changes(SamplingFields, several=_GRID)
    prompt: tuple[str, ...] = flag(
        "a prompt; repeat it, or give prompts as arguments", (), repeat=True, empty=True
    )
    prompts_file: str | None = flag("file of prompts: one a line, or .jsonl with id and prompt", path=True)
    prompt_set: str | None = flag(_PROMPT_SET)
    condition: tuple[str, ...] = flag(
        "NAME:FILE or NAME:IMAGE,MASK, an image that the run reads beside every prompt; repeat it",
        (),
        repeat=True,
    )
    image: str | None = flag("image to start from, with --strength below 1", path=True)
    out: str | None = flag(
        "folder to write to; by default one named after this request, under WORKDIR/samples", path=True
    )
    num: int = flag("images of each prompt", 1, MANY)
    layout: (
        Literal["tifa", "hpsv2", "image_reward", "geneval", "dpg", "compbench", "brushbench", "editbench"]
        | None
    ) = flag("also write the images as an official tool reads them")
    processes: Processes = group(Processes)

    def run(self) -> int:
        """Writes the images, a page of them and their manifest."""
        return self.processes.run_together(self._sample, self._settings, self.command)

    def _settings(self) -> Any:
        from scaling_dit.checkpoints.workdir import read_config

        return read_config(self.workdir, own_code=self.request.own_code).processes

    def _sample(self) -> int:
        from scaling_dit.evaluation.export import sample_prompts

        options = dict(self.options)
        return sample_prompts(
            self.workdir,
            [*self.prompt, *self.arguments],
            self.prompts_file,
            self.prompt_set,
            self.out,
            num=self.num,
            layout=self.layout,
            condition=self.condition,
            image=self.image,
            guidance=options.pop("guidance", ()),
            changes=options,
            **self.request.settings(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging:
    """The flags of metrics that ask a judge; for every metric of the command that has such a field."""

    judge: str | None = flag("who answers questions: transformers:FOLDER, openai:URL or package.module:Name")
    judge_option: tuple[str, ...] = flag("FIELD=VALUE of the judge; repeat it", (), repeat=True)
    second_judge: str | None = flag("answers the same questions, for the agreement of both")
    second_option: tuple[str, ...] = flag("FIELD=VALUE of the second judge; repeat it", (), repeat=True)
    prompt_set: str | None = flag(_PROMPT_SET)
    prompt_transform: str | None = flag(
        "what is done to prompts: none, repeat:N or rewrite:FILE.jsonl; none by default"
    )

    def fields(self) -> dict[str, Any]:
        """Fields of metrics by name; those that were not given are left out."""
        found = {
            "judge": self.judge,
            "judge_options": self.judge_option,
            "second_judge": self.second_judge,
            "second_options": self.second_option,
            "prompt_set": self.prompt_set,
            "prompt_transform": self.prompt_transform,
        }
        return {name: value for name, value in found.items() if value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Scores a run on held-out or published prompts, or compares scored runs."""

    EXAMPLE = "scaling-dit evaluate --workdir=runs/shapes --items=500"
    ARGUMENTS = "[RUN ...]"
    OVERRIDES = True

    workdir: str | None = flag("folder of the trained run", path=True)
    request: Request = group(Request)
    options: dict[str, Any] = changes(SamplingFields, several=_GRID)
    metrics: tuple[str, ...] | None = flag("comma-separated metrics; the run's by default")
    items: int | None = flag("prompts; by default 500 held-out ones, and all of a published set", None, MANY)
    judging: Judging = group(Judging)
    images: str | None = flag(
        "folder of images to score in place of sampling; --workdir is then not needed", path=True
    )
    reference: str | None = flag(
        "real images for fid, kid, mind, cmmd, fd_dinov2: their statistics, or a folder of images or a source of which "
        "they are built once; by default the real images of the prompts"
    )
    out: str | None = flag("folder to write to; by default WORKDIR/evaluation", path=True)
    watch: float = flag(
        "look for new checkpoints of a running job every so many seconds; 0 = evaluate one",
        0.0,
        Rule("0 or more", FROM_0.fits),
    )
    compare: bool = flag("compare the results of the RUNs prompt by prompt, the others with the first", False)
    json: bool = json_flag()
    processes: Processes = group(Processes)

    def run(self) -> int:
        """Samples the prompts of each metric, scores the images and writes the results."""
        if self.compare:
            from scaling_dit.evaluation import compare

            trust_if(self.request.own_code)
            return compare.main(self.arguments, metrics=self.metrics, as_json=self.json)
        if self.arguments:
            raise UserError(f"evaluate takes {self.arguments[0]!r} with --compare only")
        if not self.images:
            self.check_given({"workdir": self.workdir})
        return self.processes.run_together(self._evaluate, self._settings, self.command)

    def _settings(self) -> Any:
        from scaling_dit import config
        from scaling_dit.checkpoints.workdir import read_config

        return (
            read_config(self.workdir, own_code=self.request.own_code) if self.workdir else config.defaults()
        ).processes

    def _evaluate(self) -> int:
        from scaling_dit.evaluation import run

        options = dict(self.options)
        return run.main(
            self.workdir or "",
            self.out,
            metrics=self.metrics,
            items=self.items,
            images=self.images or "",
            reference=self.reference or "",
            as_json=self.json,
            watch=self.watch,
            guidance=options.pop("guidance", ()),
            changes=options,
            overrides=self.overrides,
            shared=self.judging.fields(),
            **self.request.settings(),
        )

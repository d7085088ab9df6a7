"""The `evaluate` verb: images of the prompts of each metric, sampled with a trained run or given, scored and reported.

Metrics with the same prompts share images. Each process of several makes and scores its part of them.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError, printable
from scaling_dit.evaluation import conditioned, sweep
from scaling_dit.evaluation.features.set_metric import compared_with
from scaling_dit.evaluation.given import GivenImages, image_size
from scaling_dit.evaluation.jobs import Job, grouped, open_jobs
from scaling_dit.evaluation.jobs import as_json as plain_fields
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.registry import Chosen, choose
from scaling_dit.evaluation.request import Request, config_of
from scaling_dit.evaluation.results import (
    DONE,
    RESULT,
    ROWS,
    SKIPPED,
    Read,
    Results,
    Target,
    score_to_folders,
    write_curves,
)
from scaling_dit.model.build import open_source
from scaling_dit.sampling.folder import GRID, sample_to_folder
from scaling_dit.sampling.options import tag
from scaling_dit.sampling.pipeline import open_for_sampling
from scaling_dit.sampling.shards import PNG

# Exit code of an evaluation without some metric, image or answer.
INCOMPLETE = 5


@dataclasses.dataclass
class Outcome:
    """What became of an evaluation.

    Attributes:
      results: results by metric, one for each setting.
      incomplete: whether a metric, an image or an answer is missing.
    """

    results: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    incomplete: bool = False


def main(
    workdir: str = "", out: str | None = None, *, as_json: bool = False, watch: float = 0, **asked: Any
) -> int:
    """Scores a run, or given images, by each metric; returns the exit code, `INCOMPLETE` if something is missing.

    Args:
      as_json: print the results as JSON in place of tables.
      watch: evaluate each checkpoint of a running job as it appears, looking every so many seconds; 0 = one checkpoint.
      asked: the other fields of `Request`.

    Raises:
      UserError: no run, an unknown metric, or a metric that does not fit the run's data.
    """
    if isinstance(asked.get("seed"), int):
        asked["seed"] = (asked["seed"],)
    request = Request(workdir=workdir, out=out, **asked)
    if watch:
        return _watch(request, watch, as_json)
    return _report(evaluate(request, quiet=as_json), as_json)


def evaluate(request: Request, *, quiet: bool = False) -> Outcome:
    """Does the work of `main` for one checkpoint, or for given images."""
    config = config_of(request)
    answers = request.root / "answers"
    chosen = choose(config, config.eval.metrics)
    if request.reference:
        chosen = _compared_with(chosen, request, config)
    jobs, skipped = open_jobs(config, chosen, request.items, answers)
    outcome = Outcome(incomplete=bool(skipped))
    results = Results(request.root)
    for name, why in skipped.items():
        _say_skipped(results, name, why, request)
    if not jobs:
        return outcome
    settings = _given(request) if request.images else _sampled(request, config)
    for root, head, images_of in settings:
        rows = []
        for group in grouped(jobs):
            for job, row in _score(group, root, head, images_of):
                if isinstance(row, Skipped):
                    outcome.incomplete = True
                    _say_skipped(results, job.one.name, str(row), request)
                    continue
                # For `compare`, which then needs no class of a user's own.
                written = {"status": DONE, "lower_is_better": job.one.lower_is_better, **row}
                results.add(written, root / job.one.folder)
                outcome.incomplete |= bool(row["left_out"] or row.get("unanswered"))
                rows.append(row)
                outcome.results.setdefault(job.one.name, []).append(row)
                if not quiet:
                    _print(job, row, root)
        if request.workdir and not request.images:
            name = tag(head, head["seed"]).partition("-")[2]
            scalars = {key: value for row in rows for key, value in row["scalars"].items()}
            folder = Workdir(request.workdir).tensorboard / f"evaluate-{name}"
            write_curves(folder, head["step"], scalars, config.log.tensorboard)
    every = [row for some in outcome.results.values() for row in some]
    if (
        not quiet
        and jax.process_index() == 0
        and not request.images
        and len({(row["guidance"], row["seed"]) for row in every}) > 1
    ):
        lower = {job.one.name: job.one.lower_is_better for job in jobs}
        print(sweep.table(sweep.summarize(every, lower)))
    return outcome


def _compared_with(chosen: list[Chosen], request: Request, config: ConfigDict) -> list[Chosen]:
    """The metrics with the real images that they compare with; processes build their statistics together, if any."""
    size = open_source(config).image_size if request.workdir else image_size(request.images)
    root = Workdir(request.workdir).evaluation if request.workdir else request.root
    return compared_with(chosen, request.reference, size, root / "references")


@dataclasses.dataclass(frozen=True)
class Shown:
    """The images of a job.

    Attributes:
      numbers: of the items that have an image; None for all.
      read: gives the images of some of these items, by their numbers among them.
      paths: id -> file, from the metric's folder, where images are files.
      faults: id -> why its image is left out.
    """

    numbers: Sequence[int] | None
    read: Read
    paths: Mapping[str, str]
    faults: Mapping[str, str]


# A folder for results, what they are about, and what gives the images of a job.
Setting = tuple[epath.Path, dict[str, Any], Callable[[Job], Shown]]


def _sampled(request: Request, config: ConfigDict) -> Iterator[Setting]:
    """Every guidance with every seed, with what samples the images of a job."""
    changes = dict(request.changes)
    pipe, _, _ = open_for_sampling(config, request.workdir, changes, step=request.step, ema=request.ema)
    scales: Sequence[float | None] = tuple(request.guidance) or (None,)
    several = request.apart or len(scales) * len(request.seed) > 1
    for scale in scales:
        sampler = pipe.sampler(**changes, **({} if scale is None else {"guidance": scale}))
        about = {"step": pipe.step, "ema": pipe.ema or "none", **sampler.options.about}
        for seed in request.seed:
            name = f"{tag(about, seed)}{f'-n{request.items}' if request.items else ''}"
            root = request.root if request.out and not several else request.root / name
            head = {"workdir": request.workdir, "training_seed": config.seed, "seed": seed, **about}

            def images_of(
                job: Job,
                root: epath.Path = root,
                sampler: Any = sampler,
                seed: int = seed,
                about: Any = about,
            ) -> Shown:
                folder = root / f"images-{job.prompts_hash[:8]}"
                conditioned.check(job.items, config.conditioning.names, job.one.section)
                conditioned.check_options(job.items, sampler)
                asked = {"conditions": job.conditions_hash} if job.conditions_hash else {}

                def inputs(numbers: Sequence[int]) -> dict[str, Any]:
                    items = [job.items[i] for i in numbers]
                    return {"conditions": conditioned.stack(items, sampler.model.image_size)}

                made = sample_to_folder(
                    sampler, pipe, job.prompts, folder, seed=seed, about={**about, **asked},
                    store=request.store, inputs=inputs if asked else None,
                )  # fmt: skip
                paths = {row["id"]: f"../{folder.name}/{row['path']}" for row in made.rows}
                batch = job.one.fields["batch"]
                files = paths if made.store == PNG else {}
                return Shown(None, lambda numbers: made.read(numbers, batch), files, {})

            yield root, head, images_of


def _given(request: Request) -> Iterator[Setting]:
    """The images of a folder."""

    def images_of(job: Job) -> Shown:
        found = GivenImages(request.images, job.items)
        kept = [job.items[number].id for number in found.sound]
        paths = {key: str(found.folder.resolve() / found.path(key)) for key in kept}
        return Shown(found.sound, found.read, paths, found.faults)

    yield (
        request.root,
        {"workdir": request.workdir, "images": request.images, "seed": request.seed[0]},
        images_of,
    )


def _score(
    jobs: Sequence[Job], root: epath.Path, head: Mapping[str, Any], images_of: Callable[[Job], Shown]
) -> Iterator[tuple[Job, dict[str, Any] | Skipped]]:
    """The results of metrics of the same images in one setting, each written to its folder, or why one is skipped."""
    try:
        shown = images_of(jobs[0])
    except Skipped as missing:
        yield from ((job, missing) for job in jobs)
        return
    targets = []
    for job in jobs:
        scoring = job.scoring(shown.numbers)
        about = {"metric": job.one.name, **head, "n": len(scoring.items), **job.about}
        about |= {"prompts_sha256": job.prompts_hash, "left_out": dict(shown.faults)}
        targets.append(Target(scoring, root / job.one.folder, about, shown.paths))
    yield from zip(jobs, score_to_folders(targets, shown.read, head["seed"]), strict=True)


def _print(job: Job, row: Mapping[str, Any], root: epath.Path) -> None:
    if jax.process_index() != 0:
        return
    of = row.get("images") or row["workdir"]
    names = (
        "step",
        "ema",
        "sampler",
        "steps",
        "guidance",
        "guidance_method",
        "guidance_rescale",
        "guidance_interval",
    )
    settings = "".join(f", {name} {row[name]}" for name in names if name in row)
    folder = root / job.one.folder
    print(f"{job.one.name} of {of}: n {row['n']}, seed {row['seed']}{settings}")
    print(printable(job.one.metric.table(dict(row)), keep="\n"))
    if row["left_out"]:
        print(f"images left out: {len(row['left_out'])}, such as {next(iter(row['left_out'].items()))}")
    page = f"images: {root / f'images-{job.prompts_hash[:8]}' / GRID}\n" if "images" not in row else ""
    print(f"{page}scores of each: {folder / ROWS}\nresult: {folder / RESULT}")


def _say_skipped(results: Results, name: str, why: str, request: Request) -> None:
    if jax.process_index() == 0:
        print(f"{name}: skipped: {why}", file=sys.stderr)
    row = {"status": SKIPPED, "metric": name, "workdir": request.workdir, "step": request.step, "reason": why}
    results.add(row)


def _report(outcome: Outcome, as_json: bool) -> int:
    if as_json and jax.process_index() == 0:
        # One result of each metric as it is, several as a list.
        found = {name: rows[0] if len(rows) == 1 else rows for name, rows in outcome.results.items()}
        print(json.dumps(found))
    return INCOMPLETE if outcome.incomplete else 0


def _watch(request: Request, pause: float, as_json: bool) -> int:
    """Evaluates each checkpoint of a running job, until that of its last step is done."""
    if request.step is not None or request.images:
        raise UserError("evaluate --watch evaluates every checkpoint; leave out --step and --images")
    incomplete = False
    tried: set[int] = set()
    while True:
        config = config_of(request)
        with Checkpoints(Workdir(request.workdir).checkpoints, read_only=True) as store:
            steps = store.all_steps()
        done = tried | _evaluated(request, config)
        missing = [step for step in steps if step not in done]
        for step in missing:
            tried.add(step)
            try:
                outcome = evaluate(dataclasses.replace(request, step=step, apart=True), quiet=as_json)
            except UserError:
                with Checkpoints(Workdir(request.workdir).checkpoints, read_only=True) as store:
                    # Training removes old checkpoints meanwhile.
                    if not store.is_gone(step):
                        raise
                continue
            incomplete |= outcome.incomplete
            _report(outcome, as_json)
        if config.steps in steps:
            return INCOMPLETE if incomplete else 0
        if not missing:
            time.sleep(pause)


def _evaluated(request: Request, config: ConfigDict) -> set[int]:
    """The steps that have a result of each metric, with these fields, in every setting."""
    wanted = {one.name: plain_fields(one.fields) for one in choose(config, config.eval.metrics)}
    settings = max(1, len(request.guidance)) * len(request.seed)
    found: dict[int, dict[str, set[Any]]] = {}
    for row in Results(request.root).read():
        name = row["metric"]
        if row["status"] == DONE and row.get("fields") == wanted.get(name):
            by_metric = found.setdefault(row["step"], {})
            by_metric.setdefault(name, set()).add((row["guidance"], row["seed"]))
    return {
        step
        for step, by_metric in found.items()
        if all(len(by_metric.get(name, ())) >= settings for name in wanted)
    }

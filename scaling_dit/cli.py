"""The command line: takes the verb, reads its flags, calls the function that does the work. No logic.

Every mistake of a user ends as one line on stderr and exit code 2. Heavy modules are imported only once the flags
are right.
"""

import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from scaling_dit import cli_data
from scaling_dit._version import __version__
from scaling_dit.errors import UserError, nearest

PROGRAM = "scaling-dit"
USER_ERROR, INTERRUPTED = UserError.exit_code, 130  # exit codes; a verb returns its own, see `train.main`
_OVERRIDES_HELP = (
    "any field of the config, for example --config.optim.learning_rate=1e-3 --config.backbone.name=uvit"
)


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: what `--help` says, its flags and what it calls.

    `run(flags, arguments, overrides)` gets the parsed flags, the positional arguments and the `--config.key=value`
    ones, and returns the exit code.
    """

    summary: str
    example: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues, list[str], list[str]], int]
    arguments: str = ""  # what positional arguments are, if the verb takes any
    overrides: bool = False  # takes --config.key=value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(
        0, os.getcwd()
    )  # a console script lacks it, and a user's backbone or experiment lies there
    return _told(lambda: _dispatch(arguments))


def _told(run: Callable[[], int]) -> int:
    """The exit code of what runs; a mistake is told in one line."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except (
        BrokenPipeError
    ):  # of `| head` and the like: nobody reads the rest, nor what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except OSError as error:  # a path that cannot be read or written
        print(f"{PROGRAM}: error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise UserError(f"no verb {name!r}; {nearest(name, VERBS)} See {PROGRAM} --help")
    verb = VERBS[name]
    before_separator = rest[: rest.index("--")] if "--" in rest else rest
    if any(argument in ("-h", "--help", "-help") for argument in before_separator):
        print(_verb_help(name, verb))
        return 0
    rest, overrides = _split_overrides(rest) if verb.overrides else (rest, [])
    values, positional = _parse(name, verb, rest)
    return verb.run(values, positional, overrides)


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the rest, the `--config.key=value` arguments); `--config.key value` is joined with `=`."""
    rest, overrides = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not re.match(r"--?(no)?config\.", argument):
            rest.append(argument)
            continue
        if "=" not in argument and pending and not re.match(r"-[^\d.]", pending[0]):
            argument += "=" + pending.pop(0)
        overrides.append(argument)
    return rest, overrides


def _parse(name: str, verb: Verb, arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The verb's flags in a `FlagValues` of their own, so that flags of imported libraries neither show nor clash."""
    values = flags.FlagValues()
    verb.define(values)
    values.set_gnu_getopt(True)  # flags may follow positional arguments
    try:
        positional = values([name, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{name} has no flag --{error.flagname}; {nearest(error.flagname, values)}") from None
    except flags.Error as error:
        raise UserError(f"{name}: {error}; see {PROGRAM} {name} --help") from None
    if positional and not verb.arguments:
        raise UserError(f"{name} takes flags only, not {positional[0]!r}; see {PROGRAM} {name} --help")
    return values, positional


def _required(values: flags.FlagValues, verb: str, *names: str) -> None:
    for name in names:
        if not values[name].value:
            raise UserError(f"{verb} needs --{name}; for example: {VERBS[verb].example}")


def _needing(
    verb: str, run: Callable[[flags.FlagValues, list[str], list[str]], int], *names: str
) -> Callable[[flags.FlagValues, list[str], list[str]], int]:
    """`run`, behind a check that the flags `names` are given."""

    def checked(values: flags.FlagValues, arguments: list[str], overrides: list[str]) -> int:
        _required(values, verb, *names)
        return run(values, arguments, overrides)

    return checked


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "Scaling studies of text-to-image diffusion backbones.\n\n"
        f"usage: {PROGRAM} VERB [flags]\n\n{verbs}\n\n"
        f"example: {VERBS['train'].example}\n\n"
        f"{PROGRAM} VERB --help shows the flags of a verb; {PROGRAM} --version the version."
    )


def _verb_help(name: str, verb: Verb) -> str:
    values = flags.FlagValues()
    verb.define(values)
    rows = [(f"--{flag}", _flag_help(values[flag])) for flag in values]
    if verb.overrides:
        rows.append(("--config.KEY=VALUE", _OVERRIDES_HELP))
    width = max(len(flag) for flag, _ in rows)
    table = "\n".join(f"  {flag:{width}}  {text}" for flag, text in rows)
    usage = " ".join(filter(None, (PROGRAM, name, verb.arguments, "[flags]")))
    return f"{verb.summary}\n\nusage: {usage}\n\n{table}\n\nexample: {verb.example}"


def _flag_help(flag: flags.Flag) -> str:
    text = (flag.help or "").partition("\n")[0].rstrip(";")  # absl adds lines of its own to repeatable flags
    return f"{text}; {flag.default} by default" if flag.default not in (None, False, [], "") else text


def _define_train(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    _define_config(values)
    string(
        "workdir",
        None,
        "folder of the run, local or gs://; a run found there goes on, without --config as well",
    )
    _define_processes(values)


def _config_of_run(workdir: str, overrides: list[str]) -> Any:
    """The config that a workdir was started with, overridden."""
    from etils import epath

    from scaling_dit import config as config_lib
    from scaling_dit.checkpoints.workdir import CONFIG_FILE, read_config

    if not (epath.Path(workdir) / CONFIG_FILE).exists():
        raise UserError(
            f"{workdir} holds no run, so train needs --config; for example: {VERBS['train'].example}"
        )
    return config_lib.resolve(read_config(workdir), overrides)


def _define_processes(values: flags.FlagValues) -> None:
    """The flags of every verb that several processes run as one."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    string("coordinator", None, "HOST:PORT of process 0, for several processes; found by itself on TPUs")
    integer("processes", None, "how many processes there are", lower_bound=1)
    integer("process", None, "which one this is, from 0", lower_bound=0)


def _in_processes(
    verb: str, values: flags.FlagValues, overrides: list[str], settings: Any, main: Callable[[], int]
) -> int:
    """`main()`, joined with the other processes of the run if there are any."""
    from scaling_dit.parallel import processes

    membership = processes.from_flags(values.coordinator, values.processes, values.process)
    given = [values[flag].serialize() for flag in values if values[flag].present]
    command = [verb, *given, *overrides]
    return processes.run_supervised(lambda: _told(main), membership, settings, command)


def _define_config(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("config", None, "experiment: a name such as shapes, or path/to/file.py; both take :ARGUMENT")


def _train(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    began = time.time()  # before the slow imports, for goodput
    _required(values, "train", "workdir")
    from scaling_dit import config as config_lib

    spec, workdir = values.config, values.workdir
    config = config_lib.load(spec, overrides) if spec else _config_of_run(workdir, overrides)

    def train() -> int:
        from scaling_dit.training.loop import main

        return main(config, values.workdir, began)

    return _in_processes("train", values, overrides, config.processes, train)


def _define_sample(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    _define_trained(values)
    flags.DEFINE_multi_string(
        "prompt", [], "a caption to draw; repeat it, or give captions as arguments", flag_values=values
    )
    string("prompts_file", None, "file of captions: one per line, or .jsonl with id and prompt")
    string("out", None, "folder to write to; by default one of this request under WORKDIR/samples")
    integer("num", 1, "pictures per caption", lower_bound=1)
    integer("batch", None, "pictures drawn at once; the run's by default", lower_bound=1)


def _define_trained(values: flags.FlagValues) -> None:
    """The flags of every verb that samples from a trained run."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    string("workdir", None, "folder of the trained run")
    integer("seed", 0, "seed of the initial noise", lower_bound=0, upper_bound=2**32 - 1)
    integer("step", None, "checkpoint to use; the latest by default", lower_bound=0)
    string(
        "ema",
        None,
        "EMA decay or power-WIDTH, kept or rebuilt; none for the raw weights; config.sample.ema by default",
    )
    string("sampler", None, "ddim, dpmpp_2m, euler or heun; the run's by default")
    integer("steps", None, "sampler steps; the run's by default", lower_bound=1, upper_bound=999)
    number("guidance", None, "guidance scale; the run's by default", lower_bound=0.0, upper_bound=1e6)
    rescale = "how far guidance goes back to the spread without, 0 to 1; the run's by default"
    number("guidance_rescale", None, rescale, lower_bound=0.0, upper_bound=1.0)
    interval = "low,high timesteps with guidance; the run's by default"
    flags.DEFINE_list("guidance_interval", None, interval, flag_values=values)


def _trained(values: flags.FlagValues) -> dict[str, Any]:
    if values.guidance is not None and math.isnan(values.guidance):
        raise UserError("--guidance is nan; give a number from 0 on")
    names = ("seed", "step", "ema", "sampler", "steps", "guidance", "guidance_rescale")
    interval = values.guidance_interval
    if interval is not None:
        try:
            interval = tuple(map(float, interval))
        except ValueError:
            given = ",".join(interval)
            raise UserError(f"--guidance_interval={given}: give two timesteps, such as 200,800") from None
    return {name: values[name].value for name in names} | {"guidance_interval": interval}


def _sample(values: flags.FlagValues, arguments: list[str], _: list[str]) -> int:
    _required(values, "sample", "workdir")
    from scaling_dit.sampling.prompts import gather_prompts

    prompts = gather_prompts([*values.prompt, *arguments], values.prompts_file)

    from scaling_dit.sampling.sample import sample_prompts

    return sample_prompts(
        values.workdir, prompts, values.out, num=values.num, batch=values.batch, **_trained(values)
    )


def _define_evaluate(values: flags.FlagValues) -> None:
    _define_trained(values)
    flags.DEFINE_list("metrics", None, "comma-separated metrics; the run's by default", flag_values=values)
    flags.DEFINE_integer("items", 500, "held-out captions", lower_bound=1, flag_values=values)
    out = "folder to write to; by default one of these settings under WORKDIR/evaluation"
    flags.DEFINE_string("out", None, out, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the figures as JSON", flag_values=values)


def _evaluate(values: flags.FlagValues, _: list[str], __: list[str]) -> int:
    _required(values, "evaluate", "workdir")
    from scaling_dit.evaluation import run

    metrics, items = values.metrics, values.items
    return run.main(
        values.workdir, values.out, metrics=metrics, items=items, as_json=values.json, **_trained(values)
    )


def _define_prepare(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    _define_config(values)
    string("out", None, "folder of the prepared set, local or gs://; what is finished there is kept")
    string("filter", "", "keep what this is true of, such as 'aesthetic >= 5 and min(width, height) >= 256'")
    integer("min_size", 0, "leave out pictures with a shorter side, in pixels", lower_bound=0)
    aspect = "bring pictures to the nearest of seven aspect ratios, not to squares"
    flags.DEFINE_boolean("buckets", False, aspect, flag_values=values)
    flags.DEFINE_list("columns", [], "comma-separated metadata that records keep", flag_values=values)
    string("kept", "", "folder that the filter verb wrote: leave out what it dropped")
    string("captions", "", "folder that the caption verb wrote: captions to add")
    integer("batch", 64, "pictures encoded at once", lower_bound=1)
    integer(
        "process", None, "number of this process, from 0; that of a distributed job by default", lower_bound=0
    )
    integer("processes", None, "how many processes share the work", lower_bound=1)


def _prepare(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    _required(values, "prepare", "config", "out")
    from scaling_dit import config as config_lib

    config = config_lib.load(values.config, overrides)
    from scaling_dit.curation import job

    names = ("batch", "min_size", "buckets", "filter", "kept", "captions")
    given: dict[str, Any] = {name: values[name].value for name in names}
    process = job.process_of(values.process, values.processes)
    return job.main(config, values.out, job.Options(**given, columns=tuple(values.columns), process=process))


def _define_count(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_string(
        "backbone", None, "count this backbone alone: a name, or package.module:Class", flag_values=values
    )
    numbers = functools.partial(flags.DEFINE_list, flag_values=values)
    numbers("latents", None, "height,width,channels of a latent; 32,32,4 for --backbone")
    numbers("text", None, "length,width of the text; 77,1024 for --backbone")
    flags.DEFINE_integer(
        "depth", 1, "levels of modules told apart in the breakdown", lower_bound=1, flag_values=values
    )
    flags.DEFINE_boolean("json", False, "print the figures as JSON", flag_values=values)


def _count(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    from scaling_dit.costs import count_table

    return count_table.main(
        values.config,
        values.backbone,
        overrides,
        latents=values.latents,
        text=values.text,
        depth=values.depth,
        as_json=values.json,
    )


def _define_plan(values: flags.FlagValues) -> None:
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    _define_config(values)
    flags.DEFINE_multi_string(
        "topology", [], "slice such as v5p:4x4x4 or v5e:16x16, or local; repeat it", flag_values=values
    )
    integer("slices", 1, "equal slices joined by the data-centre network", lower_bound=1)
    flags.DEFINE_enum(
        "step", "train", ("train", "sample"), "train or sample: the program to plan", flag_values=values
    )
    flags.DEFINE_boolean(
        "search",
        False,
        "try meshes, gather_once, microbatches and remat policies, and rank them",
        flag_values=values,
    )
    integer("search_limit", 12, "programs that a search compiles at most", lower_bound=1)
    quick = "leave the kernels out: all but cycles and the estimate, in a fraction of the time; not for local"
    flags.DEFINE_boolean("quick", False, quick, flag_values=values)
    price = "US dollars of a chip-hour; a rough list price of 2025 by default"
    flags.DEFINE_float("price", None, price, lower_bound=0.0, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the figures as JSON", flag_values=values)


def _plan(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    _required(values, "plan", "config", "topology")
    from scaling_dit.parallel import topologies

    topologies.prepare_environment(values.topology)  # before jax is imported
    from scaling_dit.planning import report as plan_report

    return plan_report.main(
        values.config,
        overrides,
        values.topology,
        slices=values.slices,
        step=values.step,
        search=values.search,
        search_limit=values.search_limit,
        quick=values.quick,
        price=values.price,
        as_json=values.json,
    )


def _define_import(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("from", None, "safetensors file, index of shards, or folder of a model or pipeline of diffusers")
    string("workdir", None, "folder of the new run, local or gs://")
    to = "safetensors: converts a pickle that you trust (.bin, .pt, .ckpt) instead of starting a run; needs --out"
    flags.DEFINE_enum("to", None, ("safetensors",), to, flag_values=values)
    string("out", None, "file that --to=safetensors writes; a folder for the shards of a .bin.index.json")
    _define_config(values)


def _import(values: flags.FlagValues, _: list[str], overrides: list[str]) -> int:
    if values.to:
        _required(values, "import", "from", "out")
        if values.workdir or values.config or overrides:
            raise UserError(
                "import --to=safetensors converts a file and starts no run; leave --workdir and --config out"
            )
        from scaling_dit.weights import pickles as converting

        return converting.main(str(values["from"].value), values.out)
    if values.out:
        raise UserError("import --out belongs to --to=safetensors; a run is written to --workdir")
    _required(values, "import", "from", "workdir", "config")
    from scaling_dit.interop import importing

    return importing.main(str(values["from"].value), values.workdir, values.config, overrides)


def _define_export(values: flags.FlagValues) -> None:
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("workdir", None, "folder of the trained run")
    string("out", None, "folder to write; it must not exist or be empty")
    formats = ("diffusers", "diffusers-pipeline", "safetensors")
    to = "diffusers: the backbone, as diffusers loads it; diffusers-pipeline: the whole run; safetensors: weights alone"
    flags.DEFINE_enum("to", None, formats, f"{to}, in the names of the published code", flag_values=values)
    flags.DEFINE_integer(
        "step", None, "checkpoint to write; the latest by default", lower_bound=0, flag_values=values
    )
    string("ema", None, "EMA decay to write, or none for raw weights; the run's config.sample.ema by default")


def _export(values: flags.FlagValues, _: list[str], __: list[str]) -> int:
    _required(values, "export", "workdir", "out", "to")
    from scaling_dit.interop import exporting

    return exporting.main(values.workdir, values.out, to=values.to, step=values.step, ema=values.ema)


def _define_report(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run, instead of an argument", flag_values=values)
    flags.DEFINE_boolean("json", False, "print the figures as JSON", flag_values=values)


def _report(values: flags.FlagValues, arguments: list[str], _: list[str]) -> int:
    runs = [*arguments, *([values.workdir] if values.workdir else [])]
    if len(runs) != 1:
        raise UserError(f"report takes one run, not {len(runs)}; for example: {VERBS['report'].example}")
    from scaling_dit.training import report

    return report.main(runs[0], as_json=values.json)


VERBS: dict[str, Verb] = {
    "train": Verb(
        "Trains a run, or goes on with it where it stopped.",
        f"{PROGRAM} train --config=shapes --workdir=runs/shapes --config.steps=2000",
        _define_train,
        _train,
        overrides=True,
    ),
    "sample": Verb(
        "Draws pictures for captions with a trained run.",
        f"{PROGRAM} sample --workdir=runs/shapes 'a red circle left of a blue square'",
        _define_sample,
        _sample,
        arguments="[CAPTION ...]",
    ),
    "evaluate": Verb(
        "Scores a trained run on held-out captions.",
        f"{PROGRAM} evaluate --workdir=runs/shapes --items=500",
        _define_evaluate,
        _evaluate,
    ),
    "prepare": Verb(
        "Encodes a data set once: raw images to shards of latents that runs train from.",
        f"{PROGRAM} prepare --config=shapes --config.source.name=folder:data/mine --config.codec.name=dct "
        "--out=data/mine_latents",
        _define_prepare,
        _prepare,
        overrides=True,
    ),
    "filter": Verb(
        "Lists which samples of a data set to keep: by columns, without duplicates.",
        f"{PROGRAM} filter --source='webdataset:data/*.tar' --filter='aesthetic>=5' --duplicates=near --out=data/kept",
        cli_data.define_filter,
        _needing("filter", cli_data.run_filter, "source", "out"),
        arguments="[-- BEAM OPTIONS]",
        overrides=True,
    ),
    "stats": Verb(
        "Counts a data set: images, aesthetic score, words and nouns of its captions.",
        f"{PROGRAM} stats --source='webdataset:data/*.tar' --kept=data/kept --out=data/stats",
        cli_data.define_stats,
        _needing("stats", cli_data.run_stats, "source", "out"),
        arguments="[-- BEAM OPTIONS]",
        overrides=True,
    ),
    "caption": Verb(
        "Writes captions for the images of a data set, with a model or a server.",
        f"{PROGRAM} caption --source='webdataset:data/*.tar' --captioner=transformers:models/blip2 --out=data/captions",
        cli_data.define_caption,
        _needing("caption", cli_data.run_caption, "source", "captioner", "out"),
        overrides=True,
    ),
    "report": Verb(
        "Tells where a run's time went, its losses, speed, evaluations, checkpoints.",
        f"{PROGRAM} report runs/shapes",
        _define_report,
        _report,
        arguments="[RUN]",
    ),
    "count": Verb(
        "Counts parameters, multiply-accumulates, training FLOPs and activation memory.",
        f"{PROGRAM} count --backbone=uvit --config.backbone.size=h2048-d42-n16 --latents=32,32,4 --text=77,1024",
        _define_count,
        _count,
        overrides=True,
    ),
    "plan": Verb(
        "Compiles a run for TPUs that are not there: memory, FLOPs, speed, cost.",
        f"{PROGRAM} plan --config=dit_scaling:uvit-h2048-d42-n16 --topology=v5p:4x4x4",
        _define_plan,
        _plan,
        overrides=True,
    ),
    "import": Verb(
        "Starts a run from published weights, or converts pickled ones to safetensors.",
        f"{PROGRAM} import --from=model.safetensors --config=shapes --workdir=runs/imported",
        _define_import,
        _import,
        overrides=True,
    ),
    "export": Verb(
        "Writes a run's weights for other code to read.",
        f"{PROGRAM} export --workdir=runs/shapes --out=shapes-weights --to=safetensors",
        _define_export,
        _export,
    ),
}

"""The command line: the table of verbs, and from arguments to an exit code.

Every mistake of a user ends as one line on stderr and exit code 2. A verb imports what it works with once its flags are
right.
"""

import os
import sys
from collections.abc import Sequence

from scaling_dit._version import __version__
from scaling_dit.cli.costs import Count, Plan
from scaling_dit.cli.data import Caption, Filter, Prepare, Stats
from scaling_dit.cli.doctor import Doctor
from scaling_dit.cli.exit_codes import PROGRAM, USER_ERROR, report_errors
from scaling_dit.cli.report import Report
from scaling_dit.cli.sample import Evaluate, Sample
from scaling_dit.cli.study import Advise, Study
from scaling_dit.cli.tpu import Tpu
from scaling_dit.cli.train import Train
from scaling_dit.cli.verb import Verb, find_verb
from scaling_dit.cli.weights import Export, Import

_HELP = ("-h", "--help", "-help")
_TABLE: tuple[type[Verb], ...] = (
    Train,
    Sample,
    Evaluate,
    Prepare,
    Filter,
    Stats,
    Caption,
    Study,
    Report,
    Count,
    Plan,
    Doctor,
    Advise,
    Import,
    Export,
    Tpu,
)
VERBS: dict[str, type[Verb]] = {verb.name(): verb for verb in _TABLE}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return report_errors(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    # A console script lacks it, and a user's own backbone or experiment lies there. It fails where that folder is gone.
    sys.path.insert(0, os.getcwd())
    if not arguments or arguments[0] in (*_HELP, "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    verb, rest = find_verb("", VERBS, arguments), arguments[1:]
    before_separator = rest[: rest.index("--")] if "--" in rest else rest
    if any(argument in _HELP for argument in before_separator):
        below = verb.verbs()
        print(below.get(rest[0], verb).help())
        return 0
    return verb.parse(rest).run()


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary()}" for name, verb in VERBS.items())
    return (
        "Scaling studies of text-to-image diffusion backbones.\n\n"
        f"usage: {PROGRAM} VERB [flags]\n\n{verbs}\n\n"
        f"example: {VERBS['train'].EXAMPLE}\n\n"
        f"{PROGRAM} VERB --help shows the flags of a verb; {PROGRAM} --version the version."
    )

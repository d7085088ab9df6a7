"""Commands: quoting, hiding what is secret, and running gcloud.

A command is a tuple of words and never passes a shell of this machine. What runs on a worker passes exactly one shell
there; `quote` is how any value gets into its text.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from scaling_dit.errors import UserError

Command = tuple[str, ...]
HIDDEN = "[hidden]"
# Tokens of Google, Hugging Face, Weights & Biases, OpenAI and GitHub, and what follows words that announce one.
_TOKENS = re.compile(
    r"ya29\.[\w.-]+|AIza[\w-]{30,}|1//[\w-]{20,}|hf_\w{8,}|sk-[\w-]{16,}|gh[opsu]_\w{20,}|github_pat_\w+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|(?<=Bearer )[\w.~+/-]+=*"
    r"|(?<![A-Za-z])(?i:(?<=token=)|(?<=password=)|(?<=api_key=)|(?<=secret=))[^\s'\"]+",
    re.DOTALL,
)
# gcloud may not end, for example where it asks for a password. Copying the source takes longest.
SECONDS = 1800.0
_AT_ONCE = 32


def quote(word: str) -> str:
    """A word for a shell on a worker.

    gcloud splits the text at single spaces and ssh joins it again, so a run of spaces may not survive; the quoted word
    has none.
    """
    quoted = shlex.quote(word)
    while "  " in quoted:
        quoted = quoted.replace("  ", " '' ", 1)
    return quoted


def join(words: Iterable[str]) -> str:
    """Words as one line for a shell on a worker."""
    return " ".join(map(quote, words))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the given secrets, and without what looks like a token."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _TOKENS.sub(HIDDEN, text)


def shown(command: Sequence[str], secrets: Iterable[str] = ()) -> str:
    """A command as a user may type it, without secrets."""
    return redact(shlex.join(command), secrets)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended; `code` is -1 if it did not end in time."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def reason(self) -> str:
        """The line of its output that says what was wrong."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line]
        return (errors or lines or [f"exit code {self.code}"])[-1][:300]


class Runner(Protocol):
    """Runs commands; tests have others."""

    def __call__(self, command: Command, seconds: float = SECONDS) -> Result:
        """Runs one command and waits for its end, at most so long."""
        ...


def run(command: Command, seconds: float = SECONDS) -> Result:
    """Runs one command, without input.

    Raises:
      UserError: the program is not installed.
    """
    try:
        # In a session of its own, so that Ctrl-C ends the launcher and not, half way, what it asked for.
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                return Result(-1, out, f"{err}\n{command[0]} did not end within {seconds:.0f} s")
            except BaseException:
                process.terminate()
                raise
            return Result(process.returncode, out, err)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed: https://cloud.google.com/sdk/docs/install; then `gcloud auth login`"
        ) from None


def run_all(runner: Runner, commands: Sequence[Command], seconds: float = SECONDS) -> list[Result]:
    """Runs several commands at the same time; the results stand in their order. An exception of one is raised."""
    if len(commands) == 1:
        return [runner(commands[0], seconds)]
    results: list[Result] = []
    for first in range(0, len(commands), _AT_ONCE):
        results += _run_batch(runner, commands[first : first + _AT_ONCE], seconds)
    return results


def _run_batch(runner: Runner, commands: Sequence[Command], seconds: float) -> list[Result]:
    ended: dict[int, Result | BaseException] = {}

    def work(number: int) -> None:
        try:
            ended[number] = runner(commands[number], seconds)
        except BaseException as error:
            ended[number] = error

    # Daemons, so that Ctrl-C does not wait for them.
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(commands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = []
    for number in range(len(commands)):
        outcome = ended[number]
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def replace_process(command: Command) -> None:
    """Becomes the command, which then has the terminal."""
    os.execvp(command[0], command)


Say = Callable[[str], None]

"""Quoting through a real shell, as gcloud and ssh hand a command on; and that no secret is shown."""

import contextlib
import os
import shlex
import signal
import subprocess
import time

import pytest
from scaling_dit.tpu import commands, remote
from scaling_dit.tpu.commands import Result, join, quote, redact, run, shown
from scaling_dit.tpu.observations import Work

from scaling_dit.errors import UserError
from tests.support import tpu_jobs

ODD = (
    "plain", "with space", "two  spaces", "   lead and trail   ", "semi;colon", "$(touch hacked)", "`touch hacked`",
    "$HOME", "quote'single", 'quote"double', "back\\slash", "new\nline", "tab\there", "a && b || c | d > e", "*", "~",
    "#comment", "!x", "-dash", "", "ünï 雪", "{a,b}", "%s%d", "'  '", "' ; touch hacked ; '",
)  # fmt: skip
TOKENS = (
    "ya29.a0AfH6SMBx-Yz_123", "hf_AbCdEfGhIjKlMnOp", "sk-proj-abcdefghijklmnopqrst", "ghp_abcdefghijklmnopqrstuvwx",
    "AIzaSyA-1234567890abcdefghijklmnopqrstu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test(tmp_path):
    yield
    for path in tmp_path.glob(".scaling-dit/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text().split()[0]), signal.SIGKILL)


def as_ssh(text, folder):
    """Runs a text as a worker gets it: split at single spaces, what is empty lost, and one shell."""
    handed_on = " ".join(part for part in text.split(" ") if part)
    return subprocess.run(
        ["sh", "-c", handed_on],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )


def test_odd_words_arrive_as_they_are(tmp_path):
    done = as_ssh(f"printf '%s\\0' {join(ODD)}", tmp_path)
    assert done.stdout.split("\0")[:-1] == list(ODD)
    assert list(tmp_path.iterdir()) == []
    assert all("  " not in quote(word) for word in ODD)


def test_odd_words_pass_the_scripts_of_a_worker(tmp_path):
    (tmp_path / "args.py").write_text(
        "import sys, os; print(repr((sys.argv[1:], os.environ['ODD'])), flush=True)\n"
    )
    one = tpu_jobs.job(
        command=("python3", str(tmp_path / "args.py"), *ODD),
        environment={"ODD": ODD[-1]},
        setup=f"printf '%s' {shlex.quote(ODD[2])} > made\n",
    )
    done = as_ssh(remote.setup(one, "stamp"), tmp_path)
    assert done.returncode == 0 and remote.ready(done.stdout, "stamp") == 1, done.stderr
    assert remote.ready(done.stdout, "other") == 0
    home = tmp_path / ".scaling-dit" / "first"
    # The user's own text may not rely on runs of spaces, ours does not.
    assert (home / "made").read_text().split() == ODD[2].split()
    for _ in range(2):
        assert as_ssh(remote.start(one, 1), tmp_path).returncode == 0
    for _ in range(100):
        status = remote.read_status(as_ssh(remote.status(one), tmp_path).stdout)
        if status[0].work is not Work.RUNNING:
            break
    assert status[0].work is Work.ENDED and status[0].code == 0 and status[0].attempt == 1
    log = (home / "log").read_text()
    assert repr((list(ODD), ODD[-1])) in log and log.count("--- attempt") == 1
    assert not list(tmp_path.rglob("hacked"))


def test_a_set_up_is_done_once_and_its_failure_is_told(tmp_path):
    one = tpu_jobs.job(setup="echo x >> count; if [ -f bad ]; then echo why it failed; exit 3; fi\n")
    home = tmp_path / ".scaling-dit" / "first"
    home.mkdir(parents=True)
    (home / "bad").touch()
    done = as_ssh(remote.setup(one, "s"), tmp_path)
    assert done.returncode == 3 and "why it failed" in done.stderr and remote.ready(done.stdout, "s") == 0
    (home / "bad").unlink()
    for _ in range(3):
        assert as_ssh(remote.setup(one, "s"), tmp_path).returncode == 0
    assert (home / "count").read_text() == "x\n" * 2


def test_a_stopped_job_leaves_its_exit_code_and_a_killed_one_none(tmp_path):
    job = tpu_jobs.job(
        command=("sh", "-c", "trap 'echo step 41; exit 75' TERM; echo step 40; while :; do sleep 0.05; done")
    )

    def status():
        (told,) = remote.read_status(as_ssh(remote.status(job), tmp_path).stdout)
        return told

    assert status().work is Work.GONE and status().attempt == 0
    as_ssh(remote.start(job, 1), tmp_path)
    log = tmp_path / ".scaling-dit" / "first" / "log"
    while "step 40" not in log.read_text():
        pass
    assert status().work is Work.RUNNING and status().step == 40
    assert as_ssh(remote.save(job), tmp_path).returncode == 0
    assert (status().work, status().code, status().step) == (Work.ENDED, 75, 41)
    as_ssh(remote.start(job, 2), tmp_path)
    assert status().work is Work.RUNNING and status().attempt == 2
    assert as_ssh(remote.kill(job), tmp_path).returncode == 0
    for _ in range(100):
        # Until its parent has taken notice.
        if status().work is not Work.RUNNING:
            break
        time.sleep(0.05)
    assert status().work is Work.GONE and status().code is None
    assert "step 40" in as_ssh(remote.logs(job, 5, False), tmp_path).stdout


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_not_shown(token):
    for text in (
        f"--command=export A={token}",
        f"x {token} y",
        f"Authorization: Bearer {token}",
        f"'{token}'",
    ):
        assert token not in redact(text) and token not in shown(("gcloud", text))
    assert commands.HIDDEN in redact(token)


def test_given_secrets_and_announced_ones_are_not_shown():
    assert redact("a s3cret b", ["s3cret", "", "s3"]) == "a [hidden] b"
    assert redact("password=abc token=def", []) == "password=[hidden] token=[hidden]"
    assert redact("--config.steps=7 --topology=v5e:4x4") == "--config.steps=7 --topology=v5e:4x4"


def test_running_commands():
    assert run(("sh", "-c", "echo out; echo err >&2; exit 3")) == Result(3, "out\n", "err\n")
    assert Result(1, "", "warn\nERROR: (gcloud) why\nmore\n").reason == "ERROR: (gcloud) why"
    late = run(("sleep", "5"), 0.1)
    assert late.code == -1 and "did not end within" in late.reason
    with pytest.raises(UserError, match="no-such-program is not installed"):
        run(("no-such-program",))
    several = commands.run_all(run, [("echo", str(number)) for number in range(5)])
    assert [result.out.strip() for result in several] == list("01234")

"""The speed of a core beside a suite, and the line about it in what `.ci/run` reports."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tools import pace

LINE = r"a fixed loop took \d\.\d{3} s in the median and \d\.\d{3} s at its fastest"


def test_a_sample_is_the_processors_time_of_its_turns():
    few, many = min(pace.sample(20_000) for _ in range(5)), min(pace.sample(200_000) for _ in range(5))
    assert 3 < many / few < 30


def test_the_summary_has_the_median_and_the_fastest():
    assert (
        pace.summary([0.3, 0.1, 0.2]) == "a fixed loop took 0.200 s in the median and 0.100 s at its fastest"
    )


def test_it_samples_until_sigterm_and_then_prints_one_line():
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})"
    script = f"import signal; from tools import pace; {blocked}; print('begun', flush=True); pace.main(0.01)"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout.readline() == "begun\n"
        started.terminate()
        printed = started.communicate(timeout=60)[0]
    assert re.fullmatch(f"{LINE}\n", printed) and started.returncode == 0


# Takes as long as the sampling needs to begin.
MAKE = """#!/bin/sh
case "$1" in test*) sleep 1 ;; esac
test "$1" != {failing}
"""


@pytest.mark.parametrize(
    "failing, code, suites", [("test", 1, ["test"]), ("test-all", 0, ["test", "test-all"])]
)
def test_the_fast_suite_decides_and_each_suite_is_timed_beside_its_budget(failing, code, suites, tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for path, text in (
        (".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
        ("bin/make", MAKE.format(failing=failing)),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci/run"],
        env={**os.environ, "CI_LIMIT_SECONDS": "3600", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    timed = re.findall(r"ci: make (\S+): \d+ s of (\d+) s budget; (.*)", done.stdout)
    assert [(suite, budget) for suite, budget, _ in timed] == [
        (suite, {"test": "420", "test-all": "1800"}[suite]) for suite in suites
    ]
    assert all(re.fullmatch(LINE, pace_of_cores) for *_, pace_of_cores in timed)
    assert "make test-all FAILED with exit code 1" in done.stdout or failing == "test"

"""`evaluate` by two processes: each samples and scores its part, and no byte of the result depends on it."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.support import xla


def run(smoke_run, out, count):
    """`evaluate` by `count` processes with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "scaling_dit", "evaluate", f"--workdir={smoke_run}", f"--out={out}", "--items=40",
        "--batch=4", "--metrics=tifa,shapes_tifa", "--judge=shapes", "--config.metrics.shapes_tifa.batch=2",
    ]  # fmt: skip
    joined = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
    started = [
        subprocess.Popen(
            [*command, *joined, *([f"--process={index}"] if joined else [])],
            env={**os.environ, "XLA_FLAGS": xla.flags(devices=2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    output = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n----\n".join(
        err for _, err in output
    )
    return [said for said, _ in output]


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(smoke_run, tmp_path):
    run(smoke_run, tmp_path / "one", 1)
    first, second = run(smoke_run, tmp_path / "two", 2)
    assert "shapes_tifa of" in first and "shapes_tifa of" not in second

    def files(name):
        paths = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path for path in paths}

    one, two = files("one"), files("two")
    assert one.keys() == two.keys() and sum(name.endswith(".png") for name in one) == 41
    for name in one:
        if name != "results.jsonl":
            assert one[name].read_bytes() == two[name].read_bytes(), name
    rows = [
        [json.loads(line) for line in found["results.jsonl"].read_text().splitlines()] for found in (one, two)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2

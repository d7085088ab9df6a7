"""`evaluate` by several processes: each samples and scores its part, and no byte of the result depends on it."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from scaling_dit.cli import main as cli
from tests.support import tiny_distances, xla
from tests.support.paths import ROOT
from tests.support.runs import open_on_one_device

QUESTIONS = ("tifa", "shapes_tifa")
# Of one network, whose sums may differ in their last bits.
DISTANCES = (tiny_distances.Nearer.NAME, tiny_distances.Wider.NAME)
SETTINGS = ("--judge=shapes", "--config.metrics.shapes_tifa.batch=2")


def arguments(smoke_run, out, metrics=QUESTIONS):
    """Those of `scaling-dit evaluate`."""
    return [
        "evaluate", f"--workdir={smoke_run}", f"--out={out}", "--items=40", "--batch=4",
        f"--metrics={','.join(metrics)}", *SETTINGS,
    ]  # fmt: skip


def start(smoke_run, out, count, metrics=QUESTIONS, environment=None):
    """`evaluate` by `count` processes with two devices each: the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scaling_dit", *arguments(smoke_run, out, metrics)]
    joined = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [*command, *joined, f"--process={index}"],
            env={**xla.one_of_several(devices=2), **(environment or {})},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(started):
    """What each of them prints, when all have ended well."""
    output = [process.communicate(timeout=600) for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * len(started), "\n----\n".join(err for _, err in output)
    return [said for said, _ in output]


def results(folder):
    """The rows of results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def files(folder):
    """name -> bytes of all files but those of the distances, whose images are others; results.jsonl as its rows."""
    rows = results(folder)
    distances = [row for row in rows if row["metric"] in DISTANCES]
    apart = {row["folder"] for row in distances}
    apart |= {f"images-{row['prompts_sha256'][:8]}" for row in distances}
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in apart:
            found[str(name)] = path.read_bytes()
    return {**found, "results.jsonl": [row for row in rows if row["metric"] in QUESTIONS]}


@pytest.fixture(scope="module")
def both(smoke_run, tmp_path_factory):
    """Folders of all four metrics, by one process and by two: the folders, and what the two processes print."""
    places = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    weights = tmp_path_factory.mktemp("weights")
    (weights / "colours").touch()
    metrics, environment = QUESTIONS + DISTANCES, {"SCALING_DIT_WEIGHTS": str(weights)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALING_DIT_WEIGHTS", str(weights))
        open_on_one_device(patch, count=2)
        assert cli.main(arguments(smoke_run, places[0], metrics)) == 0
    return places, finish(start(smoke_run, places[1], 2, metrics, environment))


@pytest.fixture(scope="module")
def alone(both):
    """The files of one process."""
    found = files(both[0][0])
    assert sum(name.endswith(".png") for name in found) == 41 and len(found["results.jsonl"]) == 2
    return found


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(both, alone):
    (_, out), (first, *others) = both
    assert "shapes_tifa of" in first and not any("shapes_tifa of" in said for said in others)
    assert files(out) == alone


@pytest.mark.slow
def test_killed_processes_are_resumed_by_four(smoke_run, tmp_path, alone):
    # One pair dies while it starts, and one among images.
    for wanted in (0, 15):
        started = start(smoke_run, tmp_path, 2)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("*.png"))) < wanted and time.monotonic() < deadline:
            if started[0].poll() is not None:
                break
            time.sleep(0.02)
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate(timeout=60)
    first, *others = finish(start(smoke_run, tmp_path, 4))
    assert "shapes_tifa of" in first and not any("shapes_tifa of" in said for said in others)
    assert files(tmp_path) == alone


@pytest.mark.slow
def test_metrics_of_one_network_have_the_features_of_all_processes(both):
    """Two of real and generated images, by one process and by two; features of an image do not depend on its batch."""
    found = []
    for out in both[0]:
        rows = [row for row in results(out) if row["metric"] in DISTANCES]
        assert all(row["n"] == 40 for row in rows)
        found.append({name: value for row in rows for name, value in row["scalars"].items()})
    assert set(found[0]) == {"nearer", "wider"} and found[0]["nearer"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-6)

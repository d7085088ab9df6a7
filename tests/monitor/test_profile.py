"""Profiler traces: the steps of the window and no others, also when a start begins inside it."""

import gzip
import json

import jax
import jax.numpy as jnp
from etils import epath

from scaling_dit.monitor.profile import Profiler, copy_files

double = jax.jit(lambda x: x * 2)


def loop(directory, window, steps):
    waited = []
    with Profiler(epath.Path(directory), window) as profiler:
        for step in steps:
            with profiler.step(step):
                x = double(jnp.ones(4))
            before = profiler._tracing
            profiler.after(step, x)
            if before and not profiler._tracing:
                waited.append(step)
    return waited


def traced_steps(directory):
    """The numbers that the traces of a folder give their steps, and how many traces there are."""
    files = list(directory.rglob("*.trace.json.gz"))
    steps = set()
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps |= {int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})}
    return steps, len(files)


def test_the_window_is_traced_and_nothing_else(tmp_path):
    assert loop(tmp_path, (3, 4), range(1, 8)) == [4]
    assert traced_steps(tmp_path) == ({3, 4}, 1)
    # Where TensorBoard's plugin reads.
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_a_start_inside_the_window_traces_its_rest_and_one_after_it_nothing(tmp_path):
    # Ended early, by SIGTERM say: the trace is written all the same.
    loop(tmp_path, (3, 6), range(5, 6))
    assert traced_steps(tmp_path) == ({5}, 1)
    assert loop(tmp_path / "late", (3, 6), range(7, 9)) == []
    assert not (tmp_path / "late").exists()


def test_no_window_no_trace(tmp_path):
    loop(tmp_path / "none", (), range(1, 4))
    assert not (tmp_path / "none").exists()


def test_files_for_a_remote_store_keep_their_places(tmp_path):
    (tmp_path / "a/plugins").mkdir(parents=True)
    (tmp_path / "a/plugins/x.pb").write_bytes(b"\x00\x01")
    copy_files(tmp_path / "a", epath.Path(tmp_path / "b"))
    assert (tmp_path / "b/plugins/x.pb").read_bytes() == b"\x00\x01"

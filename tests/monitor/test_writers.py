"""Metrics are written, survive kills and restarts, and are read back from TensorBoard's own event files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scaling_dit import storage
from scaling_dit.errors import StorageError, UserError
from scaling_dit.monitor import writers
from scaling_dit.monitor.writers import JsonlWriter, create_writer, read_scalars
from tests.support.paths import ROOT

PARAMS = {"dense": {"kernel": jnp.zeros((4, 250)), "bias": jnp.zeros(4)}}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)


def test_scalars_of_any_kind_come_back_as_numbers(tmp_path):
    writer = create_writer(tmp_path / "metrics")
    writer.scalars(20, {"loss": jnp.float32(0.5), "count": np.int64(3), "rate": 2.0})
    writer.scalars(np.int64(20), {"eval/loss": np.float32("nan")})
    writer.scalars(40, {"loss": 0.25})
    writer.close()
    first, second = read_scalars(tmp_path / "metrics")
    assert np.isnan(first.pop("eval/loss"))
    assert first == {"step": 20, "loss": 0.5, "count": 3, "rate": 2.0}
    assert second == {"step": 40, "loss": 0.25}


def test_the_newest_start_wins_step_by_step(tmp_path):
    with create_writer(tmp_path / "metrics") as first:
        for step in (10, 20, 30):
            first.scalars(step, {"loss": step / 10, "eval": 1.0})
    # Resumed at step 10.
    with create_writer(tmp_path / "metrics") as second:
        second.scalars(20, {"loss": 99.0})
        second.scalars(40, {"loss": 4.0})
    assert read_scalars(tmp_path / "metrics") == [
        {"step": 10, "loss": 1.0, "eval": 1.0},
        {"step": 20, "loss": 99.0, "eval": 1.0},
        {"step": 30, "loss": 3.0, "eval": 1.0},
        {"step": 40, "loss": 4.0},
    ]
    assert len(list((tmp_path / "metrics").iterdir())) == 2


def test_many_starts_keep_their_order(tmp_path):
    for start in range(12):
        writer = JsonlWriter(tmp_path / "metrics")
        writer.scalars(1, {"start": start})
        writer.close()
    assert read_scalars(tmp_path / "metrics") == [{"step": 1, "start": 11}]


def test_a_torn_last_line_is_left_out_and_other_damage_is_not(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics")
    writer.scalars(1, {"loss": 1.0})
    writer.scalars(2, {"loss": 2.0})
    writer.close()
    text = writer.segment.read_text()
    for cut in range(1, 20):
        writer.segment.write_text(text[:-cut])
        # Only the newline is gone.
        expected = 2 if cut == 1 else 1
        assert len(read_scalars(tmp_path / "metrics")) == expected
    writer.segment.write_text(text.replace("{", "", 1))
    with pytest.raises(UserError, match=r"segment-00001.jsonl: line 1"):
        read_scalars(tmp_path / "metrics")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(the folder of a writer that was killed, what its process had loaded by then)."""
    folder = tmp_path_factory.mktemp("killed")
    code = """
        import os, signal, sys
        from scaling_dit.monitor.writers import JsonlWriter
        print(*sys.modules, flush=True)
        writer = JsonlWriter(sys.argv[1] + "/metrics")
        for step in range(100):
            writer.scalars(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), folder]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    return folder, set(done.stdout.split())


def test_a_killed_writer_leaves_every_finished_row(killed):
    assert [row["step"] for row in read_scalars(killed[0] / "metrics")] == list(range(100))


def test_without_append_the_segment_is_rewritten_whole(tmp_path, monkeypatch):
    opened = []
    real_open = type(tmp_path).open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: opened.append(mode) or real_open(self, mode, *a, **k)
    )
    writer = JsonlWriter(tmp_path, append=False)
    writer.scalars(1, {"loss": 1.0})
    assert writer.segment.read_text() == ""
    writer.flush()
    assert [row["step"] for row in rows(writer.segment)] == [1]
    writer.scalars(2, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in rows(writer.segment)] == [1, 2]
    assert not any("a" in mode for mode in opened)


def test_no_metrics_are_an_empty_list(tmp_path):
    assert read_scalars(tmp_path / "new") == []


def test_everything_else_is_in_the_segment_too(tmp_path):
    writer = JsonlWriter(tmp_path)
    writer.hparams({"seed": 1, "optim.ema": (0.9, 0.99), "optim.decay": "cosine", "note": "a \u2028 b"})
    writer.parameter_overview(PARAMS)
    writer.images(5, {"samples/grid": random_images(1)[0]})
    writer.close()
    hparams, overview, images = rows_by_newline(writer.segment)
    hparams["hparams"].pop("note")
    assert hparams == {"hparams": {"seed": 1, "optim.ema": "(0.9, 0.99)", "optim.decay": "cosine"}}
    assert "1,004" in overview["parameter_overview"]
    assert "dense/kernel" in overview["parameter_overview"]
    saved = {name: np.asarray(Image.open(tmp_path / file)) for name, file in images["images"].items()}
    np.testing.assert_array_equal(saved["samples/grid"], random_images(1)[0])


def rows_by_newline(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_parameter_table_without_clu(monkeypatch):
    monkeypatch.setitem(sys.modules, "clu.parameter_overview", None)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert writers.overview_text(abstract).splitlines() == [
        "dense/bias  (4,)  4",
        "dense/kernel  (4, 250)  1,000",
        "Total: 1,004",
    ]


@pytest.mark.parametrize("missing", ["tensorflow", "tensorboard", "clu.metric_writers"])
def test_a_missing_package_is_reported_in_one_line(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("tensorflow", "tensorboard", "clu.metric_writers"):
        if name != missing:
            # Whatever can be imported.
            monkeypatch.setitem(sys.modules, name, sys)
    with create_writer(tmp_path / "metrics", tmp_path / "tensorboard") as writer:
        writer.scalars(1, {"loss": 1.0})
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert missing in printed and 'pip install "scaling-dit[tensorboard]"' in printed
    assert read_scalars(tmp_path / "metrics") == [{"step": 1, "loss": 1.0}]
    assert not (tmp_path / "tensorboard").exists()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with create_writer(tmp_path / "metrics", tmp_path / "tensorboard") as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, {"grid": random_images(1)[0]})
    assert list(tmp_path.iterdir()) == []


def test_importing_the_writers_loads_no_tensorflow(killed):
    assert "scaling_dit.monitor.writers" in killed[1]
    assert not {"tensorflow", "tensorboard", "clu"} & killed[1]


STARTS = """
    import sys
    from scaling_dit.monitor.writers import TensorBoardWriter
    folder = sys.argv[1] + "/starts"
    def start(begin, steps, **options):
        writer = TensorBoardWriter(folder)
        writer.begin(begin, **options)
        for step in steps:
            writer.scalars(step, {"loss": float(100 * number + step)})
        writer.flush()
        return writer
    # Killed at 6 after a save at 4; killed again before it saved; evaluated again at 8; went back to 6.
    for number, (begin, steps, options) in enumerate(
        [(0, range(1, 7), {}), (4, range(5, 8), {}), (4, range(5, 9), {}), (8, (9, 10), {"shown": {"loss": 208.0}})]
    ):
        writer = start(begin, steps, **options)
    number = 4
    writer.back_to(9)
    writer.scalars(10, {"loss": 410.0})
    writer.close()
"""


TENSORBOARD = """
    import sys
    import jax.numpy as jnp, numpy as np
    from scaling_dit.monitor.writers import create_writer
    with create_writer(sys.argv[1] + "/metrics", sys.argv[1] + "/tensorboard") as writer:
        writer.hparams({"seed": 1, "backbone.name": "uvit", "ema": (0.9, 0.99)})
        writer.parameter_overview({"dense": {"kernel": jnp.zeros((4, 250))}})
        for step in (10, 20):
            writer.scalars(step, {"train/loss": jnp.float32(1 / step)})
        writer.images(20, {"samples": np.full((8, 6, 3), 200, np.uint8)})
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that both scripts wrote to, in one process of its own: TensorFlow takes seconds to load."""
    folder = tmp_path_factory.mktemp("written")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TENSORBOARD) + textwrap.dedent(STARTS), folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    # It must load without a word on either stream.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture
def tensorboard_apart():
    """What a test imports of TensorBoard is forgotten after it, so that a later one may import it with TensorFlow."""
    before = set(sys.modules)
    yield
    for name in [name for name in set(sys.modules) - before if name.split(".")[0] == "tensorboard"]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("tensorboard_apart")
def test_tensorboard_reads_back_what_was_written(written, monkeypatch):
    # TensorBoard's own switch to read without TensorFlow, which this process then need not load.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    events = EventAccumulator(str(written / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tensors = {
        tag: [(event.step, event.tensor_proto) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    loss = [
        (step, np.frombuffer(proto.tensor_content, np.float32).item())
        for step, proto in tensors["train/loss"]
    ]
    assert loss == [(10, np.float32(0.1)), (20, np.float32(0.05))]
    ((step, samples),) = tensors["samples"]
    assert step == 20
    # Width and height, then the PNG files.
    assert samples.string_val[:2] == [b"6", b"8"]
    assert samples.string_val[2].startswith(b"\x89PNG")
    table = tensors["parameter_overview"][0][1].string_val[0].decode()
    assert "dense/kernel" in table and all(line.startswith("    ") for line in table.splitlines())
    summary = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    start = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content)
    assert start.hparams["backbone.name"].string_value == "uvit"
    assert start.hparams["seed"].number_value == 1
    assert start.hparams["ema"].string_value == "(0.9, 0.99)"
    assert [row["step"] for row in read_scalars(written / "metrics")] == [10, 20]


def test_a_line_that_the_disk_cuts_is_completed(tmp_path, monkeypatch):
    """Half of a row, then nothing, then again: what is read has each row once."""
    writer = JsonlWriter(tmp_path, patience=5)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    real, script = writer._rows._file, [3, OSError(28, "No space left on device"), 1, OSError(28, "full")]

    class Disk:
        def write(self, data):
            now = script.pop(0) if script else len(data)
            if isinstance(now, OSError):
                raise now
            return real.write(data[:now])

        def close(self):
            real.close()

    writer._rows._file = Disk()
    writer.scalars(1, {"loss": 1.0})
    writer.scalars(2, {"loss": 0.5})
    writer.close()
    assert not script
    assert read_scalars(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_disk_that_stays_full_is_a_fault_of_storage(tmp_path, monkeypatch):
    writer = JsonlWriter(tmp_path)
    monkeypatch.setattr(
        writer._rows, "_flush", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError, match=r"cannot write .*segment-00001.jsonl: No space left on device"):
        writer.scalars(1, {"loss": 1.0})


def test_an_error_that_ends_the_run_is_not_hidden_by_closing(tmp_path, monkeypatch):
    with pytest.raises(KeyError), create_writer(tmp_path / "metrics") as writer:
        monkeypatch.setattr(
            writer.writers[0], "close", lambda: (_ for _ in ()).throw(StorageError("the disk is full"))
        )
        raise KeyError


@pytest.mark.slow
@pytest.mark.usefixtures("tensorboard_apart")
def test_tensorboard_shows_each_step_once(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing import plugin_event_accumulator

    shown = plugin_event_accumulator.EventAccumulator(str(written / "starts")).Reload()
    events = shown.Tensors("loss")
    assert [event.step for event in events] == list(range(1, 11))
    values = [np.frombuffer(event.tensor_proto.tensor_content, np.float32).item() for event in events]
    assert values == [1, 2, 3, 4, 205, 206, 207, 208, 309, 410]

"""A second start of the same run finds every program that the first one compiled."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from scaling_dit.parallel import compile_cache
from tests.support import xla

START = """
    import collections, json, sys
    import jax
    from scaling_dit import config
    from scaling_dit.training import loop

    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    overrides = ["--config.compile_cache=workdir", "--config.log.tensorboard=false"]
    overrides += ["--config.optim.decay=constant", "--config.backbone.depth=1", f"--config.steps={sys.argv[2]}"]
    # Evaluation stays, with the program that samples its grid.
    overrides += ["--config.eval.metrics=()", "--config.sample.steps=1"]
    loop.train(config.load("experiments/shapes.py:smoke", overrides), sys.argv[1])
    names = ("hits", "misses")
    print(json.dumps({name: events[f"/jax/compilation_cache/cache_{name}"] for name in names}))
"""


def start(workdir, steps: int) -> dict[str, int]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices=1)}
    command = [sys.executable, "-c", textwrap.dedent(START), str(workdir), str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    first = start(tmp_path, 4)
    # Everything is compiled here.
    assert first["misses"] > 0
    # A start that resumes restores a checkpoint and does not initialise parameters, so it needs other small programs.
    start(tmp_path, 8)
    again = start(tmp_path, 12)
    assert again["misses"] == 0 and again["hits"] > 0
    assert any((tmp_path / "compile_cache").iterdir())


@pytest.fixture
def no_cache():
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", old)


@pytest.mark.parametrize(
    ("place", "folder"), [("", None), ("workdir", "run/compile_cache"), ("shared", "shared")]
)
def test_where_programs_are_kept(no_cache, monkeypatch, tmp_path, place, folder):
    limits = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    old = {name: getattr(jax.config, name) for name in limits}
    compile_cache.use(str(tmp_path / place) if place == "shared" else place, tmp_path / "run/compile_cache")
    found = jax.config.jax_compilation_cache_dir
    assert found == (folder and str(tmp_path / folder))
    for name, value in old.items():
        jax.config.update(name, value)


def test_a_folder_given_to_jax_itself_stands(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compile_cache.use("workdir", "elsewhere")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)

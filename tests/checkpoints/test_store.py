"""Checkpoints: exact round trips on any mesh, partial reads, retention, kills and damage."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from etils import epath
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.errors import UserError
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.parallel.rules import param_shardings, state_shardings
from tests.support.paths import ROOT


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: tuple
    emas: dict


def make_state(seed=0, width=16):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": rng.normal(size=(width, 8)), "bias": rng.normal(size=8)},
        "head": {"kernel": rng.normal(size=(8, 3)).astype(jnp.bfloat16)},
    }
    params = jax.tree.map(
        lambda a: jnp.asarray(a, a.dtype if a.dtype == jnp.bfloat16 else np.float32), params
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity())
    opt_state = optimiser.init(params)
    _, opt_state = optimiser.update(params, opt_state, params)
    halves = jax.tree.map(lambda a: a / 2, params)
    return State(jnp.int32(7), params, opt_state, {"0.99": halves, "0.999": params})


def target_on(state, devices=None, **mesh_sizes):
    """Abstract state with the shardings of a mesh."""
    mesh = make_mesh(devices=devices, **mesh_sizes)
    shardings = state_shardings(mesh, state, param_shardings(mesh, state.params))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def put(state, target):
    return jax.tree.map(lambda a, t: jax.device_put(a, t.sharding), state, target)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_any_mesh_reads_any_meshs_checkpoint(tmp_path):
    state = make_state()
    one, two = jax.devices()[:1], jax.devices()[:2]
    layouts = [
        target_on(state, data=1, fsdp=8),
        target_on(state, data=8),
        target_on(state, devices=one),
        target_on(state, data=1, fsdp=2, devices=two),
    ]
    with Checkpoints(tmp_path / "checkpoints", keep_last=9) as checkpoints:
        checkpoints.save(0, put(state, layouts[0]), {"seed": 3, "a": [1, {"b": None}]})
        for i, target in enumerate(layouts):
            got, extra = checkpoints.restore(i, target)
            assert_same(got, state)
            for a, t in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
                assert a.sharding.is_equivalent_to(t.sharding, a.ndim)
            assert extra == {"seed": 3, "a": [1, {"b": None}]}
            # Written from this layout for the next to read.
            checkpoints.save(i + 1, got, extra)
    kernel = got.opt_state[1][0].mu["dense"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None) and len(kernel.addressable_shards) == 2


def test_a_target_without_shardings_goes_to_one_device(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, put(state, target_on(state, data=1, fsdp=8)))
    with Checkpoints(epath.Path(tmp_path), read_only=True) as checkpoints:
        got, extra = checkpoints.restore(None, jax.eval_shape(lambda: state))
    assert_same(got, state)
    assert extra == {}
    assert got.params["dense"]["kernel"].devices() == {jax.devices()[0]}


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    rng = np.random.default_rng(0)
    arrays = {"params": {str(i): rng.normal(size=(512, 512)).astype(np.float32) for i in range(8)}}
    with Checkpoints(tmp_path) as checkpoints:
        state = jax.tree.map(lambda a: jax.device_put(a.copy(), sharding), arrays)
        checkpoints.save(1, state)
        for _ in range(5):
            state = overwrite(state)
        got, _ = checkpoints.restore(1, state)
    assert_same(got, jax.tree.map(jnp.asarray, arrays))


def test_replicas_share_what_is_large_and_one_writes_the_rest(tmp_path):
    whole = NamedSharding(make_mesh(devices=jax.devices()[:2]), PartitionSpec())
    sizes = {"large": 2**19, "small": 2**18}
    arrays = {name: jax.device_put(np.ones(size, np.float32), whole) for name, size in sizes.items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": arrays})
        saved = checkpoints._metadata(1)["params"]
        # A half of each has one MiB, and half a MiB.
        assert {name: leaf.storage.chunk_shape for name, leaf in saved.items()} == {
            "large": (2**18,),
            "small": (2**18,),
        }
        assert_same(checkpoints.restore(1, {"params": arrays})[0]["params"], arrays)


def test_params_and_emas_alone(tmp_path):
    state = make_state()
    target = jax.eval_shape(lambda: state.params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"seed": 3})
        params, extra = checkpoints.restore_params(None, target)
        average, _ = checkpoints.restore_params(7, target, ema="0.99")
        assert checkpoints.ema_names() == ["0.99", "0.999"]
        with pytest.raises(UserError, match=r"no EMA '0.9999' .*did you mean '0.999'"):
            checkpoints.restore_params(7, target, ema="0.9999")
        wrong = {**target, "head": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}}
        with pytest.raises(
            UserError, match=r"emas/0.99/head/kernel is bfloat16\[8, 3\] there, bfloat16\[8, 4\] here"
        ):
            checkpoints.restore_params(7, wrong, ema="0.99")
    assert_same(params, state.params)
    assert_same(average, state.emas["0.99"])
    assert extra == {"seed": 3}


def bytes_read():
    metric = "/tensorstore/kvstore/file/bytes_read"
    return sum(
        v["value"] for m in tensorstore.experimental_collect_matching_metrics(metric) for v in m["values"]
    )


def test_a_partial_restore_does_not_read_the_rest(tmp_path):
    rng = np.random.default_rng(0)
    # 8 MiB, hardly compressible.
    big = {"w": jnp.asarray(rng.normal(size=(1024, 2048)), jnp.float32)}
    state = {"params": {"w": big["w"][:8]}, "opt_state": {"mu": big, "nu": big}, "emas": {"0.9": big}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        start = bytes_read()
        checkpoints.restore_params(1, jax.eval_shape(lambda: state["params"]))
        part = bytes_read() - start
        checkpoints.restore(1, jax.eval_shape(lambda: state))
        whole = bytes_read() - start - part
    assert whole > 20 * 2**20
    assert part < 4 * 2**20


def test_keep_last_and_keep_every(tmp_path):
    state = {"params": {"w": jnp.ones(4)}}
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in range(1, 12):
            assert checkpoints.save(step, state)
        checkpoints.wait()
        assert checkpoints.all_steps() == [4, 8, 10, 11]
        assert checkpoints.latest_step() == 11
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10, 11]


def test_a_save_between_regular_ones_pushes_none_of_them_out(tmp_path):
    kept = {4: [4], 8: [4, 8], 9: [4, 8, 9], 11: [4, 8, 9, 11], 12: [8, 11, 12], 16: [12, 16]}
    with Checkpoints(tmp_path, keep_last=2, every=4) as checkpoints:
        for step, steps in kept.items():
            checkpoints.save(step, {"params": {"w": jnp.ones(4)}}, wait=True)
            assert checkpoints.all_steps() == steps


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, {"params": {"w": jnp.ones(4)}})
        assert not checkpoints.save(5, {"params": {"w": jnp.zeros(4)}}, wait=True)
        got, _ = checkpoints.restore(5, {"params": {"w": jnp.zeros(4)}})
    np.testing.assert_array_equal(got["params"]["w"], np.ones(4))


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": -1}])
def test_retention_that_would_lose_everything_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, **options)


def test_a_different_tree_is_reported_by_path(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, jax.eval_shape(lambda: make_state(width=24)))
        message = str(error.value)
        assert "emas/0.99/dense/kernel is float32[16, 8] there, float32[24, 8] here" in message
        assert "and 2 more" in message and "\n" not in message
        renamed = state.replace(params={"new": state.params["head"], "head": state.params["head"]}, emas={})
        with pytest.raises(UserError, match=r"emas/0.99/dense/bias is only in the checkpoint.*; and 6 more"):
            checkpoints.restore(1, renamed)
        with pytest.raises(
            UserError, match=r"params/head/kernel is bfloat16\[8, 3\] there, float32\[8, 3\] here"
        ):
            head = {"kernel": state.params["head"]["kernel"].astype(jnp.float32)}
            checkpoints.restore(1, state.replace(params={**state.params, "head": head}))


def test_missing_checkpoints_are_reported(tmp_path):
    target = {"params": {"w": jnp.ones(4)}}
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match="no complete checkpoint in .*none"):
            checkpoints.restore(None, target)
        with pytest.raises(UserError, match="read only"):
            checkpoints.save(1, target)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, target)
        with pytest.raises(UserError, match=r"no checkpoint of step 4 in .*: \[3\]"):
            checkpoints.restore(4, target)


def _remove_state(folder):
    shutil.rmtree(folder / "state")


def _remove_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _remove_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def _remove_arrays(folder):
    for data in folder.glob("state/**/d/*"):
        data.unlink()


def _truncate_arrays(folder):
    for data in folder.glob("state/**/d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def _remove_extra(folder):
    shutil.rmtree(folder / "extra")


@pytest.mark.parametrize(
    "harm",
    [_remove_state, _remove_everything, _remove_manifest, _remove_arrays, _truncate_arrays, _remove_extra],
)
# TensorStore finishes a second read after the first has failed, and finds nobody waiting.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_reported_in_one_line_with_the_folder(tmp_path, harm):
    state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.int32(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
    harm(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(None, state)
        assert f"{tmp_path}/2 is damaged or incomplete" in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert_same(checkpoints.restore(1, state)[0], state)


KILLED = """
    import os, signal, sys, time
    import jax.numpy as jnp, numpy as np
    from scaling_dit.checkpoints.store import Checkpoints

    folder, delay = sys.argv[1], float(sys.argv[2])
    checkpoints = Checkpoints(folder, keep_last=1)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 4096)), jnp.float32)
    checkpoints.save(1, {"params": {"w": jnp.arange(4.0)}}, wait=True)
    checkpoints.save(2, {"params": {str(i): noise + i for i in range(4)}})
    while not any(name.startswith("2") for name in os.listdir(folder)):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("delay", [pytest.param(0.0, marks=pytest.mark.slow), 0.02])
def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path, delay):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, str(delay)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL
    # Step 1, and what was written of step 2.
    assert len(list(tmp_path.iterdir())) == 2
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.all_steps() == [1]
    # A reader cleans nothing: the writer may be alive.
    assert len(list(tmp_path.iterdir())) == 2
    target = {"params": {"w": jnp.zeros(4)}}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        got, _ = checkpoints.restore(None, target)
        np.testing.assert_array_equal(got["params"]["w"], np.arange(4.0))
        assert checkpoints.save(2, got, wait=True)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_saving_is_quiet_and_needs_no_tensorflow(tmp_path):
    code = """
        import sys
        from absl import logging
        logging.set_verbosity(logging.INFO)
        import jax.numpy as jnp
        from scaling_dit.checkpoints.store import Checkpoints
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"params": {"w": jnp.ones(4)}})
        with Checkpoints(sys.argv[1], read_only=True) as checkpoints:
            checkpoints.restore(None, {"params": {"w": jnp.ones(4)}})
        assert not {"tensorflow", "torch"} & set(sys.modules)
        logging.info("from the program itself")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "from the program itself" not in line] == []
    assert "from the program itself" in done.stderr

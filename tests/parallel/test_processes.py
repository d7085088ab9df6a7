"""Two real processes, two devices each: who reads which rows, and one checkpoint written by both."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from tests.support import xla
from tests.support.paths import ROOT

PROCESS = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from scaling_dit.checkpoints.store import Checkpoints
    from scaling_dit.parallel import rules
    from scaling_dit.parallel.mesh import make_mesh

    abstract = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    for number, sizes in enumerate([{"data": 1, "fsdp": 4}, {"data": 2, "tensor": 2}, {"data": 4}], 1):
        mesh = make_mesh(**sizes)
        held = rules.local_positions(mesh, 8)
        assert held.tolist() == list(range(4 * rank, 4 * rank + 4))
        rows = rules.to_global({"x": held * 10}, mesh, 8)["x"]
        assert rows.shape == (8,)
        for shard in rows.addressable_shards:
            np.testing.assert_array_equal(shard.data, 10 * np.arange(8)[shard.index])

        shardings = rules.state_shardings(mesh, abstract, rules.param_shardings(mesh, abstract["params"]))
        make = jax.jit(
            lambda: {"params": {"w": jnp.arange(32.0).reshape(8, 4)}, "step": jnp.int32(3)}, out_shardings=shardings
        )
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        with Checkpoints(folder) as checkpoints:
            if number == 1:
                checkpoints.save(1, make(), {"rank": "both"})
            state, extra = checkpoints.restore(None, target)
        assert extra == {"rank": "both"}
        for shard in state["params"]["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.arange(32.0).reshape(8, 4)[shard.index])
    print("done", rank)
"""


@pytest.mark.slow
def test_two_processes_share_a_batch_and_a_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices=2),
    }
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=240)[0] for process in processes]
    for rank, (process, text) in enumerate(zip(processes, output, strict=True)):
        assert process.returncode == 0, text
        assert f"done {rank}" in text

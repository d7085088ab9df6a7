"""What the TPU's compiler makes of meshes, of gradients and of what remat keeps on the host; no TPU is needed."""

import json
import subprocess
import sys

import pytest

from tests.support.attention_checks import tpu_environment
from tests.support.paths import SUPPORT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slices_sums_over_devices_host_memory_and_stacks():
    worker = SUPPORT / "tpu_worker.py"
    environment = tpu_environment("v5e:2x4")
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # A row of the mesh along data is one slice.
    assert found["slices"] == [[0], [1]]
    assert found["bfloat16"] == ["bf16"]
    assert found["float32"] == ["f32"]
    without, offloaded = found["on host"]
    # Products of 3 layers on 8 of 64 rows of 128 tokens, 2,048 and 512 wide in bfloat16; not all are read again.
    assert without == 0 < offloaded <= 3 * 8 * 128 * (2048 + 512) * 2
    # Gathered parameters lie layer by layer; as XLA lays them, cutting the layers out is much of the step.
    by_layer, as_xla_lays = found["cut out"]
    assert 4 * by_layer < as_xla_lays

"""A source added as docs/extending.md says: two files, and a run trains from it."""

import json

import numpy as np
import pytest

from tests.support import extending


@pytest.mark.slow
def test_the_page_adds_a_source(tmp_path):
    copy = extending.carry_out("A source of images", tmp_path)
    assert copy.touched == {
        "scaling_dit/data/sources/arrays.py",
        "scaling_dit/data/sources/__init__.py",
        "docs/config.md",
    }
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, captions=[f"number {i}" for i in range(40)])
    (command,) = copy.commands
    copy.run(command, tmp_path, *extending.TINY, "--config.backbone.depth=1")
    assert (
        json.loads((tmp_path / "runs/arrays/config.json").read_text())["source"]["name"] == "npz:images.npz"
    )
    assert (tmp_path / "runs/arrays/checkpoints/2").is_dir()

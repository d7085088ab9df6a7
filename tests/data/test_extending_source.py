"""A source added as docs/extending.md says: two files, and a run trains from it."""

import json

import numpy as np
import pytest

from tests.support import extending


@pytest.mark.slow
def test_the_page_adds_a_source(tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(away / "images.npz", images=images, captions=[f"number {i}" for i in range(40)])

    def train(copy):
        assert len(copy.commands) == 1
        return extending.typed(copy.commands, away, *extending.TINY, "--config.backbone.depth=1")

    copy = extending.carry_out("A source of images", tmp_path / "copy", train)
    assert copy.code == 0, copy.printed
    assert copy.touched == {
        "scaling_dit/data/sources/arrays.py",
        "scaling_dit/data/sources/__init__.py",
        "docs/config.md",
    }
    assert json.loads((away / "runs/arrays/config.json").read_text())["source"]["name"] == "npz:images.npz"
    assert (away / "runs/arrays/checkpoints/2").is_dir()

"""From files of images to FID and KID: the numbers that torch-fidelity gives for the same folders and weights."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from scaling_dit.data.sources import create_source
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.metric import Item, Items
from scaling_dit.evaluation.scoring import Scoring, score
from scaling_dit.weights import pickles
from tests.support import fidelity

COUNT, SIDE = 8, 48


def write(folder, seed):
    """Random scenes of a few colours, as PNGs with their captions."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    images = []
    for i in range(COUNT):
        coarse = rng.integers(20 * seed, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03d}.png")
        images.append(np.asarray(image))
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": f"scene {i}"}) for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return np.stack(images)


@pytest.mark.slow
def test_two_folders_of_pngs_have_torch_fidelity_s_fid_and_kid(tmp_path, monkeypatch):
    fidelity.on_one_device(monkeypatch)
    ours, _ = write(tmp_path / "ours", 1), write(tmp_path / "real", 3)
    fidelity.inception(tmp_path)
    weights = tmp_path / "inception.safetensors"
    pickles.convert(epath.Path(tmp_path / "inception.pth"), epath.Path(weights))
    choices = {"kid_subsets": 4, "kid_subset_size": 4}
    theirs = fidelity.of_folders(tmp_path / "ours", tmp_path / "real", tmp_path / "inception.pth", **choices)

    source = create_source(f"folder:{tmp_path / 'real'}", image_size=SIDE, held_out_fraction=0.0)
    assert len(source) == COUNT
    found = {}
    for name, fields in (("fid", {"points": 0}), ("kid", {"subsets": 4, "subset_size": 4})):
        metric = METRICS[name](weights=str(weights), batch=8, **fields)
        metric = metric.with_reference(
            f"folder:{tmp_path / 'real'}", SIDE, epath.Path(tmp_path / "references")
        )
        items = Items(COUNT, lambda i: Item(str(i), "x"))
        found |= score(Scoring(name, metric, items, 8), [ours], 0)[0]["scalars"]
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    assert found["fid"] > 1

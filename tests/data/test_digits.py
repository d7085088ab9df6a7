"""The handwritten digits as a folder: real scans, captions that say which digit, written whole or not at all."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from scaling_dit.data import digits
from scaling_dit.data.sources import create_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits.write(tmp_path_factory.mktemp("digits") / "out")


def test_pictures_are_the_scans(folder):
    scans, labels = load_digits(return_X_y=True)
    source = create_source(f"folder:{folder}", image_size=16, held_out_fraction=0.0)
    assert len(source) == len(scans) == 1797
    records = [source[i] for i in range(300)]
    pictures = np.stack([record["image"] for record in records])
    assert pictures.shape == (300, 16, 16, 3)
    back = digits.to_scans(pictures)
    np.testing.assert_allclose(back, scans[:300].reshape(-1, 8, 8), atol=0.04)
    assert pictures.max() == 255
    assert pictures.min() == 0
    for record, label in zip(records, labels, strict=False):
        assert all(digits.WORDS[label] in caption for caption in record["captions"])
        assert record["captions"][0] == f"a handwritten {digits.WORDS[label]}"


def test_captions_and_labels_belong_to_the_pictures(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted({row["label"] for row in rows}) == list(range(10))
    pictures = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows[:900]]
    scans = digits.to_scans(np.stack(pictures)).reshape(len(pictures), -1)
    names = [row["texts"][0].split()[-1] for row in rows[:900]]
    classifier = SVC(gamma=0.001).fit(scans[:600], names[:600])
    assert classifier.score(scans[600:], names[600:]) > 0.93


def test_every_level_survives():
    scans = np.arange(17)[:, None, None] * np.ones((1, 8, 8))
    pictures = np.repeat(digits.to_images(scans)[..., None], 3, axis=-1)
    assert len(np.unique(pictures)) == 17
    np.testing.assert_array_equal(np.round(digits.to_scans(pictures)), scans)


def test_a_complete_folder_is_left_alone(folder):
    files = [folder / "metadata.jsonl", folder / "images" / "0000.png"]
    before = [(file.read_bytes(), file.stat().mtime) for file in files]
    assert digits.write(folder) == folder
    assert [(file.read_bytes(), file.stat().mtime) for file in files] == before


def test_an_interrupted_folder_has_no_metadata_and_is_completed(tmp_path, monkeypatch):
    saved = []

    def save(image, *arguments, **options):
        saved.append(image)
        if len(saved) > 20:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        assert digits.main([str(tmp_path)]) == 2
    assert not (tmp_path / "metadata.jsonl").exists()
    digits.write(tmp_path)
    assert len(create_source(f"folder:{tmp_path}", held_out_fraction=0.0)) == 1797
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "metadata.jsonl"]


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    assert digits.main([str(folder)]) == 0
    assert f"folder:{folder}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main([str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "pip install scikit-learn" in error
    assert error.count("\n") == 1

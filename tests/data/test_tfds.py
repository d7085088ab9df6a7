"""A TFDS set made in the test, in ArrayRecord: read without TensorFlow, damaged, in other formats, trained on."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources import create_source, tfds
from scaling_dit.errors import UserError
from scaling_dit.training.loop import train
from tests.support.image_sets import (
    SIZE,
    TOO_LARGE,
    UNREADABLE,
    check_same_rows_for_any_split,
    colour,
    picture,
)

# Number -> the kind of damage planted there.
PLAN = {
    3: "unreadable_image",
    4: "unreadable_image",
    17: "unreadable_image",
    20: "too_large",
    30: "empty_caption",
}
WHERE = {"image_field": "image", "alt_fields": ("captions/text",)}
FIELDS = {"image_size": SIZE, "held_out_fraction": 0.0, "max_pixels": 10_000, "max_damaged": 100} | WHERE


def prepare(folder, **options):
    from tests.support.tiny_tfds import TinySet

    builder = TinySet(data_dir=folder, file_format="array_record", **options)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of prepared sets."""
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of prepared sets with damaged records."""
    folder = tmp_path_factory.mktemp("planted")
    files = {n: UNREADABLE[n % 3] for n, kind in PLAN.items() if kind == "unreadable_image"} | {20: TOO_LARGE}
    prepare(folder, files=files, texts={30: [" ", ""]})
    return folder


def opened(folder, name="tiny_set", **fields):
    return create_source(f"tfds:{name}", data_dir=str(folder), **(FIELDS | fields))


def test_records_are_those_that_tfds_reads(sound):
    """The same records, one for one, as the decoded data source of TFDS itself."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(sound / "tiny_set" / "1.2.0")
    upstream = builder.as_data_source("train")
    source = opened(sound, synthetic_fields=("synthetic",))
    assert len(source) == len(upstream) == 40
    for i, expected in enumerate(upstream):
        record = source[i]
        assert (record["image"] == expected["image"]).all()
        told = [text.decode() for text in (*expected["captions"]["text"], *expected["synthetic"])]
        assert list(record["captions"]) == told
        assert record["kinds"] == ("alt",) * 2 + ("synthetic",) * 5
        number = int(expected["image/filename"].decode().removesuffix(".png"))
        assert (record["image"] == colour(number)).all()
    assert "tfds tiny_set: 40 images, 8x8 px, train split" in source.describe()
    assert len(opened(sound, tfds_split="val")) == 10
    assert len(opened(sound, tfds_split="train[:25%]")) == 10


def test_samples_of_a_shard(sound):
    source = opened(sound)
    (name,) = source.shards()
    samples = list(source.samples(0))
    assert [sample.key for sample in samples] == [f"{name}/{row}" for row in range(40)]
    numbers = [int(sample.captions[0].split()[1]) for sample in samples]
    assert sorted(numbers) == list(range(40))
    for number, sample in zip(numbers, samples, strict=True):
        # The file itself, not decoded.
        assert sample.image == picture(number)
        assert sample.metadata["similarity"] == 0.5
        assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    # A part of a split holds the same records under the same keys.
    part = opened(sound, tfds_split="train[10:20]")
    assert [sample.key for sample in part.samples(0)] == [sample.key for sample in samples[10:20]]
    assert [sample.captions for sample in part.samples(0)] == [sample.captions for sample in samples[10:20]]


def test_tensorflow_is_not_loaded(sound):
    code = (
        "import sys; from scaling_dit.data.sources import create_source;"
        f"s = create_source('tfds:tiny_set', data_dir={os.fspath(sound)!r}, image_field='image',"
        " alt_fields=('captions/text',)); s[0]; print('tensorflow' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_damage_is_counted_by_kind_and_stood_in_for(planted):
    source = opened(planted)
    for _ in range(2):
        numbers = {int(source[i]["captions"][0].split()[1]) for i in range(len(source))}
    assert numbers == set(range(40)) - PLAN.keys()
    assert source.damage.counts() == {"empty_caption": 1, "too_large": 1, "unreadable_image": 3}
    kept = [sample for sample in source.samples(0) if not isinstance(sample, DamagedRecord)]
    # Images are not decoded.
    assert len(kept) == 39
    (fault,) = source.damage.examples("empty_caption")
    path, _, record = fault.where.partition(" record ")
    assert pathlib.Path(path).exists() and 0 <= int(record) < 40
    strict = opened(planted, max_damaged=2)
    with pytest.raises(UserError, match="more than config.source.max_damaged=2 records are damaged"):
        [strict[i] for i in range(len(strict))]


def test_any_split_over_processes_reads_the_same_rows(planted):
    check_same_rows_for_any_split(lambda: opened(planted), steps=4)


def damaged_copy(sound, folder, change):
    """A copy of the prepared sets whose train file is changed."""
    shutil.copytree(sound, folder)
    (file,) = (folder / "tiny_set" / "1.2.0").glob("*train*")
    file.write_bytes(change(file.read_bytes()))
    return folder


def test_a_record_whose_checksum_is_wrong(sound, tmp_path):
    def flip(data):
        # Behind the file's own header, in the data of some record.
        place = next(i for i in range(3000, len(data)) if data[i])
        return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]

    source = opened(damaged_copy(sound, tmp_path / "flipped", flip))
    numbers = {int(source[i]["captions"][0].split()[1]) for i in range(len(source))}
    assert len(numbers) == 39
    assert source.damage.counts() == {"unreadable_record": 1}
    (fault,) = source.damage.examples("unreadable_record")
    assert "hash mismatch" in fault.what


def test_a_cut_file_and_a_wrong_count_stop_at_once(sound, tmp_path):
    cut = damaged_copy(sound, tmp_path / "cut", lambda data: data[: len(data) // 2])
    with pytest.raises(
        UserError, match=r"tiny_set-train.array_record-\S+: no whole ArrayRecord file, cut or damaged"
    ):
        opened(cut)
    other = tmp_path / "other"
    shutil.copytree(sound, other)
    info = other / "tiny_set/1.2.0/dataset_info.json"
    told = json.loads(info.read_text())
    told["splits"][0]["shardLengths"] = ["41"]
    info.write_text(json.dumps(told))
    with pytest.raises(UserError, match="it holds 40 records and dataset_info.json says 41; copy it again"):
        opened(other)


@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        (
            "tfrecord",
            r"the set is in tfrecord, without random access; run first \(tensorflow and mlcroissant must be"
            r" installed\): tfds convert_format"
            r" --dataset_version_dir=\S+/tiny_set/1.2.0 --out_file_format=array_record$",
        ),
        ("parquet", "the set is in parquet: the parquet writer of TFDS drops records; prepare the set again"),
    ],
)
def test_other_formats_are_refused(sound, tmp_path, file_format, message):
    shutil.copytree(sound, tmp_path / "other")
    info = tmp_path / "other/tiny_set/1.2.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', f'"{file_format}"'))
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path / "other")
    assert "\n" not in str(error.value)


def test_names_and_fields_are_checked(sound, tmp_path):
    folder = sound / "tiny_set" / "1.2.0"
    # A folder instead of a name.
    assert len(opened("", name=str(folder))) == 40
    assert len(opened(sound, name="tiny_set:1.2.0")) == 40
    for name, fields, message in (
        ("tiny_st", {}, "no TFDS set 'tiny_st' in .*; did you mean 'tiny_set'"),
        ("tiny_set:9.9.9", {}, "no version '9.9.9' of TFDS set 'tiny_set'"),
        ("tiny_set", {"tfds_split": "trian[:10%]"}, "tfds_split is 'trian.*; did you mean 'train'"),
        ("tiny_set", {"image_field": ""}, "image_field is '' for TFDS set 'tiny_set'; it must be one of .*: image"),
        ("tiny_set", {"image_field": "synthetic"}, "it must be one of its images: image"),
        ("tiny_set", {"alt_fields": ()}, "'tiny_set' is not known; set it: .* captions/text, image/filename, syn"),
        ("tiny_set", {"alt_fields": ("captions/txt",)}, "'captions/txt'; .* did you mean 'captions/text'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            opened(sound, name=name, **fields)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="names no data set; write tfds:NAME, for example tfds:coco_captions"):
        create_source("tfds:")
    with pytest.raises(UserError, match="no TFDS set 'tiny_set' in .*nowhere; set config.source.data_dir"):
        opened(tmp_path / "nowhere")


def test_versions_and_configs(tmp_path, monkeypatch):
    for name in ("coco_captions/2014/1.0.0", "coco_captions/2014/1.10.0", "coco_captions/2014/1.9.0",
                 "laion400m/images/1.0.0", "laion400m/embeddings/1.0.0"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / tfds.INFO).write_text("{}")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = {name: tfds.find(name).relative_to(tmp_path).as_posix() for name in (
        "coco_captions", "coco_captions/2014", "coco_captions/2014:1.9.0", "coco_captions:1.0.0", "laion400m/images",
    )}  # fmt: skip
    assert found == {
        "coco_captions": "coco_captions/2014/1.10.0",
        "coco_captions/2014": "coco_captions/2014/1.10.0",
        "coco_captions/2014:1.9.0": "coco_captions/2014/1.9.0",
        "coco_captions:1.0.0": "coco_captions/2014/1.0.0",
        "laion400m/images": "laion400m/images/1.0.0",
    }
    with pytest.raises(
        UserError, match="needs one prepared config; there is laion400m/embeddings, laion400m/images"
    ):
        tfds.find("laion400m")
    with pytest.raises(UserError, match="no prepared TFDS set"):
        create_source("tfds:laion400m/images")


def test_the_known_sets_have_these_fields():
    """The field maps name features that the builders of TFDS declare (read from their code: making one needs TF)."""
    import tensorflow_datasets

    package = pathlib.Path(tensorflow_datasets.__file__).parent
    coco = (package / "object_detection/coco_captions.py").read_text()
    assert "features['captions'] = tfds.features.Sequence({\n        'text'" in coco
    assert "'image': tfds.features.Image" in (package / "object_detection/coco.py").read_text()
    laion = (package / "vision_language/laion400m/laion400m.py").read_text()
    assert "'caption': tfds.features.Text" in laion and "'image': tfds.features.Image" in laion
    assert tfds.FIELDS == {
        "coco_captions": ("image", ("captions/text",)),
        "laion400m": ("image", ("caption",)),
    }


def test_a_known_set_needs_no_fields(tmp_path, monkeypatch):
    """A set of the name and the features of coco_captions opens by its name alone."""
    from tests.support.tiny_tfds import TinySet

    monkeypatch.setattr(TinySet, "name", "coco_captions")
    prepare(tmp_path)
    source = create_source("tfds:coco_captions", data_dir=str(tmp_path), image_size=SIZE)
    number = int(source[0]["captions"][0].split()[1])
    assert list(source[0]["captions"]) == [f"number {number}", f"the {number}"]


@pytest.mark.slow
def test_a_tfds_set_trains(sound, tmp_path):
    from scaling_dit import config as config_lib

    config = config_lib.load(
        "shapes:smoke",
        [
            "--config.source.name=tfds:tiny_set", f"--config.source.data_dir={sound}",
            "--config.source.image_field=image", "--config.source.alt_fields=('captions/text',)",
            "--config.source.synthetic_fields=('synthetic',)", "--config.captions.policy=mix",
            f"--config.source.image_size={SIZE}", "--config.eval.every=0", "--config.log.tensorboard=false",
            "--config.batch=16", "--config.steps=4", "--config.backbone.depth=1",
        ],
    )  # fmt: skip
    assert int(train(config, tmp_path, jax.devices()[:1]).step) == 4


@pytest.mark.slow
def test_the_convert_command_makes_a_set_that_is_read(tmp_path):
    """A TFRecord set is refused, the command of the line runs, and the set then opens with the same records."""
    from tests.support.tiny_tfds import TinySet

    builder = TinySet(data_dir=tmp_path, file_format="tfrecord")
    builder.download_and_prepare()
    with pytest.raises(UserError, match="tfds convert_format") as error:
        opened(tmp_path)
    command = str(error.value).rpartition("): ")[2].split()
    assert command[0] == "tfds"
    # The program imports mlcroissant for a command of its own, which is not this one.
    launch = (
        "import sys, unittest.mock; sys.modules['mlcroissant'] = unittest.mock.MagicMock();"
        "from tensorflow_datasets.scripts.cli.main import launch_cli; launch_cli()"
    )
    subprocess.run([sys.executable, "-c", launch, *command[1:]], check=True, capture_output=True)
    source = opened(tmp_path)
    assert sorted(source[i]["captions"][0] for i in range(len(source))) == sorted(
        f"number {n}" for n in range(40)
    )

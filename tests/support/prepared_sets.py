"""Preparing tars of raw images in this process, and reading back what came of them."""

import pathlib

from etils import epath

from scaling_dit import config as config_lib
from scaling_dit.curation import job
from scaling_dit.data.prepared import manifest
from scaling_dit.data.sources import create_source
from tests.support import raw_images

# px
SIDE = 16


def config_of(folder, *overrides):
    """A config that prepares the tars of a folder, with the DCT codec by default."""
    base = (
        f"--config.source.name=webdataset:{folder}/*.tar",
        f"--config.source.image_size={SIDE}",
        "--config.codec.name=dct",
    )
    return config_lib.load("shapes:smoke", [*base, *overrides])


def prepare(folder, out, *overrides, **options):
    """Runs one process of `prepare` in this one."""
    return job.main(config_of(folder, *overrides), str(out), job.Options(**{"batch": 16, **options}))


def contents(folder):
    """Every file of a set, by its name; without the unfinished ones that a kill leaves."""
    paths = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_all(folder, image_size=SIDE):
    """Every record of a set by its key, with the split it is in."""
    train = create_source(f"latents:{folder}", image_size=image_size)
    found = {}
    held_out = manifest.read(epath.Path(folder)).records["held_out"]
    for split in (train, train.held_out()) if held_out else (train,):
        for record in split.__getitems__(range(len(split))):
            assert record["key"] not in found
            found[record["key"]] = record | {"split": split.split}
    return found


def read_parts(folder):
    return [
        manifest.Part.from_json(path.read_text()) for path in sorted((folder / manifest.PARTS).glob("*.json"))
    ]


def assert_holds(folder, made):
    """A set holds every sound image of a raw set, and reports the fault of each other one."""
    records = read_all(folder)
    assert {key: record["captions"] for key, record in records.items()} == {
        key: (caption,) for key, caption in made.good.items()
    }
    found = {kind: [] for kind in raw_images.KINDS}
    for part in read_parts(folder):
        for fault in part.damaged:
            found[fault["kind"]].append(made.places[fault["where"]])
    assert {kind: sorted(keys) for kind, keys in found.items()} == {
        kind: sorted(keys) for kind, keys in made.broken.items()
    }
    found = manifest.read(epath.Path(folder))
    assert {kind: left["count"] for kind, left in found.left_out.items()} == {
        kind: len(keys) for kind, keys in made.broken.items() if keys
    }
    assert all(1 <= len(left["examples"]) <= manifest.EXAMPLES for left in found.left_out.values())
    assert sum(found.records.values()) == len(made.good)
    assert found.read == len(made.good) + sum(len(keys) for keys in made.broken.values())

"""Webdatasets of real and rendered images with every kind of damage, and the list of the damage."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

from scaling_dit.data.shapes.scenes import ShapesSpec, make_scene, render

FORMATS = {
    "jpg": {"format": "JPEG", "quality": 90},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 80},
}
# What a broken sample is counted as; `duplicate_key` and `missing_caption` are about its members.
KINDS = ("unreadable_image", "bad_json", "empty_caption", "missing_caption", "duplicate_key")


@dataclasses.dataclass
class Made:
    """What a set holds."""

    # Key -> caption.
    good: dict[str, str]
    # Kind -> keys, in the order written.
    broken: dict[str, list[str]]
    # "TAR at byte OFFSET" -> key of the member that begins there.
    places: dict[str, str]


def photographs():
    """Photographs that come with scikit-image and scikit-learn, uint8 [H, W, 3] each."""
    own = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    return [*own, *load_sample_images().images]


def write_webdataset(folder, tars, samples, *, broken=0.01, seed=0, sides=(32, 64)):
    """`tars` tars of `samples` each; a share of `broken` is spread over all kinds of damage.

    Images are crops of a photograph or a scene of shapes, in turn over the three formats; every tenth image is one
    that came before, under a key of its own.
    """
    rng = np.random.default_rng(seed)
    photos = photographs()
    scenes = [render(make_scene(ShapesSpec(), "train", i)) for i in range(64)]
    made, earlier = Made({}, {kind: [] for kind in KINDS}, {}), []
    folder.mkdir(parents=True, exist_ok=True)
    for tar_number in range(tars):
        name = f"{tar_number:05d}"
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(samples):
                key = f"{tar_number:04d}{i:05d}"
                extension = ("jpg", "png", "webp")[i % 3]
                kind = KINDS[int(rng.integers(len(KINDS)))] if rng.random() < broken else None
                if i % 10 == 9 and earlier:
                    image, extension = earlier[int(rng.integers(len(earlier)))]
                else:
                    image = _encode(_image(rng, photos, scenes, sides), extension)
                    if len(earlier) < 200:
                        earlier.append((image, extension))
                _write(tar, made, f"{name}/{key}", key, extension, image, kind, rng)
        with tarfile.open(folder / f"{name}.tar") as tar:
            made.places |= {
                f"{folder / name}.tar at byte {member.offset_data}": f"{name}/{member.name.partition('.')[0]}"
                for member in tar
            }
    return made


def _image(rng, photos, scenes, sides):
    side = int(rng.integers(*sides, endpoint=True))
    if rng.random() < 0.3:
        return Image.fromarray(scenes[int(rng.integers(len(scenes)))]).resize((side, side))
    photo = photos[int(rng.integers(len(photos)))]
    height, width = side, int(side * rng.uniform(0.75, 1.5))
    top, left = (
        int(rng.integers(0, full - part)) for full, part in zip(photo.shape, (height, width), strict=False)
    )
    return Image.fromarray(photo[top : top + height, left : left + width])


def _encode(image, extension):
    buffer = io.BytesIO()
    image.save(buffer, **FORMATS[extension])
    return buffer.getvalue()


def _write(tar, made, full_key, key, extension, image, kind, rng):
    caption = f"picture {key}"
    members = {
        extension: image,
        "txt": caption.encode(),
        "json": json.dumps({"aesthetic": int(rng.integers(10))}).encode(),
    }
    if kind == "unreadable_image":
        members[extension] = image[: len(image) // 3]
    elif kind == "bad_json":
        members["json"] = b'{"aesthetic": '
    elif kind == "empty_caption":
        members["txt"] = b"  "
    elif kind == "missing_caption":
        del members["txt"]
    if kind is None or kind == "duplicate_key":
        made.good[full_key] = caption
    if kind is not None:
        made.broken[kind].append(full_key)
    for ending, data in members.items():
        _add(tar, f"{key}.{ending}", data)
    # The same key once more, behind another, as a webdataset reader sees it.
    if kind == "duplicate_key":
        _add(tar, f"{key}-between.{extension}", image)
        _add(tar, f"{key}-between.txt", b"between")
        made.good[f"{full_key}-between"] = "between"
        _add(tar, f"{key}.{extension}", image)
        _add(tar, f"{key}.txt", b"again")


def _add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

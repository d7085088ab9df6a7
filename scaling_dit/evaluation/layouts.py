"""Images in the layouts that official tools read, so that a score can be made by its authors' own code.

| layout | files | read by |
|---|---|---|
| tifa | images/ID.png, images.json | tifa_score_benchmark(..., id2img_path="images.json") |
| hpsv2 | STYLE/00000.jpg | hpsv2.evaluate(folder) |
| image_reward | MODEL/ID_0.png, ... | ImageReward's benchmark, --img_dir |
| geneval | 00000/metadata.jsonl, 00000/samples/0000.png, ... | evaluate_images.py FOLDER |
| dpg | ID.png, a grid of 2x2 images | compute_dpg_bench.py --image-root-path |
| compbench | samples/PROMPT_000000.png | T2I-CompBench, --out_dir |
| brushbench | mapping_file.json, images/, inpainted/ | BrushNet's evaluate_brushnet.py |
| editbench | editbench.jsonl, references/, masks/, inpainted/ | nothing: EditBench is scored by people |
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from scaling_dit.data.conditions.inpaint import size_name
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import inpainting
from scaling_dit.monitor.grid import write_png

# Few enough loss, which the published folder has as well; its reader takes .jpg only.
_JPEG = {"quality": 95, "subsampling": 0}
# An item with its images, uint8 [K, H, W, 3].
Pairs = Iterator[tuple[Item, np.ndarray]]


def write_layout(name: str, pairs: Pairs, out: epath.Path, model: str = "scaling_dit") -> None:
    """Writes images as an official tool reads them.

    Args:
      pairs: each item with its images.
      model: the name of the folder of a model, for layouts that have one.

    Raises:
      UserError: no such layout, prompts that it cannot hold, or another number of images for each than it takes.
    """
    if name not in LAYOUTS:
        raise UserError(f"--layout={name}: {nearest(name, LAYOUTS)}")
    out.mkdir(parents=True, exist_ok=True)
    LAYOUTS[name](pairs, out, model)


def _tifa(pairs: Pairs, out: epath.Path, model: str) -> None:
    paths = {}
    for item, images in pairs:
        (image,) = _exactly(images, 1, "tifa")
        paths[item.id] = f"images/{item.id}.png"
        _png(out / paths[item.id], image)
    tifa.write_image_map(out / "images.json", paths)


def _hpsv2(pairs: Pairs, out: epath.Path, model: str) -> None:
    for item, images in pairs:
        (image,) = _exactly(images, 1, "hpsv2")
        style, number = _meta(item, ("style", "number"), "hpsv2")
        _jpeg(out / style / f"{number:05d}.jpg", image)


def _image_reward(pairs: Pairs, out: epath.Path, model: str) -> None:
    for item, images in pairs:
        for number, image in enumerate(images):
            _png(out / model / f"{item.id}_{number}.png", image)


def _geneval(pairs: Pairs, out: epath.Path, model: str) -> None:
    for item, images in pairs:
        _meta(item, ("tag", "include", "prompt"), "geneval")
        if not item.id.isdigit():
            raise UserError(f"--layout=geneval: {item.id!r} is no number; sample --prompt_set=geneval:FILE")
        for number, image in enumerate(images):
            _png(out / item.id / "samples" / f"{number:04d}.png", image)
        (out / item.id / "metadata.jsonl").write_text(json.dumps(dict(item.meta)))


def _dpg(pairs: Pairs, out: epath.Path, model: str) -> None:
    for item, images in pairs:
        if len(images) not in (1, 4):
            raise UserError(f"--layout=dpg: {len(images)} images of a prompt; give --num=4, or 1")
        if "." in item.id:
            raise UserError(f"--layout=dpg: {item.id!r} has a dot, at which the official tool cuts an id")
        grid = images[0]
        if len(images) == 4:
            grid = np.concatenate([np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)])
        _png(out / f"{item.id}.png", grid)


def _compbench(pairs: Pairs, out: epath.Path, model: str) -> None:
    number = 0
    for item, images in pairs:
        # The official tool takes what stands before the first "_" for the prompt.
        if re.search(r"[_/\\\0]", item.prompt) or len(item.prompt.encode()) > 240:
            raise UserError(
                f"--layout=compbench: the prompt {item.prompt[:60]!r} cannot be part of a file's name; it must have "
                "neither '_' nor '/', and at most 240 bytes"
            )
        for image in images:
            _png(out / "samples" / f"{item.prompt}_{number:06d}.png", image)
            number += 1


def _brushbench(pairs: Pairs, out: epath.Path, model: str) -> None:
    entries = {}
    for item, images in pairs:
        (image,) = _exactly(images, 1, "brushbench")
        truth, mask = _inpainted(item, "brushbench")
        if mask.shape != (inpainting.SIDE, inpainting.SIDE):
            raise UserError(
                f"--layout=brushbench: the image of prompt {item.id!r} has {mask.shape[1]}x{mask.shape[0]} pixels; the "
                f"official tool reads every mask as {inpainting.SIDE}x{inpainting.SIDE}"
            )
        name = item.meta.get("image", f"images/{item.id}.png")
        # The official tool looks for the result under the name of the image; no lossy format but the image's own.
        _in_its_format(out / name, truth)
        place = out / "inpainted" / name
        _in_its_format(place, image)
        # Unless the image without its masked part lies there too, the official tool makes a result of its own.
        hidden = place.parent / place.name.replace(".jpg", "_masked.jpg")
        if hidden != place:
            _in_its_format(hidden, np.where(mask[..., None], np.uint8(0), truth))
        # The file has the mask of the object first, whichever of both the images were made with.
        of_object = ~mask if item.meta.get("mask") == inpainting.MASKS[1] else mask
        entries[item.meta.get("key", item.id)] = inpainting.entry(name, item.prompt, of_object)
    (out / inpainting.MAPPING).write_text(json.dumps(entries))


def _in_its_format(place: epath.Path, pixels: np.ndarray) -> None:
    _png(place, pixels) if place.name.endswith(".png") else _jpeg(place, pixels)


def _editbench(pairs: Pairs, out: epath.Path, model: str) -> None:
    rows = []
    for item, images in pairs:
        truth, mask = _inpainted(item, "editbench")
        _png(out / "references" / f"{item.id}.png", truth)
        _png(
            out / "masks" / f"{item.id}.png",
            np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, -1),
        )
        for number, image in enumerate(images):
            _png(out / "inpainted" / f"{item.id}_{number}.png", image)
        share = float(mask.mean())
        rows.append(
            {"id": item.id, "prompt": item.prompt, "mask_share": share, "mask_size": size_name(share)}
        )
    (out / "editbench.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _inpainted(item: Item, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The whole image and the mask, bool [H, W], of an item."""
    condition = item.conditions.get("inpaint")
    if item.truth is None or condition is None:
        raise UserError(
            f"--layout={name}: prompt {item.id!r} has no image and mask; sample --prompt_set=brushbench:FOLDER"
        )
    return item.truth, condition[..., 3] > 127


LAYOUTS: Mapping[str, Callable[[Pairs, epath.Path, str], None]] = {
    "tifa": _tifa,
    "hpsv2": _hpsv2,
    "image_reward": _image_reward,
    "geneval": _geneval,
    "dpg": _dpg,
    "compbench": _compbench,
    "brushbench": _brushbench,
    "editbench": _editbench,
}


def _exactly(images: np.ndarray, count: int, name: str) -> np.ndarray:
    if len(images) != count:
        raise UserError(
            f"--layout={name}: {len(images)} images of a prompt; it takes {count}: leave out --num"
        )
    return images


def _meta(item: Item, keys: Sequence[str], name: str) -> list:
    missing = [key for key in keys if key not in item.meta]
    if missing:
        raise UserError(
            f"--layout={name}: prompt {item.id!r} has no {', '.join(missing)}; sample --prompt_set={name}:PATH"
        )
    return [item.meta[key] for key in keys]


def _jpeg(path: epath.Path, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **_JPEG)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _png(path: epath.Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, image)

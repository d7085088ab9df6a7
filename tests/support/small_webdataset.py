"""Writes small webdatasets, as img2dataset does, for the tests of what reads whole sets."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def encoded(pixels, kind="PNG", **options):
    """uint8 [H, W, 3] as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, samples):
    """samples: (key, image bytes, caption, metadata) of each; None leaves a member out."""
    with tarfile.open(path, "w") as tar:
        for key, image, caption, metadata in samples:
            members = {
                "png": image,
                "txt": None if caption is None else caption.encode(),
                "json": None if metadata is None else json.dumps(metadata).encode(),
            }
            for ending, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

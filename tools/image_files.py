"""Image files of any pixel type, and colour profiles, written byte by byte: for `tools/image_modes.py` and tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# Columns: the colorants of Display P3 and of sRGB, adapted to D50.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(values: np.ndarray, depth: int) -> bytes:
    """Samples as big-endian rows of `depth` bits, each row padded to whole bytes."""
    rows = values.reshape(len(values), -1)
    bits = (rows[..., None].astype(np.int64) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def png(values: np.ndarray, depth: int, kind: int, *extra: bytes) -> bytes:
    """A PNG; `kind` is its colour type, `extra` are chunks between the header and the pixels."""
    height, width = values.shape[:2]
    rows = packed(values, depth)
    length = len(rows) // height
    filtered = b"".join(b"\0" + rows[i : i + length] for i in range(0, len(rows), length))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(
    values: np.ndarray, photometric: int, *, order: str = "<", bits: int = 0, **tags: int | tuple[int, ...]
) -> bytes:
    """An uncompressed TIFF of one strip; `tags` are more of them, as t338=2."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    depth = bits or values.dtype.itemsize * 8
    data = packed(values, depth) if bits else values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (depth,) * count, 259: (1,), 262: (photometric,), 273: (0,),
        277: (count,), 278: (height,), 279: (len(data),),
    }  # fmt: skip
    entries |= {
        int(name[1:]): value if isinstance(value, tuple) else (value,) for name, value in tags.items()
    }
    start = 8 + 2 + 12 * len(entries) + 4
    tail = b""
    rows = b""
    for tag, found in sorted(entries.items()):
        size = "I" if tag in (273, 279) else "H"
        body = struct.pack(f"{order}{len(found)}{size}", *found)
        if len(body) > 4:
            tail, body = tail + body, struct.pack(f"{order}I", start + len(tail))
        rows += struct.pack(f"{order}HHI", tag, 4 if size == "I" else 3, len(found)) + (
            b"STRIP" if tag == 273 else body.ljust(4, b"\0")
        )
    rows = rows.replace(b"STRIP", struct.pack(f"{order}I", start + len(tail)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + rows + bytes(4) + tail + data


def bmp(pixels: np.ndarray, alpha: np.ndarray | int | None) -> bytes:
    """A BMP of 32 bits with a mask for alpha in its header, or without one (None)."""
    height, width = pixels.shape[:2]
    fourth = np.full((height, width), 0 if alpha is None else alpha, np.uint8)
    data = np.dstack([pixels[..., ::-1], fourth])[::-1].tobytes()
    masks = (0xFF0000, 0xFF00, 0xFF, 0 if alpha is None else 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I", 56, width, height, 1, 32, 3, len(data), 0, 0, 0, 0, *masks)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


def profile(colorants: np.ndarray | None) -> bytes:
    """An ICC profile with a gamma of 2.2: of RGB with these colorants, or of grey (None)."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA * 256)) + bytes(2)
    xyz = lambda values: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))  # noqa: E731
    if colorants is None:
        return _profile({b"kTRC": curve}, b"GRAY", b"XYZ ", b"mntr")
    tags = {b"rXYZ": xyz(colorants[:, 0]), b"gXYZ": xyz(colorants[:, 1]), b"bXYZ": xyz(colorants[:, 2])}
    return _profile(tags | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}, b"RGB ", b"XYZ ", b"mntr")


def _profile(tags: dict[bytes, bytes], space: bytes, connection: bytes, kind: bytes) -> bytes:
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": b"XYZ " + bytes(4) + d50} | tags
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + d50
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def ink_profile() -> bytes:
    """An ICC profile of CMYK in which black alone makes L* fall from 100 to 0 in a line."""
    identity = bytes(range(256))
    corners = b"".join(
        bytes((0 if black or inks else 255, 128, 128)) for inks in range(8) for black in range(2)
    )
    one = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + one + identity * 4 + corners + identity * 3
    return _profile({b"A2B0": lut}, b"CMYK", b"Lab ", b"prtr")

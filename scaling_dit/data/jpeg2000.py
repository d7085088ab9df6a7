"""JPEG 2000 files: what Pillow needs of them, and what it does not read itself.

Pillow fails at a box of metadata of over 1 MB, does not read a colour profile, and does not scale every depth.
"""

from collections.abc import Iterator

_SIGNATURE = b"\0\0\0\x0cjP  "
_CODESTREAM = b"\xff\x4f\xff\x51"
# The boxes with the image; all others are metadata.
_NEEDED = (b"jP  ", b"ftyp", b"jp2h", b"jp2c")
# Where the marker SIZ, right after the start, has the number of components and their depths.
_COMPONENTS = 40


def readable(data: bytes) -> tuple[bytes, bytes | None]:
    """(the file without metadata, its colour profile); what is no JPEG 2000 file comes back as it is."""
    if not data.startswith(_SIGNATURE):
        return data, None
    parts, profile, changed = [], None, False
    for kind, box, body in _boxes(data):
        if kind == b"jp2h":
            colours = [inner for name, _, inner in _boxes(body) if name == b"colr"]
            # Method 2 is a profile; it follows method, precedence and approximation.
            profile = bytes(colours[0][3:]) if colours and colours[0][:1] == b"\2" else None
        if kind in _NEEDED:
            parts.append(box)
        else:
            changed = True
    return (b"".join(parts) if changed else data), profile


def bits(data: bytes) -> int:
    """Bits of a sample, 8 to 16.

    Raises:
      ValueError: a depth that Pillow does not scale to 8 or 16 bits, or signed pixels.
    """
    if data.startswith(_SIGNATURE):
        data = next((bytes(body[:1024]) for kind, _, body in _boxes(data) if kind == b"jp2c"), b"")
    count = int.from_bytes(data[_COMPONENTS : _COMPONENTS + 2], "big")
    depths = set(data[_COMPONENTS + 2 : _COMPONENTS + 2 + 3 * count : 3])
    # The highest bit says that the pixels are signed.
    found = depths.pop() + 1 if len(depths) == 1 else 0
    if found == 8 or (count == 1 and 8 < found <= 16):
        return found
    raise ValueError(
        "JPEG 2000 is read with unsigned pixels of 8 bits, grey also with 9 to 16; save such ones or PNG"
    )


def _boxes(data: bytes | memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """(kind, whole box, its contents), in order; the last one may be cut short."""
    whole, at = memoryview(data), 0
    while at + 8 <= len(whole):
        length, kind, head = int.from_bytes(whole[at : at + 4], "big"), bytes(whole[at + 4 : at + 8]), 8
        if length == 1:
            length, head = int.from_bytes(whole[at + 8 : at + 16], "big"), 16
        # 0: to the end of the file.
        end = at + length if length else len(whole)
        if end < at + head:
            return
        yield kind, whole[at:end], whole[at + head : end]
        at = end

"""PNG files whose metadata is large, or stands after the pixels, made readable for Pillow.

Pillow refuses a PNG with a compressed text of over 1 MB, texts of over 64 MB in all, or a colour profile of over 1 MB,
and it does not see an orientation behind the pixels without decoding them. Texts say nothing about the pixels, so they
are dropped here without being decompressed. Only those that may hold an orientation stay, up to Pillow's limit.
"""

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The most bytes of a text that Pillow decompresses.
MAX_TEXT = 2**20
# The most bytes of a decompressed colour profile. The largest of real ones have a few MB.
MAX_PROFILE = 2**24
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Texts in which an orientation is looked for.
_ORIENTED = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
# Primaries and transfer function of sRGB, and what is shown as sRGB, in a chunk cICP (ITU-T H.273).
_SRGB = {(1, 13), (1, 1), (1, 6), (1, 14), (1, 15)}


def readable(data: bytes) -> tuple[bytes, bytes | None]:
    """(a file that Pillow reads if its pixels are sound, a colour profile that was taken out of it).

    What is no PNG comes back as it is.

    Raises:
      ValueError: a colour profile of more than MAX_PROFILE bytes, or colours of another space than sRGB in cICP.
    """
    if not data.startswith(SIGNATURE):
        return data, None
    before: list[bytes | memoryview] = [SIGNATURE]
    after: list[bytes | memoryview] = []
    part, changed, coded, profile = before, False, None, None
    found: set[bytes] = set()
    whole, at = memoryview(data), len(SIGNATURE)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        body, to = whole[at + 8 : end - 4], part
        if kind == b"IDAT":
            part = to = after
        elif kind == b"cICP":
            coded = tuple(body[:2])
        elif kind == b"iCCP":
            found.add(kind)
            profile = _profile(bytes(body))
            # A small one Pillow reads itself.
            to = [] if profile is not None else to
        elif kind in _TEXTS or kind == b"eXIf":
            keyword = kind if kind == b"eXIf" else bytes(body[:80]).partition(b"\0")[0]
            kept = keyword not in found and (kind == b"eXIf" or _keeps(kind, keyword, bytes(body)))
            found.add(keyword)
            to = before if kept else []
        to.append(whole[at:end])
        changed |= to is not part
        at = end
        if kind == b"IEND":
            break
    if coded and coded not in _SRGB and b"iCCP" not in found:
        raise ValueError(f"colours of another space than sRGB (cICP {coded[0]}, {coded[-1]}) are not read")
    # What is left is cut short, or follows the end: Pillow says so, or does not look at it.
    return (b"".join([*before, *after, whole[at:]]) if changed else data), profile


def _keeps(kind: bytes, keyword: bytes, body: bytes) -> bool:
    """Whether a text chunk may hold an orientation and is small enough for Pillow."""
    if keyword not in _ORIENTED or len(body) > MAX_TEXT:
        return False
    text = body[len(keyword) + 1 :]
    if kind == b"iTXt" and text[:1] == b"\1":
        text = b"\0".join(text[2:].split(b"\0", 2)[2:])
    elif kind == b"zTXt":
        text = text[1:]
    else:
        return True
    inflated = _inflated(text, MAX_TEXT)
    return inflated is not None and len(inflated) < MAX_TEXT


def _profile(body: bytes) -> bytes | None:
    """The profile of a chunk iCCP that is too large for Pillow; None for one that Pillow reads."""
    inflated = _inflated(body.partition(b"\0")[2][1:], MAX_PROFILE + 1)
    if inflated is None or len(inflated) < MAX_TEXT:
        return None
    if len(inflated) > MAX_PROFILE:
        raise ValueError(f"its colour profile has more than {MAX_PROFILE // 2**20} MB")
    return inflated


def _inflated(data: bytes, limit: int) -> bytes | None:
    """At most `limit` bytes of decompressed data; None for damaged data."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return None

"""Writes docs/image_modes.md: what becomes of every pixel type of every format, found by decoding a file of each.

    python -m tools.image_modes

A test compares the page with what this script would write now. Each file shows one scene, and beside it stands the
image of 8 bits a channel that it must become, computed here without any image library.
"""

import pathlib
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling_dit.data import images
from scaling_dit.data.damage import DamagedRecord
from tools.image_files import GAMMA, P3, SRGB, bmp, chunk, ink_profile, png, profile, saved, tiff

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "image_modes.md"
HEAD = """# Pixel types

<!-- Written by tools/image_modes.py; edit that instead. -->

What [a source of images](own_images.md) makes of every pixel type: RGB of 8 bits a channel, in sRGB, transparent pixels
on white. "read" means: the values are those of the same image saved with 8 bits. "refused" is a damaged record of kind
`unreadable_image`, with the reason: a type whose range is not known from the file would give wrong colours in silence.

An ICC profile is applied (JPEG, JPEG 2000, PNG, TIFF, WebP), unless it is damaged or made for another kind of pixels.
A chunk `gAMA` of a PNG is ignored.

A fourth channel that is 0 everywhere is transparency, so the image is white. In a BMP, and in a TIFF that does not
say what the channel is, it was never written, and the colours are shown.

| format | pixels | result |
|---|---|---|
"""
SIDE = 16
# The scene: grey from black to white, and a colour image of which it is the red channel.
RAMP = np.tile(np.linspace(0, 255, SIDE).round().astype(np.uint8), (SIDE, 1))
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
ALPHA = np.where(np.arange(SIDE)[:, None] < 8, np.full_like(RAMP, 255), 0).astype(np.uint8)
BLACK_CLEAR = np.where(RAMP == 0, 255, RAMP)


class Case(NamedTuple):
    """A file and what it must become; the largest difference is of lossy compression."""

    format: str
    pixels: str
    data: bytes
    right: np.ndarray
    within: int = 1


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Pixels over white."""
    share = alpha / 255 if pixels.ndim == 2 else alpha[..., None] / 255
    return (pixels * share + 255 * (1 - share)).round().astype(np.uint8)


def light(share: np.ndarray) -> np.ndarray:
    """Linear light of L*, in parts of 1."""
    f = (share * 100 + 16) / 116
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def shown(pixels: np.ndarray, colorants: np.ndarray) -> np.ndarray:
    """Pixels of such a profile in sRGB, by its definition."""
    linear = (pixels / 255) ** GAMMA @ (np.linalg.inv(SRGB) @ colorants).T
    return encoded(linear)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light with the curve of sRGB, 8 bits."""
    clipped = linear.clip(0, 1)
    curve = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return (255 * curve).round().astype(np.uint8)


def depth(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(the ramp in `bits` bits, the same in 8)."""
    top = 2**bits - 1
    values = (RAMP.astype(np.int64) * top + 127) // 255
    return values, (values * 255 + top // 2) // top


def png_cases() -> Iterator[Case]:
    """Every colour type and depth, transparency, profiles."""
    for bits in (1, 2, 4, 8, 16):
        values, right = depth(bits)
        yield Case("PNG", f"grey, {bits} bit", png(values, bits, 0), right)
        for name, clear in (("black", 0), ("white", 2**bits - 1)):
            data = png(values, bits, 0, chunk(b"tRNS", struct.pack(">H", clear)))
            yield Case(
                "PNG", f"grey, {bits} bit, {name} transparent", data, np.where(values == clear, 255, right)
            )
    for bits in (1, 2, 4, 8):
        colours = COLOUR[np.arange(2**bits) % SIDE, np.arange(2**bits) % SIDE]
        index = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2**bits
        palette = chunk(b"PLTE", colours.tobytes())
        yield Case("PNG", f"palette, {bits} bit", png(index, bits, 3, palette), colours[index])
        alphas = (np.arange(2**bits) * 37 % 256).astype(np.uint8)
        data = png(index, bits, 3, palette, chunk(b"tRNS", alphas.tobytes()))
        yield Case("PNG", f"palette, {bits} bit, transparency", data, on_white(colours[index], alphas[index]))
    wide = COLOUR.astype(np.int64) * 257
    yield Case("PNG", "RGB, 8 bit", png(COLOUR, 8, 2), COLOUR)
    yield Case("PNG", "RGB, 16 bit", png(wide, 16, 2), COLOUR)
    clear = chunk(b"tRNS", struct.pack(">3H", *COLOUR[0, 0]))
    masked = np.where((COLOUR[0, 0] == COLOUR).all(-1)[..., None], 255, COLOUR)
    yield Case("PNG", "RGB, 8 bit, a transparent colour", png(COLOUR, 8, 2, clear), masked)
    clear = chunk(b"tRNS", struct.pack(">3H", *(257 * int(v) for v in COLOUR[0, 0])))
    yield Case("PNG", "RGB, 16 bit, a transparent colour", png(wide, 16, 2, clear), masked)
    for bits, scale in ((8, 1), (16, 257)):
        grey = np.dstack([RAMP, ALPHA]).astype(np.int64) * scale
        yield Case("PNG", f"grey and alpha, {bits} bit", png(grey, bits, 4), on_white(RAMP, ALPHA))
        rgba = np.dstack([COLOUR, ALPHA]).astype(np.int64) * scale
        yield Case("PNG", f"RGBA, {bits} bit", png(rgba, bits, 6), on_white(COLOUR, ALPHA))
    empty = np.dstack([COLOUR, np.zeros_like(RAMP)])
    yield Case("PNG", "RGBA, alpha 0 everywhere", png(empty, 8, 6), np.full_like(COLOUR, 255))
    icc = lambda colorants: chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile(colorants)))  # noqa: E731
    yield Case("PNG", "RGB, profile of Display P3", png(COLOUR, 8, 2, icc(P3)), shown(COLOUR, P3), 2)
    yield Case(
        "PNG", "grey, profile of gamma 2.2", png(RAMP, 8, 0, icc(None)), encoded((RAMP / 255) ** GAMMA), 2
    )
    damaged = chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile"))
    yield Case("PNG", "RGB, a damaged profile", png(COLOUR, 8, 2, damaged), COLOUR)
    coded = chunk(b"cICP", bytes((9, 16, 0, 1)))
    yield Case("PNG", "RGB, high dynamic range (cICP)", png(COLOUR, 8, 2, coded), COLOUR)


def jpeg_cases() -> Iterator[Case]:
    """What baseline and progressive JPEG store."""
    options = {"quality": 100, "subsampling": 0}
    yield Case("JPEG", "grey", saved(Image.fromarray(RAMP), "JPEG", quality=100), RAMP, 3)
    yield Case("JPEG", "RGB", saved(Image.fromarray(COLOUR), "JPEG", **options), COLOUR, 6)
    p3 = saved(Image.fromarray(COLOUR), "JPEG", icc_profile=profile(P3), **options)
    yield Case("JPEG", "RGB, profile of Display P3", p3, shown(COLOUR, P3), 14)
    # A tenth of black, and no cyan where red is full.
    inks = np.dstack([255 - COLOUR, np.full_like(RAMP, 26)])
    right = (COLOUR * ((255 - 26) / 255)).round().astype(np.uint8)
    cmyk = saved(Image.fromarray(inks, "CMYK"), "JPEG", **options)
    yield Case("JPEG", "CMYK, with Adobe's marker", cmyk, right, 6)
    black = Image.fromarray(np.dstack([RAMP * 0, RAMP * 0, RAMP * 0, RAMP]), "CMYK")
    data = saved(black, "JPEG", icc_profile=ink_profile(), **options)
    yield Case("JPEG", "CMYK, profile of its inks", data, encoded(light(1 - RAMP / 255)), 6)
    at = cmyk.index(b"\xff\xee")
    length = int.from_bytes(cmyk[at + 2 : at + 4], "big")
    yield Case("JPEG", "CMYK, without it", cmyk[:at] + cmyk[at + 2 + length :], right, 6)
    # YCCK: the first three of the inverted inks as luma and chroma.
    kept = (255 - COLOUR) @ np.array(
        [[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]]
    )
    ycc = (kept + np.array([0, 128, 128])).round().clip(0, 255).astype(np.uint8)
    ycck = bytearray(
        saved(Image.fromarray(np.dstack([255 - ycc, np.full_like(RAMP, 26)]), "CMYK"), "JPEG", **options)
    )
    # The last byte of Adobe's marker says how the channels are coded.
    ycck[at + 2 + length - 1] = 2
    yield Case("JPEG", "YCCK, with Adobe's marker", bytes(ycck), right, 6)


def tiff_cases() -> Iterator[Case]:
    """Grey containers of every kind, then colour."""
    wide = RAMP.astype(np.uint16) * 257
    for bits in (1, 2, 4):
        values, right = depth(bits)
        yield Case("TIFF", f"grey, {bits} bit", tiff(values, 1, bits=bits), right)
        yield Case(
            "TIFF", f"grey, {bits} bit, white is zero", tiff(2**bits - 1 - values, 0, bits=bits), right
        )
    yield Case("TIFF", "grey, 8 bit", tiff(RAMP, 1), RAMP)
    yield Case("TIFF", "grey, 8 bit, white is zero", tiff(255 - RAMP, 0), RAMP)
    yield Case("TIFF", "grey, 8 bit, signed", tiff((RAMP // 2).astype(np.int8), 1, t339=2), RAMP)
    yield Case("TIFF", "grey, 12 bit", tiff(depth(12)[0], 1, bits=12), RAMP)
    yield Case("TIFF", "grey, 12 bit in 16", tiff(depth(12)[0].astype(np.uint16), 1), RAMP)
    for order, name in (("<", "little-endian"), (">", "big-endian")):
        yield Case("TIFF", f"grey, 16 bit, {name}", tiff(wide, 1, order=order), RAMP)
        yield Case("TIFF", f"grey, 16 bit, {name}, white is zero", tiff(65535 - wide, 0, order=order), RAMP)
        signed = tiff((wide // 2).astype(np.int16), 1, order=order, t339=2)
        yield Case("TIFF", f"grey, 16 bit, {name}, signed", signed, RAMP)
        yield Case("TIFF", f"grey, 32 bit, {name}", tiff(RAMP.astype(np.uint32), 1, order=order), RAMP)
        yield Case(
            "TIFF", f"grey, 32 bit, {name}, signed", tiff(RAMP.astype(np.int32), 1, order=order, t339=2), RAMP
        )
        yield Case(
            "TIFF",
            f"grey, float, {name}",
            tiff((RAMP / 255).astype(np.float32), 1, order=order, t339=3),
            RAMP,
        )
        yield Case(
            "TIFF", f"RGB, 16 bit, {name}", tiff(COLOUR.astype(np.uint16) * 257, 2, order=order), COLOUR
        )
    deflated = saved(Image.fromarray(wide), "TIFF", compression="tiff_adobe_deflate")
    yield Case("TIFF", "grey, 16 bit, deflated", deflated, RAMP)
    yield Case("TIFF", "RGB, 8 bit", tiff(COLOUR, 2), COLOUR)
    yield Case("TIFF", "RGB, 12 bit in 16", tiff(COLOUR.astype(np.uint16) * 16, 2), COLOUR)
    yield Case("TIFF", "RGB, float", tiff((COLOUR / 255).astype(np.float32), 2, t339=(3, 3, 3)), COLOUR)
    yield Case("TIFF", "grey and alpha", tiff(np.dstack([RAMP, ALPHA]), 1, t338=2), on_white(RAMP, ALPHA))
    rgba = np.dstack([COLOUR, ALPHA])
    yield Case("TIFF", "RGBA, alpha not associated", tiff(rgba, 2, t338=2), on_white(COLOUR, ALPHA))
    multiplied = np.dstack([COLOUR * (ALPHA[..., None] // 255), ALPHA])
    yield Case("TIFF", "RGBA, alpha associated", tiff(multiplied, 2, t338=1), on_white(COLOUR, ALPHA))
    wide_rgba = rgba.astype(np.uint16) * 257
    yield Case(
        "TIFF", "RGBA, 16 bit, alpha not associated", tiff(wide_rgba, 2, t338=2), on_white(COLOUR, ALPHA)
    )
    unused = np.dstack([COLOUR, np.zeros_like(RAMP)])
    yield Case("TIFF", "RGB and a fourth channel of zeros, no alpha", tiff(unused, 2, t338=0), COLOUR)
    yield Case("TIFF", "RGB and a fourth channel of zeros, not declared", tiff(unused, 2), COLOUR)
    inks = np.dstack([255 - COLOUR, np.full_like(RAMP, 26)])
    right = (COLOUR * ((255 - 26) / 255)).round().astype(np.uint8)
    yield Case("TIFF", "CMYK, 8 bit", tiff(inks, 5), right)
    yield Case("TIFF", "CMYK, 16 bit", tiff(inks.astype(np.uint16) * 257, 5), right)
    black = np.dstack([RAMP * 0, RAMP * 0, RAMP * 0, RAMP])
    grey = encoded(light(1 - RAMP / 255))
    data = saved(Image.fromarray(black, "CMYK"), "TIFF", icc_profile=ink_profile())
    yield Case("TIFF", "CMYK, profile of its inks", data, grey, 2)
    yield Case("TIFF", "other inks than CMYK", tiff(inks, 5, t332=2), right)
    level = np.array([0, 51, 102, 153, 204, 255], np.uint8)[np.arange(SIDE) % 6] * np.ones(
        (SIDE, 1), np.uint8
    )
    lab = np.dstack([level, np.zeros_like(level), np.zeros_like(level)])
    yield Case("TIFF", "CIELAB", tiff(lab, 8), encoded(light(level / 255)), 2)
    yield Case(
        "TIFF",
        "YCbCr, not compressed",
        tiff(np.dstack([RAMP, RAMP * 0 + 128, RAMP * 0 + 128]), 6, t530=(1, 1)),
        RAMP,
    )
    ycc = saved(Image.fromarray(COLOUR), "TIFF", compression="jpeg", quality=100)
    yield Case("TIFF", "RGB, JPEG inside", ycc, COLOUR, 8)
    colours = tuple(int(v) * 257 for v in COLOUR[np.arange(256) % SIDE, np.arange(256) % SIDE].T.ravel())
    index = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    yield Case("TIFF", "palette, 8 bit", tiff(index, 3, t320=colours), COLOUR[index % SIDE, index % SIDE])


def other_cases() -> Iterator[Case]:
    """BMP, GIF, WebP, PPM, JPEG 2000 and what is not read."""
    rgb, grey = Image.fromarray(COLOUR), Image.fromarray(RAMP)
    for mode in ("1", "L", "P", "RGB"):
        image = rgb.quantize(256) if mode == "P" else rgb.convert(mode)
        right = np.asarray(image.convert("RGB"))
        yield Case(
            "BMP",
            {"1": "1 bit", "L": "grey", "P": "palette", "RGB": "24 bit"}[mode],
            saved(image, "BMP"),
            right,
        )
    yield Case("BMP", "32 bit, no alpha", bmp(COLOUR, None), COLOUR)
    yield Case("BMP", "32 bit, alpha", bmp(COLOUR, ALPHA), on_white(COLOUR, ALPHA))
    yield Case("BMP", "32 bit, alpha 0 everywhere", bmp(COLOUR, 0), COLOUR)
    yield Case("GIF", "palette", saved(grey, "GIF"), RAMP)
    yield Case("GIF", "palette, a transparent colour", saved(grey, "GIF", transparency=0), BLACK_CLEAR)
    yield Case("WebP", "RGB", saved(rgb, "WEBP", lossless=True), COLOUR)
    p3 = saved(rgb, "WEBP", lossless=True, icc_profile=profile(P3))
    yield Case("WebP", "RGB, profile of Display P3", p3, shown(COLOUR, P3), 2)
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    yield Case("WebP", "RGBA", saved(rgba, "WEBP", lossless=True, exact=True), on_white(COLOUR, ALPHA))
    size = f"{SIDE} {SIDE}"
    for top in (15, 255, 1023, 4095, 65535):
        values = (RAMP.astype(np.int64) * top + 127) // 255
        right = (values * 255 + top // 2) // top
        plain = " ".join(map(str, values.ravel().tolist())).encode()
        yield Case("PGM", f"plain, maxval {top}", f"P2 {size} {top}\n".encode() + plain, right)
        body = values.astype(np.uint8 if top < 256 else ">u2").tobytes()
        yield Case("PGM", f"maxval {top}", f"P5 {size} {top}\n".encode() + body, right)
    wide = (COLOUR.astype(np.int64) * 257).astype(">u2").tobytes()
    yield Case("PPM", "maxval 255", f"P6 {size} 255\n".encode() + COLOUR.tobytes(), COLOUR)
    yield Case("PPM", "maxval 65535", f"P6 {size} 65535\n".encode() + wide, COLOUR)
    bits = np.packbits(RAMP < 128, axis=1).tobytes()
    yield Case("PBM", "1 bit", f"P4 {size}\n".encode() + bits, np.where(RAMP < 128, 0, 255))
    yield Case("PFM", "float", f"Pf {size} -1\n".encode() + (RAMP / 255).astype("<f4").tobytes(), RAMP)
    for name, image, right in (
        ("grey", grey, RAMP), ("RGB", rgb, COLOUR), ("RGBA", rgba, on_white(COLOUR, ALPHA)),
        ("grey, 16 bit", Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP),
    ):  # fmt: skip
        yield Case("JPEG 2000", name, saved(image, "JPEG2000"), right)
    yield Case("JPEG 2000", "grey, signed", saved(grey, "JPEG2000", signed=True), RAMP)
    boxed = bytearray(saved(rgb, "JPEG2000"))
    at = boxed.index(b"colr") - 4
    icc = profile(P3)
    colr = struct.pack(">I", 11 + len(icc)) + b"colr\2\0\0" + icc
    grown = struct.pack(">I", int.from_bytes(boxed[32:36], "big") - 15 + len(colr))
    data = bytes(boxed[:32] + grown + boxed[36:at] + colr + boxed[at + 15 :])
    yield Case("JPEG 2000", "RGB, profile of Display P3", data, shown(COLOUR, P3), 2)
    twelve = bytearray(saved(rgb, "JPEG2000", no_jp2=True))
    twelve[42:51:3] = bytes([11] * 3)
    yield Case("JPEG 2000", "RGB, 12 bit", bytes(twelve), COLOUR)
    yield Case("AVIF", "any", b"\0\0\0\x20ftypavif" + bytes(64), COLOUR)
    yield Case("HEIF", "any", b"\0\0\0\x20ftypheic" + bytes(64), COLOUR)
    yield Case("EPS", "any", b"%!PS-Adobe-3.0 EPSF-3.0\n", COLOUR)
    yield Case("ICO", "any", b"\0\0\1\0" + bytes(64), COLOUR)


CASES: tuple[Callable[[], Iterator[Case]], ...] = (png_cases, jpeg_cases, tiff_cases, other_cases)


def cases() -> list[Case]:
    """Every pixel type."""
    return [case for group in CASES for case in group()]


def outcome(case: Case) -> tuple[str, int]:
    """What becomes of a file: "read" with the largest difference from what is right, or why it is refused with 0."""
    try:
        found = np.asarray(images.decode(case.data, "file", "image")).astype(int)
    except DamagedRecord as fault:
        return "refused: " + fault.what.removeprefix("cannot read image 'image': "), 0
    right = case.right if case.right.ndim == 3 else case.right[..., None]
    return "read", int(np.abs(found - right.astype(int)).max())


def text() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {case.format} | {case.pixels} | {outcome(case)[0]} |\n" for case in cases())


if __name__ == "__main__":
    PAGE.write_text(text())
    print(PAGE)

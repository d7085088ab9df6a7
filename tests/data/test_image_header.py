"""Headers: the size a filter sees is the size of the decoded image, and a fault has one kind for every verb."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scaling_dit.curation import columns, encode
from scaling_dit.data import image_header, images, png
from scaling_dit.data.damage import DamagedRecord
from scaling_dit.data.sources.image_files import RawSample
from tools import image_modes
from tools.image_files import chunk, saved, tiff

WIDTH, HEIGHT = 24, 8
# Value of the orientation -> the stored pixels as they are shown.
SHOWN = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}  # fmt: skip
STORED = np.kron(np.random.default_rng(0).integers(0, 2, (1, 3, 3)) * 255, np.ones((8, 8, 1))).astype(
    np.uint8
)
STORED[:4] //= 2


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def tagged(kind, orientation):
    """A file of STORED that says how it is turned."""
    image, turned = Image.fromarray(STORED), exif(orientation)
    body = turned.tobytes()[6:]
    plain = saved(image, "PNG")
    late = len(plain) - 12
    raw = "\n".join(("", "exif", str(len(body) + 6), (b"Exif\0\0" + body).hex()))
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % orientation
    return {
        "PNG": lambda: saved(image, "PNG", exif=turned),
        "PNG, after the pixels": lambda: plain[:late] + chunk(b"eXIf", body) + plain[late:],
        "PNG, profile": lambda: plain[:33] + chunk(b"tEXt", b"Raw profile type exif\0" + raw.encode()) + plain[33:],
        "PNG, compressed profile after the pixels": lambda: (
            plain[:late] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw.encode())) + plain[late:]
        ),
        "PNG, XMP": lambda: plain[:33] + chunk(b"iTXt", text) + plain[33:],
        "PNG, XMP after the pixels": lambda: plain[:late] + chunk(b"iTXt", text) + plain[late:],
        "JPEG": lambda: saved(image, "JPEG", exif=turned, quality=100, subsampling=0),
        "JPEG, XMP": lambda: saved(image, "JPEG", xmp=XMP % orientation, quality=100, subsampling=0),
        "WEBP": lambda: saved(image, "WEBP", exif=turned, lossless=True),
        "TIFF": lambda: saved(image, "TIFF", exif=turned),
        "TIFF, deflated": lambda: saved(image, "TIFF", exif=turned, compression="tiff_adobe_deflate"),
        "TIFF, 16 bit": lambda: tiff(STORED.astype(np.uint16) * 257, 2, t274=orientation),
        "TIFF, grey of 16 bit, big-endian": lambda: tiff(
            STORED[..., 0].astype(np.uint16) * 257, 1, order=">", t274=orientation
        ),
        "TIFF, XMP": lambda: saved(image, "TIFF", tiffinfo={700: XMP % orientation}),
    }[kind]()  # fmt: skip


KINDS = (
    "PNG", "PNG, after the pixels", "PNG, profile", "PNG, compressed profile after the pixels", "PNG, XMP",
    "PNG, XMP after the pixels", "JPEG", "JPEG, XMP", "WEBP", "TIFF", "TIFF, deflated", "TIFF, 16 bit",
    "TIFF, grey of 16 bit, big-endian", "TIFF, XMP",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_says_the_size_of_the_upright_image(kind):
    for orientation, turn in SHOWN.items():
        data = tagged(kind, orientation)
        found = images.decode(data, "w", "k")
        right = turn(STORED[..., :1].repeat(3, -1) if "grey" in kind else STORED)
        assert np.abs(np.asarray(found).astype(int) - right).max() <= (3 if "JPEG" in kind else 0), (
            orientation
        )
        row = columns.columns(RawSample("k", data, ("c",), ("alt",), {}, "w"))
        assert (row["width"], row["height"]) == found.size == (right.shape[1], right.shape[0])


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_is_none_changes_nothing(value):
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = tagged(kind, value)
        assert (
            images.decode(data, "w", "k").size == image_header.shown_size(data, "w", "k") == (WIDTH, HEIGHT)
        )


def test_a_damaged_exif_block_says_nothing():
    for body in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"):
        for kind in ("PNG", "JPEG", "WEBP"):
            data = saved(Image.fromarray(STORED), kind, exif=b"Exif\0\0" + body)
            assert (
                images.decode(data, "w", "k").size
                == image_header.shown_size(data, "w", "k")
                == (WIDTH, HEIGHT)
            )


def kinds_of(data, max_pixels):
    """The kind of damage that each way to an image reports; "" for none."""
    sample = RawSample("k", data, ("c",), ("alt",), {}, "w")
    selection = encode.Selection(((8, 8),), min_size=1, max_pixels=max_pixels)
    ways = (
        lambda: images.decode(data, "w", "k", max_pixels),
        lambda: columns.columns(sample, max_pixels),
        lambda: selection.why_not(sample),
    )
    found = []
    for way in ways:
        try:
            way()
            found.append("")
        except DamagedRecord as fault:
            found.append(fault.kind)
    prepared = encode.prepare_sample(sample, selection)
    return {*found, getattr(prepared, "kind", "")}


def header_only(width, height):
    return png.SIGNATURE + b"".join((
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""),
    ))  # fmt: skip


@pytest.mark.parametrize("size", [(101, 100), (20_000, 10_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1)])
def test_too_large_is_one_kind_whatever_the_number(size):
    assert kinds_of(header_only(*size), 10_000) == {"too_large"}


def test_too_large_does_not_depend_on_what_another_library_sets(monkeypatch):
    for limit in (None, 10, 10**9):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert kinds_of(header_only(300, 100), 10_000) == {"too_large"}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n", png.SIGNATURE, png.SIGNATURE + b"\0\0\0\x0dIHDR",
        saved(Image.new("F", (4, 4)), "TIFF"), tiff(np.zeros((4, 4), np.int16), 1, t339=2),
        tiff(np.zeros((4, 4), np.uint32), 1), b"GIF89a", b"\xff\xd8\xff\xe0",
    ],
)  # fmt: skip
def test_unreadable_is_one_kind_by_the_header(data):
    assert kinds_of(data, 10_000) == {"unreadable_image"}


def test_a_sound_image_is_none():
    assert kinds_of(tagged("TIFF", 6), 10_000) == {""}


TEXT = b'{"node": 1}' * 150_000
PLAIN = saved(Image.new("RGB", (8, 8), (10, 20, 30)), "PNG")
SMALL = {
    "JPEG": {"quality": 100},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {},
    "PNG": {},
    "GIF": {},
}


def inserted(*chunks):
    return PLAIN[:33] + b"".join(chunks) + PLAIN[33:]


@pytest.mark.parametrize(
    "data",
    [
        inserted(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(TEXT))),
        inserted(chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(TEXT))),
        inserted(chunk(b"tEXt", b"workflow\0" + TEXT)),
        inserted(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT))),
        inserted(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT))),
        inserted(*(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(80))),
        inserted(chunk(b"iCCP", b"profile\0\0" + zlib.compress(TEXT))),
        inserted(chunk(b"eXIf", b"MM\0*\0\0\0\x08" + bytes(3_000_000))),
        inserted(chunk(b"zTXt", b"damaged\0\0no zlib"), chunk(b"tEXt", b""), chunk(b"iTXt", b"\0\1")),
        PLAIN[:-12] + chunk(b"zTXt", b"workflow\0\0" + zlib.compress(TEXT)) + PLAIN[-12:] + b"after the end",
    ],
)  # fmt: skip
def test_large_metadata_of_png_is_passed_over(data):
    assert (np.asarray(images.decode(data, "w", "k")) == (10, 20, 30)).all()
    assert image_header.shown_size(data, "w", "k") == (8, 8)


def test_large_metadata_of_other_formats_is_passed_over():
    image, large = Image.new("RGB", (8, 8), (10, 20, 30)), bytes(1_500_000)
    jp2 = saved(image, "JPEG2000")
    at = jp2.index(b"jp2c") - 4
    box = (len(large) + 8).to_bytes(4, "big") + b"uuid" + large
    for data in (
        saved(image, "JPEG", quality=100, icc_profile=large),
        saved(image, "WEBP", lossless=True, icc_profile=large),
        saved(image, "TIFF", icc_profile=large),
        saved(image, "GIF", comment=large),
        jp2[:at] + box + jp2[at:],
    ):
        assert np.abs(np.asarray(images.decode(data, "w", "k")).astype(int) - (10, 20, 30)).max() <= 1


def test_a_profile_beyond_the_bound_is_refused_and_costs_no_more_than_the_bound():
    data = inserted(chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**26))))
    with pytest.raises(DamagedRecord, match="its colour profile has more than 16 MB"):
        images.decode(data, "w", "k")


def test_a_sound_png_is_not_copied_and_a_cut_one_stays_damaged():
    assert png.readable(PLAIN)[0] is PLAIN
    large = inserted(chunk(b"tEXt", b"a\0b"))
    # Behind the pixels are the checksums of the stream and of its chunk, and the chunk IEND.
    for end in range(9, len(large) - 20):
        with pytest.raises(DamagedRecord):
            images.decode(large[:end], "w", "k")


def test_changed_bytes_never_make_header_and_pixels_disagree():
    files = [case.data for case in image_modes.cases()] + [tagged(kind, 6) for kind in KINDS]
    rng, found = np.random.default_rng(0), set()
    for _ in range(400):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(min(len(data), rng.choice([60, 300, 10**9])))] = rng.integers(256)
        sizes = []
        for way in (
            lambda d: images.decode(d, "w", "k", 2**20).size,
            lambda d: image_header.shown_size(d, "w", "k", 2**20),
        ):
            try:
                sizes.append(way(bytes(data)))
            except DamagedRecord as fault:
                sizes.append(fault.kind)
        decoded, said = sizes
        # Damage to the pixels alone does not show in the header; all else is the same.
        assert decoded == said or (decoded == "unreadable_image" and isinstance(said, tuple))
        found.add(decoded if isinstance(decoded, str) else "read")
    assert found >= {"read", "unreadable_image"}

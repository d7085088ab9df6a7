"""Images for people: a grid with the caption under each image, and PNG files."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from scaling_dit.errors import printable

# All in pixels. _TILE is the least width of an enlarged image, so that captions are readable.
_TILE = 128
_MARGIN = 6
_FONT_SIZE = 12
# The most characters of a caption.
_CAPTION = 400


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """One image of many: images uint8 [N, H, W, 3] and their N captions -> uint8 [height, width, 3].

    Small images are enlarged by an integer factor without smoothing, so that every pixel shows. `columns` defaults
    to about sqrt(2 N), which fits a screen.
    """
    count, height, width, _ = images.shape
    columns = columns or max(1, min(count, round((2 * count) ** 0.5)))
    factor = max(1, -(-_TILE // width))
    tile_w, tile_h = width * factor, height * factor
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [
        textwrap.wrap(caption, max(8, int(tile_w / (0.52 * _FONT_SIZE)))) for caption in map(_shown, captions)
    ]
    text_h = (_FONT_SIZE + 2) * max((len(lines) for lines in wrapped), default=0) + 4
    rows = -(-count // columns)
    size = (columns * (tile_w + _MARGIN) + _MARGIN, rows * (tile_h + text_h + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x = _MARGIN + (i % columns) * (tile_w + _MARGIN)
        y = _MARGIN + (i // columns) * (tile_h + text_h + _MARGIN)
        sheet.paste(Image.fromarray(image).resize((tile_w, tile_h), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + tile_h + 1), "\n".join(lines), fill="black", font=font, spacing=2)
    return np.asarray(sheet)


def _shown(caption: str) -> str:
    """A caption as the page shows it: one of data may be of any length and hold any character."""
    return printable(caption if len(caption) <= _CAPTION else f"{caption[:_CAPTION]} ...", keep="\n\t")


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file; equal images give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """An image as uint8 [H, W, 3], from a file's bytes.

    Raises:
      OSError: they are no image, or are damaged.
    """
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # What Pillow raises of some damaged PNG files.
    except (SyntaxError, ValueError) as error:
        raise OSError(str(error)) from None


def write_png(path: epath.Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as PNG in one call, so that a reader of a remote path never sees half a file."""
    path.write_bytes(encode_png(image))


def read_png(path: epath.Path) -> np.ndarray:
    """An image as uint8 [H, W, 3], from a PNG file."""
    return decode_png(path.read_bytes())

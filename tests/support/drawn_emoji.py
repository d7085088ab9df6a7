"""Emoji that tests draw themselves: who is a shape, what a place, and tone a colour."""

import itertools

from scaling_dit.data import emoji

WHATS = ("artist", "running", "in_tuxedo", "swimming", "judge", "biking", "cook", "pilot", "farmer", "singer")
_SHADES = dict(zip(("", *emoji.TONES), ("gold", "pink", "orange", "red", "brown", "black"), strict=True))
_SHAPES = {
    "woman": '<circle cx="{x}" cy="{y}" r="9" fill="{fill}"/>',
    "man": '<rect x="{left}" y="{top}" width="18" height="18" fill="{fill}"/>',
    "person": '<path d="M{x} {top} L{right} {bottom} L{left} {bottom} Z" fill="{fill}"/>',
}
# Key -> (Unicode's name, other names), and key -> (who, place of what, tone).
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {}
_PARTS: dict[str, tuple[str, int, str]] = {}
for _who, (_place, _what), _tone in itertools.product(emoji.WHO, enumerate(WHATS), ("", *emoji.TONES)):
    _key = f"{_who}-{_what}-{_tone or 'none'}"
    NAMES[_key] = (
        f"{_who}_{_what}" + (f"_{_tone}_skin_tone" if _tone else ""),
        ("alias",) if _place == 0 else (),
    )
    _PARTS[_key] = _who, _place, _tone


def svg(key):
    who, place, tone = _PARTS[key]
    # Ten places in two columns.
    x, y = 18 + 36 * (place % 2), 8 + 14 * (place // 2)
    ends = {"left": x - 9, "right": x + 9, "top": y - 9, "bottom": y + 9}
    shape = _SHAPES[who].format(x=x, y=y, fill=_SHADES[tone], **ends)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72" width="72" height="72">{shape}</svg>'


def write(folder, size=16, wrong=0.0):
    """The folder that `data.emoji` writes of them."""
    return emoji.write(folder, size, wrong, (emoji.every(NAMES), svg))

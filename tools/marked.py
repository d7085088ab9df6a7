"""A part of a page that a script writes: what stands between two markers."""

import pathlib


def write(page: pathlib.Path, section: str, begin: str, end: str, head: str = "") -> None:
    """Puts a section, which has the markers, in the place of the page's; a page that does not exist is made.

    Args:
      head: of a page that is made.

    Raises:
      SystemExit: the page has no such markers.
    """
    if not page.exists():
        page.write_text(f"{head}{section}\n")
        return
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no lines {begin} and {end}")
    page.write_text(before + section + rest.partition(end)[2])

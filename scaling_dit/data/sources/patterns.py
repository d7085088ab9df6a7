"""The files that a source's GLOB names, and what can be read as a file at all."""

import re

from etils import epath

from scaling_dit import files
from scaling_dit.data.text import is_sound, sound
from scaling_dit.errors import UserError

_WILDCARDS = frozenset("*?[")


def matching(pattern: str, ending: str) -> list[epath.Path]:
    """The files with an ending that a pattern names, sorted.

    Wildcards (`*`, `?`, `[0-9]`) stand in any part of the path; local or gs://. A path that exists is that path, and so
    is a folder at its beginning: in "/data/laion [2B]/*.tar" only the star is a wildcard if there is such a folder.

    Raises:
      UserError: none, two with the same name, which their records would share, or one that is no regular file.
    """
    try:
        found = sorted(path for path in _named(pattern) if path.name.endswith(ending) and not path.is_dir())
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"cannot look for {sound(pattern)!r}: {error}") from None
    if not found:
        raise UserError(f"no file matches {sound(pattern)!r}; {_hint(pattern, ending)}")
    by_name: dict[str, epath.Path] = {}
    for path in found:
        if not is_sound(path.name):
            raise UserError(f"{sound(str(path))}: the name of this file is not UTF-8; rename it")
        if kind := files.special(path):
            raise UserError(f"{path} is {kind}, it cannot be read as a file")
        if by_name.setdefault(path.name, path) != path:
            raise UserError(
                f"{by_name[path.name]} and {path} share a name, and with it the keys of their images"
            )
    return found


def _named(pattern: str) -> list[epath.Path]:
    """What a pattern names, files or not."""
    path = epath.Path(pattern)
    if not set(pattern) & _WILDCARDS or path.exists():
        return [path] if path.exists() or files.special(path) else []
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if set(part) & _WILDCARDS)
    # Folders whose names have such characters.
    while fixed < len(parts) - 1 and epath.Path("/".join(parts[: fixed + 1])).is_dir():
        fixed += 1
    folder = "/".join(parts[:fixed])
    # etils takes the whole path for a pattern.
    root = re.sub(r"([*?[])", r"[\1]", folder) or ("/" if pattern.startswith("/") else ".")
    return list(epath.Path(root).glob("/".join(parts[fixed:])))


def _hint(pattern: str, ending: str) -> str:
    path = epath.Path(pattern)
    if path.is_dir():
        return f"it is a folder; write {sound(str(path / f'*{ending}'))}"
    if path.exists():
        return f"the name of this file does not end in {ending}"
    if "::" in pattern or re.search(r"\{.*\}", pattern):
        return (
            f"'::' and braces are not read; wildcards are *, ? and [0-9], as in /data/set/0000[0-9]{ending}"
        )
    if not pattern.endswith(("*", ending)):
        return f"only files whose names end in {ending} are read"
    return f"a pattern such as /data/set/*{ending} is needed"

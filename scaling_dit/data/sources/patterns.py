"""The files that a source's GLOB names."""

from etils import epath

from scaling_dit.errors import UserError


def matching(pattern: str, ending: str) -> list[epath.Path]:
    """The files that a pattern names, sorted; only those with the ending if it says none itself.

    Wildcards (`*`, `?`, `[0-9]`) stand in any part of the path; local or gs://.

    Raises:
      UserError: none, or two with the same name, which their records would share.
    """
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    folder, rest = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    root = epath.Path(folder or ("/" if pattern.startswith("/") else "."))
    found = sorted(path for path in root.glob(rest) if path.name.endswith(ending) and not path.is_dir())
    if not found:
        raise UserError(f"no file matches {pattern!r}; a pattern such as /data/set/*{ending} is needed")
    by_name: dict[str, epath.Path] = {}
    for path in found:
        if by_name.setdefault(path.name, path) != path:
            raise UserError(
                f"{by_name[path.name]} and {path} share a name, and with it the keys of their images"
            )
    return found

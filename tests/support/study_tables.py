"""Parts of a study's tables, for studies that are part of one."""

import pathlib

from scaling_dit.scaling import table


def written(study: pathlib.Path, name: str, scratch: pathlib.Path, **wanted) -> bytes:
    """The bytes that a study of some rows of a study's table would leave: those whose columns have the values wanted.

    Args:
      study: the folder of the whole study.
      name: "table" or "scores".
      scratch: a folder for the file.
    """
    rows = table.read_parquet(study / f"{name}.parquet")
    found = [row for row in rows if all(row[column] == value for column, value in wanted.items())]
    assert 0 < len(found) < len(rows)
    table.write_parquet(scratch / f"{name}.wanted", found)
    return (scratch / f"{name}.wanted").read_bytes()

"""A study as the members of a queue that several slices work off, as `scaling-dit tpu queue add` takes them."""

from typing import Any

from scaling_dit.checkpoints.frozen_base import absolute
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.spec import StudySpec

# The entry that writes the study's tables.
TABLES = "tables"


def of(spec: StudySpec, folder: StudyFolder, *, own_code: bool = False) -> list[dict[str, Any]]:
    """An entry for each member, behind the one that it begins from, and one for the tables, behind all.

    Slices that run different members write to different files of the folder. Each command resumes what an earlier try
    of it began, as a queue asks of its commands.

    Args:
      spec: of the study, which is registered in the folder.
      own_code: whether the commands run the code outside of the package that the spec names.
    """
    # A slice may work from elsewhere.
    workdir = absolute(str(folder))
    command = ["scaling-dit", "study", f"--workdir={workdir}", *(["--own_code"] if own_code else [])]
    entries: list[dict[str, Any]] = [
        {
            "name": member.name,
            "command": [*command, f"--member={member.name}"],
            "depends_on": [member.base] if member.base else [],
        }
        for member in spec.members
    ]
    names = [member.name for member in spec.members]
    last = TABLES
    while last in names:
        last += "-"
    return [*entries, {"name": last, "command": command, "depends_on": names}]

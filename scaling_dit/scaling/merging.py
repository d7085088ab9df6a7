"""Several studies as one, for a report over all of them."""

import dataclasses
import itertools
from collections.abc import Sequence

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling import study as study_lib
from scaling_dit.scaling.claims import Claim
from scaling_dit.scaling.folder import StudyFolder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.study import Study
from scaling_dit.scaling.table import Row


def merge(folders: Sequence[str | epath.Path]) -> Study:
    """Several studies as one, in memory: their members and rows side by side, for a report over all.

    Members of one name must have one config, and claims of one name one content; a run that two studies have is taken
    from the first with results of it.

    Raises:
      UserError: folders without a study, members or claims that differ, or evaluations that do not compare.
    """
    studies = [study_lib.open_study(folder) for folder in folders]
    first = studies[0]
    members: dict[str, Member] = {}
    for one in studies:
        for key in ("metrics", "items", "points", "generation_seeds"):
            if getattr(one.spec, key) != getattr(first.spec, key):
                raise UserError(
                    f"{one.folder} and {first.folder} differ in {key}, so their runs do not compare"
                )
        for member in one.spec.members:
            known = members.setdefault(member.name, member)
            if spec_lib.member_hash(known) != spec_lib.member_hash(member):
                raise UserError(
                    f"member {member.name!r} of {one.folder} has another config than in {first.folder}"
                )
    claims: dict[str, Claim] = {}
    registered: dict[str, int] = {}
    for one in studies:
        for claim in one.spec.claims:
            if claims.setdefault(claim.name, claim) != claim:
                raise UserError(f"claim {claim.name!r} of {one.folder} is another than in {first.folder}")
        for name, done in one.registered.items():
            registered[name] = max(done, registered.get(name, 0))
    spec = dataclasses.replace(
        first.spec,
        question=" / ".join(dict.fromkeys(one.spec.question for one in studies)),
        members=tuple(members.values()),
        seeds=tuple(dict.fromkeys(seed for one in studies for seed in one.spec.seeds)),
        claims=tuple(claims.values()),
        guidances=tuple(dict.fromkeys(scale for one in studies for scale in one.spec.guidances)),
    )
    homes = _homes(studies)
    rows, measured, scores = (
        [row for one in studies for row in getattr(one, part) if homes.get(_run(row)) is one.folder]
        for part in ("rows", "measured", "scores")
    )
    return Study(spec, first.folder, rows, measured, scores, registered, homes)


def _homes(studies: Sequence[Study]) -> dict[tuple[str, int], StudyFolder]:
    """(member, seed) -> the folder of the first study with points of a run, else a start, else its spec."""
    homes: dict[tuple[str, int], StudyFolder] = {}
    for part in ("rows", "measured"):
        for one in studies:
            for row in getattr(one, part):
                homes.setdefault(_run(row), one.folder)
    for one in studies:
        for member, seed in itertools.product(one.spec.members, one.spec.seeds):
            homes.setdefault((member.name, seed), one.folder)
    return homes


def _run(row: Row) -> tuple[str, int]:
    return row["member"], row["seed"]

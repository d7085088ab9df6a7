"""What is checked before anything is created: that the run fits the slice, the quota, and where the bucket lies."""

import re
from collections.abc import Sequence
from typing import Any

from scaling_dit.errors import UserError

from .backends.contract import gcloud, parsed
from .commands import Command, Runner
from .job import Job, region

_SECONDS = 120.0
# How quotas of Cloud TPU and Compute Engine name a generation.
_QUOTA_NAMES = {"v4": r"V4", "v5e": r"V5S?LITE|V5E", "v5p": r"V5P", "v6e": r"V6E", "tpu7x": r"TPU7X|V7X"}
# Quotas of these count cores, two a chip.
_BY_CORES = ("v4", "v5p")


def buckets(job: Job) -> list[str]:
    """The buckets that the job's command names, in order."""
    return list(dict.fromkeys(re.findall(r"gs://([a-z0-9][\w.-]*)", " ".join(job.command))))


def bucket_command(job: Job, bucket: str) -> Command:
    """The command that says where a bucket lies."""
    return gcloud("storage", "buckets", "describe", f"gs://{bucket}", "--format=json", project=job.project)


def quota_command(job: Job) -> Command:
    """The command that lists the quotas that a job needs."""
    service = "tpu.googleapis.com" if job.backend == "queued" else "compute.googleapis.com"
    words = ("quotas", "info", "list", f"--service={service}", "--format=json")
    return gcloud(*words, track="alpha", project=job.project)


def regions(job: Job, runner: Runner) -> list[str]:
    """What is wrong with the regions of zones and buckets; each byte between two regions is paid for.

    Raises:
      UserError: a bucket cannot be asked.
    """
    wrong = []
    for bucket in buckets(job):
        result = runner(bucket_command(job, bucket), _SECONDS)
        found = parsed(result)
        if result.code or not isinstance(found, dict) or "location" not in found:
            raise UserError(f"gs://{bucket} cannot be asked where it lies: {result.reason}")
        place = str(found["location"]).lower()
        for zone in job.zones:
            if region(zone) != place:
                wrong.append(f"gs://{bucket} lies in {place}, and zone {zone} in {region(zone)}")
    return wrong


def quota(job: Job, runner: Runner) -> tuple[list[str], list[str]]:
    """(zones whose quota is too small, each in a line; what could not be checked, each in a line)."""
    if not job.project:
        return [], ["quota not checked: it needs --project"]
    result = runner(quota_command(job), _SECONDS)
    found = parsed(result)
    if result.code or not isinstance(found, list):
        return [], [f"quota not checked: {result.reason}"]
    need = job.shape.chips * (2 if job.backend == "queued" and job.generation in _BY_CORES else 1)
    unit = "cores" if need != job.shape.chips else "chips"
    short, unknown = [], []
    for zone in job.zones:
        limits = _limits(job, zone, found)
        if not limits:
            unknown.append(
                f"quota not checked in {zone}: none is listed for {job.generation} as {job.capacity}"
            )
        elif max(limits.values()) < need:
            name, value = max(limits.items(), key=lambda item: item[1])
            short.append(f"{zone}: quota {name} is {value:.0f}, and the job needs {need} {unit}")
    return short, unknown


def _limits(job: Job, zone: str, found: Sequence[Any]) -> dict[str, float]:
    """The quotas that count for a zone, by name; no limit is infinite."""
    limits: dict[str, float] = {}
    name = re.compile(_QUOTA_NAMES.get(job.generation, "$^"))
    for quota in found:
        quota_id = str(quota.get("quotaId", ""))
        dimensions = [info.get("dimensions", {}) for info in quota.get("dimensionsInfos", [])]
        words = " ".join([quota_id, *(str(value) for one in dimensions for value in one.values())]).upper()
        preemptible = "PREEMPTIBLE" in words or "SPOT" in words
        if not name.search(words) or preemptible != (job.capacity == "spot"):
            continue
        for info in quota.get("dimensionsInfos", []):
            places = [info.get("dimensions", {}).get(key) for key in ("zone", "region")]
            places = [*filter(None, places), *info.get("applicableLocations", [])]
            if places and not {zone, region(zone)} & set(places):
                continue
            value = float(info.get("details", {}).get("value", 0))
            limits[quota_id] = max(limits.get(quota_id, 0.0), float("inf") if value < 0 else value)
    return limits


def plan(config: str, overrides: Sequence[str], job: Job) -> tuple[bool, str]:
    """(whether the run fits the slice, its memory in a line), by `plan --quick`.

    Raises:
      UserError: the config or the slice is wrong, or the compiler is not installed.
    """
    from scaling_dit.parallel import topologies

    # Before jax is imported.
    topologies.prepare_environment([job.topology])

    from scaling_dit import config as config_lib
    from scaling_dit.planning import quick
    from scaling_dit.planning.report import memory_line

    made = quick.make(config_lib.load(config, overrides), job.shape)
    return made.memory.fits, memory_line(made.memory)

"""The dead-man switch: a timer on the machines of a job that deletes the job's resource when nobody watches any more.

A launcher dies with its laptop, and a slice that nobody deletes is paid for. So every worker looks once a minute, and
deletes the resource of the job when

- no process of the run has written a heartbeat for `minutes` (after the first one; `setup_minutes` before it),
- heartbeats could not be read for twice that time, or
- the job's `hours` are over, counted from the first look on this machine.

The owner can put it off, but not beyond the hours: a metadata attribute `scaling-dit-hold-until` of the machine, in
seconds since 1970, holds deletion until then.

A job whose heartbeats lie nowhere that its machines can read has only its hours.

`script` gives one bash script. Without an argument, as the start-up script of a machine, it copies itself to its place
and starts a systemd timer; `bash SCRIPT check` looks once. Both must run as root on a worker. It needs bash, curl,
gcloud, GNU date and coreutils, which Google's images have. The account of the machine must be allowed to delete the
resource, with the scope cloud-platform.
"""

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from scaling_dit.errors import UserError

# Where the script lives on a worker, and where it keeps what it knows between two looks.
PLACE, STATE = "/usr/local/lib/scaling-dit/deadman.sh", "/var/lib/scaling-dit"
UNIT = "scaling-dit-deadman"
BACKENDS = ("queued", "compute")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")

# Values are read from variables that the head of the script sets, so this part is the same for every job. `date` and
# the metadata server can be replaced by tests through PATH and GCE_METADATA_HOST, which Google's libraries read too.
_BODY = r"""
log() { echo "scaling-dit dead-man switch: $*"; }

# Seconds since 1970 in a file; empty if it has none.
kept() { [ -r "$state/$1" ] && sed -n '1s/^\([0-9][0-9]*\)$/\1/p' "$state/$1"; }

keep() { printf '%s\n' "$2" > "$state/$1.new" && mv -f "$state/$1.new" "$state/$1"; }

# The newest "time" of all heartbeats; empty if there is none. Fails if they cannot be read.
heartbeat() {
  local text
  case "$heartbeats" in
    gs://*)
      if ! text=$(timeout 60 gcloud storage cat "$heartbeats/*.json" 2>"$state/error"); then
        # No heartbeat yet is no fault.
        grep -qiE 'matched no objects|not found|404' "$state/error" && return 0
        return 1
      fi ;;
    *)
      [ -d "$heartbeats" ] || return 0
      text=$(cat "$heartbeats"/*.json 2>/dev/null) || return 0 ;;
  esac
  printf '%s' "$text" | grep -oE '"time": *[0-9]+' | grep -oE '[0-9]+$' | sort -n | tail -n 1
}

held() {
  local server="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1"
  curl -sf -m 5 -H 'Metadata-Flavor: Google' "$server/instance/attributes/scaling-dit-hold-until" 2>/dev/null |
    sed -n '1s/^\([0-9][0-9]*\)$/\1/p'
}

# Sets `reason` if the resource must be deleted now.
judge() {
  local now begun seen read_at
  now=$(date +%s)
  begun=$(kept begun)
  if [ -z "$begun" ]; then begun=$now; keep begun "$now"; fi
  if [ $((now - begun)) -ge "$budget_seconds" ]; then
    # Nothing holds this off.
    reason="the budget of $((budget_seconds / 3600)) hours and $((budget_seconds % 3600 / 60)) minutes is over"
    return
  fi
  [ -n "$heartbeats" ] || return
  if seen=$(heartbeat); then
    keep read "$now"
    if [ -n "$seen" ]; then keep seen "$seen"; fi
  else
    log "heartbeats cannot be read: $(head -c 300 "$state/error" | tr '\n' ' ')"
    read_at=$(kept read)
    if [ $((now - ${read_at:-$begun})) -ge $((2 * quiet_seconds)) ]; then
      reason="heartbeats could not be read for $(((now - ${read_at:-$begun}) / 60)) minutes"
    fi
  fi
  seen=$(kept seen)
  # While nothing can be read, old heartbeats say nothing about silence.
  if [ -z "$reason" ] && [ "$(kept read)" = "$now" ]; then
    if [ -z "$seen" ]; then
      [ $((now - begun)) -ge "$setup_seconds" ] &&
        reason="no heartbeat within $((setup_seconds / 60)) minutes of the start"
    elif [ $((now - seen)) -ge "$quiet_seconds" ]; then
      # A machine that is there again after a preemption has as long to set up as a new one.
      [ $((now - begun)) -ge "$setup_seconds" ] && reason="no heartbeat for $(((now - seen) / 60)) minutes"
    fi
  fi
  if [ -n "$reason" ]; then
    local until
    until=$(held)
    if [ -n "$until" ] && [ "$now" -lt "$until" ]; then
      log "$reason, but deletion is held for $((until - now)) s"
      reason=
    fi
  fi
}

check() {
  mkdir -p "$state" || exit 1
  reason=
  judge
  [ -n "$reason" ] || return 0
  log "$reason: deleting $what"
  if "${delete[@]}"; then
    log "deletion of $what has begun"
  else
    log "deletion failed; the next look tries again"
    return 1
  fi
}

install_units() {
  mkdir -p "$(dirname "$place")" "$units" || exit 1
  # The script may be the file that bash reads at this moment, so the copy gets its name at the end.
  cp "$0" "$place.new" && chmod 755 "$place.new" && mv -f "$place.new" "$place" || exit 1
  printf '%s\n' '[Unit]' 'Description=Deletes the slice of a scaling_dit job that nobody watches' \
    'After=network-online.target' 'Wants=network-online.target' '[Service]' 'Type=oneshot' \
    "ExecStart=/bin/bash $place check" 'TimeoutStartSec=300' > "$units/$unit.service"
  printf '%s\n' '[Unit]' 'Description=Looks for heartbeats of a scaling_dit job' '[Timer]' 'OnBootSec=60' \
    'OnUnitActiveSec=60' 'AccuracySec=1' "Unit=$unit.service" '[Install]' 'WantedBy=timers.target' \
    > "$units/$unit.timer"
  systemctl daemon-reload && systemctl enable --now "$unit.timer"
}

case "${1:-install}" in
  install) install_units ;;
  check) check ;;
  *) echo "usage: bash $0 [install|check]" >&2; exit 2 ;;
esac
"""


def delete_command(job: Mapping[str, Any]) -> list[str]:
    """The command, word by word, that deletes all machines of a job.

    Args:
      job: as `script` takes it.
    """
    place = [
        f"--zone={job['zone']}",
        *([f"--project={job['project']}"] if job.get("project") else []),
        "--quiet",
    ]
    if job["backend"] == "queued":
        # Without --force it fails while nodes exist.
        return [
            "gcloud", "compute", "tpus", "queued-resources", "delete", job["resource"], *place, "--force", "--async"
        ]  # fmt: skip
    return ["gcloud", "compute", "instance-groups", "managed", "delete", job["resource"], *place]


def script(job: Mapping[str, Any]) -> str:
    """The script of a job's workers.

    Args:
      job: "backend" ("queued" or "compute"), "resource" (name of the queued resource or of the managed instance
        group), "zone", "minutes" and "hours"; and optionally "project", "setup_minutes" (an hour by default) and
        "heartbeats": the folder of the run's heartbeats (see `checkpoints.workdir`) on gs://, or an absolute path.

    Raises:
      UserError: a value that is missing or cannot be.
    """
    _check(job)
    seconds = {
        "quiet_seconds": 60 * float(job["minutes"]),
        "setup_seconds": 60 * float(job.get("setup_minutes", 60)),
        "budget_seconds": 3600 * float(job["hours"]),
    }
    command = delete_command(job)
    head = [
        "#!/bin/bash",
        "# Deletes the slice of a job that nobody watches any more. Made by scaling_dit.tpu.deadman.",
        f"# Its machines are allowed {math.ceil(seconds['budget_seconds'])} seconds.",
        "set -u",
        "umask 022",
        f"what={shlex.quote(str(job['resource']))}",
        f"heartbeats={shlex.quote(str(job.get('heartbeats', '')).rstrip('/'))}",
        *(f"{name}={math.ceil(value)}" for name, value in seconds.items()),
        f"delete=({' '.join(map(shlex.quote, command))})",
        # Tests give others.
        f'state="${{SCALING_DIT_DEADMAN_STATE:-{STATE}}}"',
        f'place="${{SCALING_DIT_DEADMAN_PLACE:-{PLACE}}}"',
        'units="${SCALING_DIT_DEADMAN_UNITS:-/etc/systemd/system}"',
        f"unit={UNIT}",
    ]
    return "\n".join(head) + "\n" + _BODY


def _check(job: Mapping[str, Any]) -> None:
    for key in ("backend", "resource", "zone", "minutes", "hours"):
        if not job.get(key):
            raise UserError(f"the dead-man switch needs {key!r}, greater than 0 if it is a number")
    if job["backend"] not in BACKENDS:
        raise UserError(
            f"the dead-man switch knows the back-ends {', '.join(BACKENDS)}, not {job['backend']!r}"
        )
    if not _NAME.fullmatch(str(job["resource"])) or not _ZONE.fullmatch(str(job["zone"])):
        raise UserError(
            f"the dead-man switch cannot delete {job['resource']!r} in {job['zone']!r}: no names of the cloud"
        )
    for key in ("minutes", "hours", "setup_minutes"):
        value = job.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"the dead-man switch: {key} must be a number greater than 0, not {value!r}")
    place = str(job.get("heartbeats", ""))
    if place and not place.startswith(("gs://", "/")):
        raise UserError(
            f"the dead-man switch: heartbeats lie on gs:// or at an absolute path, not at {place!r}"
        )
    if any(not char.isprintable() for key in ("heartbeats", "project") for char in str(job.get(key, ""))):
        raise UserError("the dead-man switch: paths and names must be printable")

"""One screen about a run, from its heartbeats and metrics: how far it is, how fast, and which hosts are in trouble."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.errors import UserError
from scaling_dit.monitor import heartbeat

# Seconds after which a heartbeat is late, and after which a run that writes heartbeats but finishes no step is.
LATE, STUCK = 120.0, 1800.0
# Hosts that are shown; those in trouble come first.
_HOSTS = 8
_GIB = 2**30


def read(workdir: str, now: float | None = None) -> str:
    """The screen of a run's folder, local or gs://.

    Raises:
      UserError: the folder has neither heartbeats nor metrics.
    """
    run = Workdir(workdir)
    beats, rows = heartbeat.read(run.heartbeats), read_metrics(run)
    if not beats and not rows:
        raise UserError(
            f"{workdir} has neither heartbeats nor metrics: has the run begun, and is this its --workdir?"
        )
    return "\n".join(render(workdir, beats, rows, time.time() if now is None else now))


def render(
    name: str, beats: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], now: float
) -> list[str]:
    """The lines of the screen.

    Args:
      name: of the run.
      beats: of all processes, see `monitor.heartbeat`; may be empty.
      rows: of the metrics by step, see `checkpoints.workdir.read_metrics`; may be empty.
      now: seconds since 1970.
    """
    newest = _newest(rows)
    lines = [f"{name}: {_progress(beats, newest)}", *_health(beats, now)]
    for title, text in (
        ("loss", _loss(rows)),
        ("speed", _speed(newest)),
        ("steps", _steps(newest, beats)),
        ("memory", _memory(newest, beats)),
    ):
        if text:
            lines.append(f"{title:8}{text}")
    return [*lines, *_hosts(beats, now)]


def _newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest speed and memory, and the step that they are of. Older values of other names would mislead."""
    for row in reversed(rows):
        if any(name.startswith("speed/") for name in row):
            return dict(row)
    return {}


def _progress(beats: Sequence[Mapping[str, Any]], newest: Mapping[str, Any]) -> str:
    first = next((beat for beat in beats if beat.get("process") == 0), None)
    if first is None:
        return f"no heartbeat; last metrics at step {newest['step']:,}" if newest else "no heartbeat"
    step, steps = first.get("step") or newest.get("step") or 0, first.get("steps")
    text = f"{first['state']}, step {step:,}"
    if steps:
        text += f" of {steps:,} ({step / steps:.0%})"
        rate = newest.get("speed/steps_per_second")
        if rate and first["state"] not in heartbeat.ENDED and steps > step:
            text += f", {_duration((steps - step) / rate)} to go"
    return text


def _health(beats: Sequence[Mapping[str, Any]], now: float) -> list[str]:
    if not beats:
        return []
    expected = int(beats[0].get("processes", len(beats)))
    running = [beat for beat in beats if beat["state"] not in heartbeat.ENDED]
    if not running:
        return [f"ended {_duration(now - max(beat['time'] for beat in beats))} ago"]
    late = [beat for beat in running if now - beat["time"] > LATE]
    text = f"{len(beats) - len(late)} of {expected} hosts answer"
    missing = expected - len(beats)
    if late or missing:
        names = ", ".join(f"{beat['host']} ({_duration(now - beat['time'])})" for beat in late[:4])
        text += "; no heartbeat from " + ", ".join(
            filter(None, (names, f"{missing} others" if missing else ""))
        )
    quiet = now - max(beat["progress_time"] for beat in running)
    lines = [f"{text}; last step finished {_duration(quiet)} ago"]
    if quiet > STUCK and not late:
        lines.append("its processes live, but no step ends: it compiles or evaluates for long, or it hangs")
    return lines


def _loss(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for title, name in (("", "train/loss"), ("validation ", "validation/loss")):
        found = next((row for row in reversed(rows) if name in row), None)
        if found is not None:
            parts.append(f"{title}{found[name]:.4g} (step {found['step']:,})")
    return ", ".join(parts)


def _speed(newest: Mapping[str, Any]) -> str:
    forms = (
        ("speed/steps_per_second", "{:.3g} steps/s"),
        ("speed/images_per_second", "{:,.4g} images/s"),
        ("speed/tokens_per_s", "{:,.0f} tokens/s"),
        ("speed/mfu", "MFU {:.1%}"),
        ("speed/model_tflops_per_chip", "{:.1f} model TFLOP/s per chip"),
        ("speed/data_wait", "{:.0%} waiting for data"),
        ("speed/goodput", "goodput {:.1%}"),
    )
    return ", ".join(form.format(newest[name]) for name, form in forms if name in newest)


def _steps(newest: Mapping[str, Any], beats: Sequence[Mapping[str, Any]]) -> str:
    forms = (("p50", "p50 {:.3g} s"), ("p95", "p95 {:.3g} s"), ("max", "longest {:.3g} s"))
    parts = [
        form.format(newest[key]) for name, form in forms if (key := f"speed/step_seconds_{name}") in newest
    ]
    if "speed/slowest_process" in newest:
        process = int(newest["speed/slowest_process"])
        host = next((f"{beat['host']}, " for beat in beats if beat.get("process") == process), "")
        wait = newest["speed/slowest_host_wait"]
        parts.append(f"slowest host: {host}process {process}, devices wait {wait:.3g} s a step for it")
    return ", ".join(parts)


def _memory(newest: Mapping[str, Any], beats: Sequence[Mapping[str, Any]]) -> str:
    values = [value for beat in beats for value in (beat.get("memory") or {}).values()]
    if not values:
        return ""
    in_use, peak = (max(value[place] for value in values) / _GIB for place in (0, 1))
    return f"{in_use:.2f} GiB in use, peak {peak:.2f} GiB, the most of {len(values)} devices"


def _hosts(beats: Sequence[Mapping[str, Any]], now: float) -> list[str]:
    if len(beats) < 2:
        return []
    order = sorted(
        beats, key=lambda beat: (beat["time"] > now - LATE, -(beat.get("host_wait") or 0), beat["process"])
    )
    rows = [("process", "host", "state", "step", "heartbeat", "host wait")]
    for beat in order[:_HOSTS]:
        wait = beat.get("host_wait")
        rows.append(
            (
                str(beat["process"]),
                str(beat["host"]),
                beat["state"],
                "" if beat.get("step") is None else f"{beat['step']:,}",
                f"{_duration(now - beat['time'])} ago",
                "" if wait is None else f"{wait:.3g} s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [*lines, *([f"and {len(beats) - _HOSTS} more"] if len(beats) > _HOSTS else [])]


def _duration(seconds: float) -> str:
    """Such as "12 s", "5 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

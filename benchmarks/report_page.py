"""How long a study's report takes to write, and how long a browser takes to show its first chart.

    python benchmarks/report_page.py --note=benchmarks/report_page_cpu.md

Makes studies of three sizes whose results follow a law with noise, writes the report of each in a process of its own,
and opens it in headless Chromium, which must be installed (`--browser` says where). The first chart's time is counted
from the start of loading, by the page itself. Chromium's network log says which addresses were asked for.
"""

import argparse
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from header import header
from peak import peak_mib

ROOT = pathlib.Path(__file__).parents[1]
RUNS, SEEDS = (99, 300, 1002), 3
# Seconds in which a page must have all its charts.
PATIENCE = 120
# What a page is given to say when its charts are there; it changes nothing else.
REPORTS = """<script>
new MutationObserver(function () {
  var seen = document.body.dataset;
  if (!seen.drawn) { return; }
  console.log("charts: first after " + seen.first + " ms, all after " + Math.round(performance.now()) + " ms");
}).observe(document.body, { attributes: true });
</script>
"""
# The initiator that Chromium's network log gives to requests of its own.
BROWSER = "not an origin"
SEEN = re.compile(r"charts: first after (\d+) ms, all after (\d+) ms")


class Row(NamedTuple):
    """One size of a study: seconds are those of the processor, `first` and `all` milliseconds of the clock."""

    runs: int
    seconds: float
    gib: float
    mb: float
    first: int
    all: int
    asked: list[str]


def main() -> None:
    """Measures each size, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    parser.add_argument("--runs", default=",".join(map(str, RUNS)), help="sizes, separated by commas")
    parser.add_argument("--browser", default="chromium", help="Chromium's or Chrome's command")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(pathlib.Path(args.write[0]), int(args.write[1]))
        return
    if shutil.which(args.browser) is None:
        sys.exit(f"report_page: there is no {args.browser}: install it, or name another with --browser")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runs in map(int, args.runs.split(",")):
            rows.append(measure(pathlib.Path(folder) / str(runs), runs, args.browser))
            print(rows[-1], flush=True)
    if args.note:
        args.note.write_text(note(rows, version(args.browser)))


def write(folder: pathlib.Path, runs: int) -> None:
    """Writes the report of a study of so many runs, and prints seconds, GiB at most, and the page's path."""
    sys.path.insert(0, str(ROOT))
    from scaling_dit.scaling import report
    from tests.support import simulated_study

    made = simulated_study.study(folder, count=runs // SEEDS, seeds=SEEDS)
    began = time.process_time()
    page = report.write(made)
    seconds = time.process_time() - began
    print(json.dumps([seconds, peak_mib() / 2**10, str(page)]))


def measure(folder: pathlib.Path, runs: int, browser: str) -> Row:
    """The row of one size; its files go into `folder`."""
    command = [sys.executable, __file__, "--write", str(folder), str(runs)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, gib, page = json.loads(printed.splitlines()[-1])
    return Row(
        runs, seconds, gib, pathlib.Path(page).stat().st_size / 1e6, *opened(pathlib.Path(page), browser)
    )


def opened(page: pathlib.Path, browser: str) -> tuple[int, int, list[str]]:
    """Milliseconds to the first chart and to all of them, and each address that the page asked for.

    Raises TimeoutError if the charts are not there in two minutes.
    """
    copy = page.with_name("measured.html")
    # The first is the page's own; vega's code may hold others.
    copy.write_text(page.read_text().replace("<body>", "<body>" + REPORTS, 1))
    # A browser that is ended still writes for a moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log, said = pathlib.Path(profile) / "network.json", pathlib.Path(profile) / "said"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}/user",
            f"--log-net-log={log}", "--enable-logging=stderr", "--remote-debugging-port=0", copy.as_uri(),
        ]  # fmt: skip
        with said.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            try:
                found = _wait(said, process)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)
        return int(found[1]), int(found[2]), asked(log.read_text())


def _wait(said: pathlib.Path, process: subprocess.Popen) -> re.Match[str]:
    """What the page said of its charts."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        found = SEEN.search(said.read_text(errors="replace"))
        if found:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"no charts in {PATIENCE} s: {said.read_text(errors='replace')[-2000:]}")


def asked(log: str) -> list[str]:
    """Each address in a network log of Chromium that a page began a request for, without the browser's own requests."""
    # A browser that is ended leaves the list of events open.
    try:
        events = json.loads(log)["events"]
    except json.JSONDecodeError:
        events = json.loads(log.rstrip().rstrip(",") + "]}")["events"]
    parameters = [event.get("params", {}) for event in events]
    return sorted({each["url"] for each in parameters if each.get("initiator", BROWSER) != BROWSER})


def version(browser: str) -> str:
    """What the browser calls itself."""
    return subprocess.run([browser, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def note(rows: list[Row], browser: str) -> str:
    """The note as markdown."""
    lines = header("A study's report: writing and opening it", "benchmarks/report_page.py")
    lines += [
        "",
        f"Opened with {browser}. Simulated studies of {SEEDS} seeds and 4 points a run; seconds are of the processor, "
        "milliseconds of the clock from the start of loading.",
        "",
        "| runs | written in s | memory GiB | page MB | first chart ms | all charts ms | network requests |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.runs:,} | {row.seconds:.1f} | {row.gib:.2f} | {row.mb:.1f} | {row.first:,} | {row.all:,} | "
        f"{', '.join(row.asked) or 'none'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

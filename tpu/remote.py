"""The shell scripts that run on the workers. POSIX sh; every value in them is quoted.

A worker keeps the files of a job in `~/.scaling-dit/NAME/`:

    source.tgz, source/  the copied source      env   secrets, readable by its user only
    setup                stamp of the set-up    log   output of all attempts
    attempt              number of the start    pid   its process group and boot id
    exit                 its exit code

Each script may run twice: a second run finds what the first one did. The first line of each names it.
"""

import re

from .commands import join, quote
from .job import Job
from .observations import Work, Worker

FOLDER = ".scaling-dit"
_MARK, _READY = "scaling-dit-status", "scaling-dit-ready"
# What a worker is called. The machines of a slice have different host names.
_WORKER = '"${SCALING_DIT_WORKER:-$(hostname)}"'
# Seconds between asking a process to end and ending it.
GRACE = 90


def folder(job: Job) -> str:
    """The folder of a job on a worker, as a shell reads it."""
    return f'"$HOME"/{FOLDER}/{job.name}'


def default_setup(job: Job) -> str:
    """The set-up of a worker when the user gives none: a virtual environment with the copied source, or the release."""
    what = "'./source[gcs,tensorboard,tpu]'" if job.source else "'scaling-dit[gcs,tensorboard,tpu]'"
    pins = "if [ -f source/constraints.txt ]; then pins='-c source/constraints.txt'; else pins=; fi\n"
    # The images have Python 3.10, and uv brings another with it.
    return (
        "python3 -m pip install --quiet --user uv\n"
        'PATH="$HOME/.local/bin:$PATH"\n'
        "uv venv --quiet --allow-existing --python 3.11 venv\n"
        f"{pins if job.source else 'pins='}\n"
        f"uv pip install --quiet --python venv/bin/python $pins {what}\n"
    )


def make_folder(job: Job) -> str:
    """Makes the folder of a job, into which files are copied."""
    return f"# folder of {job.name}\numask 077\nmkdir -p {folder(job)}\n"


def setup(job: Job, stamp: str) -> str:
    """Prepares a worker, once for each stamp; the job's own text runs in the job's folder.

    It prints a line when the worker is ready, because gcloud may leave out workers that it cannot reach and end well.
    """
    text = job.setup or default_setup(job)
    return (
        f"# set-up of {job.name}\n"
        f"set -eu\numask 077\nmkdir -p {folder(job)}\ncd {folder(job)}\n"
        f'if [ "$(cat setup 2>/dev/null)" != {stamp} ]; then\n'
        "  if [ -f source.tgz ]; then rm -rf source; mkdir source; tar -xzf source.tgz -C source; fi\n"
        f"  sh -eu -c {quote(text)} >> setup.log 2>&1 < /dev/null || "
        "{ code=$?; tail -n 20 setup.log >&2; exit $code; }\n"
        f"  echo {stamp} > setup.new\n  mv setup.new setup\nfi\n"
        f"printf '{_READY} %s {stamp}\\n' {_WORKER}\n"
    )


def ready(text: str, stamp: str) -> int:
    """How many workers printed that they are set up."""
    return len(set(re.findall(rf"{_READY} (\S+) {stamp}\b", text)))


def start(job: Job, attempt: int) -> str:
    """Starts the job, unless this attempt was started; ends what an earlier attempt left."""
    exports = "".join(f"export {name}={quote(value)}\n" for name, value in sorted(job.environment.items()))
    inner = (
        # The job may end by a signal to its whole group; this shell stays to write down the exit code.
        "trap : TERM INT HUP\n"
        "job=$PWD\n"
        f"{exports}"
        "if [ -f env ]; then set -a; . ./env; set +a; fi\n"
        'PATH="$PWD/venv/bin:$HOME/.local/bin:$PATH"\nexport PATH\n'
        f"echo {quote(f'--- attempt {attempt}')} >> log\n"
        "if [ -d source ]; then cd source; fi\n"
        f'{join(job.command)} >> "$job"/log 2>&1 < /dev/null\n'
        'echo $? > "$job"/exit.new\nmv "$job"/exit.new "$job"/exit\n'
    )
    return (
        f"# start {attempt} of {job.name}\n"
        f"set -eu\numask 077\nmkdir -p {folder(job)}\ncd {folder(job)}\n"
        f'if [ "$(cat attempt 2>/dev/null)" = {attempt} ]; then exit 0; fi\n'
        f"{_END_GROUP}"
        "rm -f exit pid\n"
        f"echo {attempt} > attempt.new\nmv attempt.new attempt\n"
        f"printf '%s' {quote(inner)} > job.sh\n"
        # The group's number is the number of its first process. setsid gives it a session that outlives ssh.
        "setsid sh -c 'echo \"$$ $(cat /proc/sys/kernel/random/boot_id)\" > pid; exec sh job.sh' "
        "> /dev/null 2>&1 < /dev/null &\n"
        "i=0; while [ ! -s pid ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done\n"
        "[ -s pid ]\n"
    )


# Ends the process group of the last attempt: first so that it can save, then at once.
_END_GROUP = (
    "if [ -s pid ] && [ ! -f exit ]; then\n"
    "  read -r group boot < pid\n"
    '  if [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -s TERM -- "-$group" 2>/dev/null; then\n'
    f'    i=0; while kill -s 0 -- "-$group" 2>/dev/null && [ $i -lt {GRACE * 5} ]; do sleep 0.2; i=$((i + 1)); done\n'
    '    kill -s KILL -- "-$group" 2>/dev/null || true\n'
    "  fi\nfi\n"
)


def save(job: Job) -> str:
    """Ends the job so that it saves, and waits for that."""
    return f"# save {job.name}\nset -u\ncd {folder(job)} 2>/dev/null || exit 0\n{_END_GROUP}"


def status(job: Job) -> str:
    """Prints one line about the job; `read_status` reads it."""
    return (
        f"# status of {job.name}\n"
        f"set -u\ncd {folder(job)} 2>/dev/null || cd /\n"
        "attempt=$(cat attempt 2>/dev/null || echo 0)\ncode=-; age=0; work=GONE\n"
        "step=$(grep -aEo 'step [0-9]+' log 2>/dev/null | tail -n 1 | cut -d' ' -f2)\n"
        "if [ -f exit ]; then\n"
        "  work=ENDED; code=$(cat exit); age=$(( $(date +%s) - $(stat -c %Y exit) ))\n"
        "elif [ -s pid ]; then\n"
        "  read -r group boot < pid\n"
        '  if [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -s 0 -- "-$group" 2>/dev/null; then\n'
        "    work=RUNNING\n  fi\nfi\n"
        f"printf '{_MARK} %s %s %s %s %s %s\\n' {_WORKER} "
        '"$attempt" "$work" "$code" "${step:--1}" "$age"\n'
    )


def read_status(text: str) -> tuple[Worker, ...]:
    """What the workers printed, one line each; other lines, such as gcloud's own, are left out."""
    found = {}
    for name, attempt, work, code, step, age in re.findall(
        rf"{_MARK} (\S+) (\d+) (\w+) (-|\d+) (-?\d+) (-?\d+)", text
    ):
        if work in Work.__members__:
            number = None if code == "-" else int(code)
            found[name] = Worker(name, int(attempt), Work[work], number, int(step), float(age))
    return tuple(found[name] for name in sorted(found))


def logs(job: Job, lines: int, follow: bool) -> str:
    """Prints the end of the job's output."""
    return f"# logs of {job.name}\ntail -n {lines} {'-F ' if follow else ''}{folder(job)}/log\n"


def kill(job: Job) -> str:
    """Kills the job without a chance to save, as a lost host would."""
    return (
        f'# kill {job.name}\nset -eu\ncd {folder(job)}\nread -r group boot < pid\nkill -s KILL -- "-$group"\n'
    )


def tensorboard(job: Job, port: int) -> str:
    """Serves TensorBoard of a run on the worker's own disk."""
    return (
        f"# TensorBoard of {job.name}\ncd {folder(job)}\n"
        f'PATH="$PWD/venv/bin:$PATH" exec tensorboard --port={port} --logdir={quote(job.workdir)}\n'
    )


def environment_file(values: dict[str, str]) -> str:
    """The file of secrets that is copied to the workers."""
    return "".join(f"{name}={quote(value)}\n" for name, value in sorted(values.items()))

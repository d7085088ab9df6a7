"""Lets the processes of a run find each other before jax joins them, so that an error can name a missing process.

If a process is missing, jax's own start-up ends in a stack dump that does not name it. Here process 0 listens at the
coordinator's address, and the others connect and send their number. Once all have connected, or the time is up,
process 0 sends the result to all of them and frees the address for jax. Uses the standard library only.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping

from scaling_dit.errors import UserError
from scaling_dit.parallel import supervise

# Seconds between two attempts to connect to process 0.
_RETRY = 0.2
# Seconds that a connected process has to send its number.
_ANSWER = 10.0
# The most missing processes that an error names.
_SHOWN = 8
# Prefixes of the line that process 0 sends on failure.
_MISSING, _DIFFERENT = "missing ", "different "


class MissingProcess(UserError):
    """Some processes did not connect in time. This is not the user's mistake: the same command may work later."""

    exit_code = supervise.LOST


def meet(coordinator: str, processes: int, process: int, seconds: float, about: Mapping[str, str]) -> None:
    """Returns in every process once all `processes` have connected.

    Args:
      coordinator: "host:port" of process 0.
      processes: the number of processes.
      process: the index of this process, from 0.
      seconds: how long to wait for the others.
      about: values by name that must be equal in all processes, such as the version of a library.

    Raises:
      MissingProcess: some processes did not connect in time.
      UserError: a process connected twice or was started differently. All connected processes raise the same line.
    """
    host, port = split_address(coordinator)
    about = {"--processes": str(processes), **about}
    deadline = time.monotonic() + seconds
    if process == 0:
        _gather(host, port, processes, deadline, seconds, about)
    else:
        _call(host, port, process, deadline, seconds, about)


def split_address(coordinator: str) -> tuple[str, int]:
    """("host", port) of "host:port"; raises UserError for anything else."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator} is no HOST:PORT; give that of process 0: 10.0.0.2:8482")
    return host.strip("[]"), int(port)


def _gather(
    host: str, port: int, processes: int, deadline: float, seconds: float, about: Mapping[str, str]
) -> None:
    came: set[int] = set()
    callers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(host, port))
        fault: UserError | None = None
        while len(came) < processes - 1 and fault is None:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                absent = sorted(set(range(1, processes)) - came)
                fault = MissingProcess(
                    f"{_named(absent)} of {processes} did not come to {host}:{port} within {seconds:g} s"
                )
                break
            hello = _read(caller)
            # The connection came from another program.
            if hello is None:
                caller.close()
                continue
            number = hello["process"]
            fault = _difference(number, hello["about"], about)
            if fault is None and number in came:
                fault = UserError(f"process {number} came twice; give each process its own --process")
            came.add(number)
            callers.append(caller)
        for caller in callers:
            _send(caller, _line(fault))
    if fault is not None:
        raise fault


def _call(
    host: str, port: int, process: int, deadline: float, seconds: float, about: Mapping[str, str]
) -> None:
    hello = {"process": process, "about": dict(about)}
    for _ in _until(deadline):
        try:
            with socket.create_connection((host, port), timeout=_ANSWER) as server:
                # If nobody listens, the system may connect this socket to itself.
                if server.getsockname() == server.getpeername():
                    continue
                _send(server, json.dumps(hello))
                server.settimeout(max(0.001, deadline - time.monotonic()) + _ANSWER)
                answer = server.makefile().readline()
        except OSError:
            continue
        if answer.endswith("\n"):
            if answer.startswith(_MISSING):
                raise MissingProcess(answer.removeprefix(_MISSING))
            if answer.strip():
                raise UserError(answer.removeprefix(_DIFFERENT))
            return
    raise MissingProcess(
        f"process 0 did not answer at {host}:{port} within {seconds:g} s; is it started, and is the port open?"
    )


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(_RETRY)


def _listen(host: str, port: int) -> socket.socket:
    """Listens on all addresses, because other hosts may know this host by a name that it does not know itself."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {host}:{port} ({error.strerror}); give another port in --coordinator"
        ) from None


def _read(caller: socket.socket) -> dict | None:
    caller.settimeout(_ANSWER)
    try:
        hello = json.loads(caller.makefile().readline())
        return {"process": int(hello["process"]), "about": dict(hello["about"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _send(other: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        other.sendall(line.encode() + b"\n")


def _line(fault: UserError | None) -> str:
    if fault is None:
        return ""
    return f"{_MISSING if isinstance(fault, MissingProcess) else _DIFFERENT}{fault}"


def _difference(process: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> UserError | None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            return UserError(
                f"process {process} has {name} {theirs.get(name)}, process 0 has {value}; start all of them alike"
            )
    return None


def _named(absent: list[int]) -> str:
    shown = ", ".join(map(str, absent[:_SHOWN]))
    more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    return f"process{'es' if len(absent) > 1 else ''} {shown}{more}"

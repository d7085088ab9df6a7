"""Documented flags of the gcloud commands that `tpu/` uses, in three tables: GA, alpha and Compute Engine.

As of gcloud 578 (August 2026). `parse` refuses an unknown command or flag, a missing required flag, a flag without its
value, and flags that exclude each other.
"""

import dataclasses


class FlagError(Exception):
    """What gcloud would print as ERROR."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One command: positional arguments, flags with a value, flags without, required ones, and sets of which at most
    one (or with `one_of` exactly one) may be given."""

    positional: int
    values: frozenset[str]
    switches: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    at_most: tuple[tuple[str, ...], ...] = ()
    together: tuple[tuple[str, str], ...] = ()


def flags(text: str) -> frozenset[str]:
    return frozenset(f"--{word}" for word in text.split())


_WIDE_VALUES = flags("project format account verbosity filter limit page-size sort-by")
_WIDE_SWITCHES = flags("quiet log-http")

_QR = ("compute", "tpus", "queued-resources")
_VM = ("compute", "tpus", "tpu-vm")
_CREATE = flags(
    "zone runtime-version node-id node-count node-prefix accelerator-type type topology valid-after-duration "
    "valid-after-time valid-until-duration valid-until-time network subnetwork service-account scopes metadata "
    "metadata-from-file tags data-disk description labels range boot-disk reservation-host-project "
    "reservation-host-folder reservation-host-organization"
)
_CREATE_SWITCHES = flags("spot guaranteed reserved internal-ips shielded-secure-boot async")
_CREATE_RULES = {
    "required": ("--zone", "--runtime-version"),
    "one_of": (("--node-id", "--node-count"), ("--accelerator-type", "--type")),
    "together": (("--node-prefix", "--node-count"), ("--type", "--topology"), ("--topology", "--type")),
}
_CREATE_EXCLUSIVE = (
    ("--valid-until-duration", "--valid-until-time"),
    ("--valid-after-duration", "--valid-after-time"),
)
_SSH = flags(
    "zone node worker command output-directory ssh-flag ssh-key-file strict-host-key-checking batch-size"
)
_SSH_SWITCHES = flags("internal-ip tunnel-through-iap force-key-file-overwrite plain dry-run")
_SCP = _SSH - flags("command output-directory ssh-flag") | flags("scp-flag")
_SCP_SWITCHES = _SSH_SWITCHES | flags("recurse compress")

GA: dict[tuple[str, ...], Spec] = {
    (*_QR, "create"): Spec(1, _CREATE, _CREATE_SWITCHES, at_most=_CREATE_EXCLUSIVE, **_CREATE_RULES),
    (*_QR, "describe"): Spec(1, flags("zone"), required=("--zone",)),
    (*_QR, "delete"): Spec(1, flags("zone"), flags("force async"), required=("--zone",)),
    (*_QR, "list"): Spec(0, flags("zone"), flags("uri"), required=("--zone",)),
    (*_QR, "ssh"): Spec(
        1, _SSH, _SSH_SWITCHES, required=("--command",), at_most=(("--internal-ip", "--tunnel-through-iap"),)
    ),
    (*_QR, "scp"): Spec(2, _SCP, _SCP_SWITCHES, at_most=(("--internal-ip", "--tunnel-through-iap"),)),
    (*_VM, "describe"): Spec(1, flags("zone"), required=("--zone",)),
    ("storage", "buckets", "describe"): Spec(1, flags("additional-headers"), flags("raw")),
}
ALPHA: dict[tuple[str, ...], Spec] = {
    **{name: spec for name, spec in GA.items() if name[0] != "storage"},
    (*_QR, "create"): Spec(
        1,
        _CREATE | flags("provisioning-model max-run-duration reservation workload-type network-config"),
        _CREATE_SWITCHES | flags("best-effort autocheckpoint-enabled"),
        at_most=(
            *_CREATE_EXCLUSIVE,
            *(("--network-config", other) for other in ("--network", "--subnetwork", "--internal-ips")),
            *(
                ("--reservation", f"--reservation-host-{kind}")
                for kind in ("project", "folder", "organization")
            ),
        ),
        **_CREATE_RULES,
    ),
    (*_VM, "simulate-maintenance-event"): Spec(
        1, flags("zone workers"), flags("async"), required=("--zone",)
    ),
    ("quotas", "info", "list"): Spec(
        0, flags("service folder organization billing-project"), required=("--service",)
    ),
}
_TEMPLATE = flags(
    "machine-type maintenance-policy provisioning-model instance-termination-action image image-family image-project "
    "boot-disk-size boot-disk-type description labels metadata metadata-from-file network network-interface "
    "network-tier region subnet scopes service-account tags max-run-duration termination-time reservation "
    "reservation-affinity instance-template-region min-cpu-platform"
)
_GROUP = flags(
    "template size zone region zones base-instance-name description workload-policy target-size-policy-mode "
    "default-action-on-vm-failure instance-redistribution-type target-distribution-shape health-check initial-delay "
    "list-managed-instances-results"
)
_COMPUTE_SSH = flags(
    "zone command ssh-flag ssh-key-file strict-host-key-checking container ssh-key-expiration ssh-key-expire-after"
)
_COMPUTE_SCP = _COMPUTE_SSH - flags("command ssh-flag container") | flags("scp-flag port")
_COMPUTE_SSH_SWITCHES = flags("internal-ip tunnel-through-iap plain dry-run force-key-file-overwrite")
_PLACE, _ONE_PLACE = flags("zone region"), (("--zone", "--region"),)
COMPUTE: dict[tuple[str, ...], Spec] = {
    ("compute", "resource-policies", "create", "workload-policy"): Spec(
        1,
        flags("region type description accelerator-topology accelerator-topology-mode max-topology-distance"),
        required=("--type", "--region"),
    ),
    ("compute", "resource-policies", "delete"): Spec(1, flags("region"), required=("--region",)),
    ("compute", "instance-templates", "create"): Spec(1, _TEMPLATE, flags("address no-address no-scopes preemptible")),
    ("compute", "instance-templates", "delete"): Spec(1, flags("region"), flags("global")),
    ("compute", "instance-groups", "managed", "create"): Spec(
        1, _GROUP, flags("force-update-on-repair"), required=("--size", "--template"), one_of=(("--zone", "--region"),)
    ),
    ("compute", "instance-groups", "managed", "describe"): Spec(1, _PLACE, one_of=_ONE_PLACE),
    ("compute", "instance-groups", "managed", "list-instances"): Spec(1, _PLACE, flags("uri"), one_of=_ONE_PLACE),
    ("compute", "instance-groups", "managed", "delete"): Spec(1, _PLACE, one_of=_ONE_PLACE),
    ("compute", "instance-groups", "managed", "list"): Spec(0, flags("zones regions regexp"), flags("uri")),
    ("compute", "ssh"): Spec(1, _COMPUTE_SSH, _COMPUTE_SSH_SWITCHES | flags("troubleshoot")),
    ("compute", "scp"): Spec(2, _COMPUTE_SCP, _COMPUTE_SSH_SWITCHES | flags("recurse compress")),
    ("compute", "instances", "simulate-maintenance-event"): Spec(
        1, flags("zone"), flags("async with-extended-notifications")
    ),
}  # fmt: skip
# Values that gcloud takes.
CHOICES = {
    "--provisioning-model": {
        "standard", "spot", "reservation-bound", "flex-start", "STANDARD", "SPOT", "FLEX_START", "RESERVATION_BOUND",
    },
    "--target-size-policy-mode": {"bulk", "individual"},
    "--default-action-on-vm-failure": {"repair", "do-nothing"},
    "--maintenance-policy": {"TERMINATE", "MIGRATE"},
    "--instance-termination-action": {"STOP", "DELETE"},
    "--reservation-affinity": {"any", "none", "specific"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command that gcloud would take: its track and words, what it names, and its flags."""

    track: str
    words: tuple[str, ...]
    arguments: tuple[str, ...]
    flags: dict[str, list[str]]

    def get(self, flag: str, default: str = "") -> str:
        return self.flags.get(f"--{flag}", [default])[-1]

    def has(self, flag: str) -> bool:
        return f"--{flag}" in self.flags

    def mapping(self, flag: str) -> dict[str, str]:
        text, delimiter = self.get(flag), ","
        if text.startswith("^"):
            delimiter, text = text[1], text[3:]
        return dict(pair.split("=", 1) for pair in text.split(delimiter) if pair)


def _find(track: str, words: list[str]) -> tuple[tuple[str, ...], Spec]:
    tables = [ALPHA] if track == "alpha" else [GA, COMPUTE]
    for table in tables:
        for name, spec in table.items():
            if tuple(words[: len(name)]) == name:
                return name, spec
    raise FlagError(f"(gcloud) Invalid choice: {' '.join([track, *words[:4]])!r}.")


def parse(command: list[str]) -> Parsed:
    """The command after `gcloud`. Raises FlagError for anything that is not documented."""
    words = list(command)
    track = words.pop(0) if words and words[0] in ("alpha", "beta", "preview") else ""
    if track not in ("", "alpha"):
        raise FlagError(f"(gcloud) Invalid choice: {track!r}.")
    name, spec = _find(track, words)
    given: dict[str, list[str]] = {}
    positional = []
    values, switches = spec.values | _WIDE_VALUES, spec.switches | _WIDE_SWITCHES
    rest = words[len(name) :]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag in values:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise FlagError(f"argument {flag}: expected one argument")
                value = rest.pop(0)
            if flag in CHOICES and value not in CHOICES[flag]:
                raise FlagError(f"argument {flag}: Invalid choice: {value!r}.")
            given.setdefault(flag, []).append(value)
        elif flag in switches and not equals:
            given.setdefault(flag, []).append("")
        else:
            raise FlagError(f"unrecognized arguments: {word.partition('=')[0]}")
    if len(positional) != spec.positional:
        raise FlagError(f"{name}: {spec.positional} arguments expected, not {positional}")
    for flag in spec.required:
        if flag not in given:
            raise FlagError(f"argument {flag}: Must be specified.")
    for several in spec.one_of:
        if sum(flag in given for flag in several) != 1:
            raise FlagError(f"Exactly one of {' | '.join(several)} must be specified.")
    for several in spec.at_most:
        if sum(flag in given for flag in several) > 1:
            raise FlagError(f"At most one of {' | '.join(several)} can be specified.")
    for flag, other in spec.together:
        if flag in given and other not in given:
            raise FlagError(f"argument {other}: Must be specified, with {flag}.")
    for flag in ("--node-count",):
        if flag in given and int(given[flag][-1]) < 2:
            raise FlagError("Node count must be greater than 1")
    return Parsed(track, name, tuple(positional), given)

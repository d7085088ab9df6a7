"""Judges the facts of all hosts: each check in plain words, the same in every process. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Seconds by which clocks may differ.
CLOCKS = 5.0


class Check(NamedTuple):
    """One check: its name, whether it passed (None: not made), and what was found, in words."""

    name: str
    passed: bool | None
    words: str


def judge(facts: Sequence[Mapping[str, Any]], chips: int | None = None) -> list[Check]:
    """All checks.

    Args:
      facts: of each process, in their order, see `probe.facts`.
      chips: chips that there should be; None if that is not known.
    """
    return [
        devices(facts, chips),
        same(facts, "versions", "packages"),
        same(facts, "config", "config"),
        storage(facts),
        clocks(facts),
        sums(facts),
        kernels(facts),
        steps(facts),
    ]


def name_of(fact: Mapping[str, Any]) -> str:
    """A host as it is named in words."""
    return f"{fact['host']} (process {fact['process']})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def devices(facts: Sequence[Mapping[str, Any]], chips: int | None) -> Check:
    """Every host has as many devices of its own as the others and sees those of all, of one kind."""
    total = sum(fact["local_devices"] for fact in facts)
    first = facts[0]
    for field, what in (("kind", "are"), ("local_devices", "number"), ("devices", "in all hosts number")):
        others = [fact for fact in facts if fact[field] != first[field]]
        if others:
            there = f"its devices {what} {others[0][field]}, those of {name_of(first)} {first[field]}"
            return Check("devices", False, f"{_listed([name_of(fact) for fact in others])}: {there}")
    if first["devices"] != total:
        return Check(
            "devices", False, f"hosts see {first['devices']} devices, but have {total} of their own together"
        )
    found = total // first["devices_per_chip"]
    words = f"{len(facts)} host{'s' * (len(facts) > 1)} with {first['local_devices']} devices each, {first['kind']}"
    if chips is not None and found != chips:
        return Check("devices", False, f"{words}: {found} chips, not {chips}")
    return Check("devices", True, f"{words}; every host sees all {total}")


def same(facts: Sequence[Mapping[str, Any]], field: str, name: str) -> Check:
    """A mapping of values, or one value, is the same on all hosts."""
    first = facts[0]
    for fact in facts[1:]:
        mine, other = _as_mapping(first[field], field), _as_mapping(fact[field], field)
        for key in sorted(mine.keys() | other.keys()):
            if mine.get(key) != other.get(key):
                sides = ((other, fact), (mine, first))
                there = ", ".join(
                    f"{values.get(key, 'missing')} on {name_of(host)}" for values, host in sides
                )
                return Check(name, False, f"{key} differs: {there}")
    shown = ", ".join(f"{key} {value}" for key, value in _as_mapping(first[field], field).items())
    return Check(name, True, shown if len(facts) == 1 else f"equal on all hosts: {shown}")


def _as_mapping(value: Any, field: str) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {field: value}


def storage(facts: Sequence[Mapping[str, Any]]) -> Check:
    """Every host wrote a file to the workdir, and read those of all hosts."""
    if facts[0]["storage"] is None:
        return Check("workdir", None, "not checked without --workdir")
    for fact in facts:
        if fact["storage"]["error"]:
            return Check("workdir", False, f"{name_of(fact)}: {fact['storage']['error']}")
    longest = max(fact["storage"]["seconds"] for fact in facts)
    others = " and read those of the others" if len(facts) > 1 else ""
    return Check("workdir", True, f"every host wrote, read and deleted a file{others}, in {longest:.2g} s")


def clocks(facts: Sequence[Mapping[str, Any]]) -> Check:
    """The clocks of hosts, and of the store, differ by less than CLOCKS seconds."""
    words = []
    for fact in facts:
        if abs(fact["clock"]) > CLOCKS:
            there = f"{abs(fact['clock']):.1f} s {'ahead of' if fact['clock'] > 0 else 'behind'} {name_of(facts[0])}"
            return Check("clocks", False, f"{name_of(fact)} is {there}; is its time service running?")
        store = (fact["storage"] or {}).get("clock")
        if store is not None and abs(store) > CLOCKS:
            side = "ahead of" if store > 0 else "behind"
            return Check(
                "clocks",
                False,
                f"{name_of(fact)} is {abs(store):.1f} s {side} the clock of the workdir's store",
            )
    if len(facts) > 1:
        words.append(f"hosts differ by {max(abs(fact['clock']) for fact in facts):.2f} s at most")
    if any((fact["storage"] or {}).get("clock") is not None for fact in facts):
        words.append("and agree with the workdir's store")
    return Check(
        "clocks", True if words else None, " ".join(words) or "one host, and no --workdir to compare with"
    )


def sums(facts: Sequence[Mapping[str, Any]]) -> Check:
    """The sum over all devices is that of one device, and all devices compute the same product."""
    for fact in facts:
        if fact["sum_error"]:
            return Check("all-reduce", False, f"{name_of(fact)}: {fact['sum_error']}")
    return Check(
        "all-reduce", True, "the sum over all devices is exactly that of one, and their products are equal"
    )


def kernels(facts: Sequence[Mapping[str, Any]]) -> Check:
    """The implementation of each kind of attention call."""
    found = facts[0]["steps"].get("attention")
    if not found:
        return Check("attention", None, "not known without the steps below")
    if facts[0]["kind"].startswith("TPU") and all(text.endswith(": xla") for text in found.split("; ")):
        found += " (no kernel of the TPU takes these shapes or types; bfloat16 would)"
    return Check("attention", True, found)


def steps(facts: Sequence[Mapping[str, Any]]) -> Check:
    """Real steps of the config ran on all hosts, with a finite loss that is the same everywhere."""
    for fact in facts:
        if fact["steps"].get("error"):
            return Check("steps", False, f"{name_of(fact)}: {fact['steps']['error']}")
    losses = facts[0]["steps"]["losses"]
    for fact in facts[1:]:
        if fact["steps"]["losses"] != losses:
            other = f"{fact['steps']['losses']} on {name_of(fact)}, {losses} on {name_of(facts[0])}"
            return Check("steps", False, f"losses differ: {other}")
    slowest = max(fact["steps"]["seconds"] for fact in facts)
    compiled = max(fact["steps"]["compile_seconds"] for fact in facts)
    shown = ", ".join(f"{loss:.4g}" for loss in losses)
    return Check(
        "steps",
        True,
        f"{len(losses)} steps, losses {shown}; {slowest:.3g} s each after {compiled:.0f} s of compiling",
    )

"""Writes the compiler's schedule of the attention kernel for short sequences beside the cycles that it declares.

    python benchmarks/kernel_cycles.py --note=benchmarks/kernel_cycles.md

libtpu can write the instruction bundles of a kernel to files, one bundle a cycle. The bundles inside the loop over the
grid, times its steps, are the cycles of the kernel if it never waits for memory. XLA does not see them: it uses the
`estimated_cycles` that scaling_dit/nn/short_attention.py declares. Needs `libtpu` from PyPI, but no TPU.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from header import header

from scaling_dit.parallel import topologies
from scaling_dit.planning.hlo import Program

TOPOLOGIES = ("v5p:2x2x1", "v4:2x2x1", "v5e:2x2", "v6e:2x2")
# Chips whose two cores divide the grid.
TWO_CORES = ("v4", "v5p")
BATCH = 8
# Queries, keys, head size, width: tokens of 256 px in the UNets' deepest and second stage, U-ViT and its narrow forms,
# the other transformers, and their attention to captions.
CASES = (
    (64, 64, 64, 1280),
    (64, 77, 64, 1280),
    (256, 256, 64, 640),
    (256, 77, 64, 640),
    (334, 334, 64, 1024),
    (334, 334, 72, 1152),
    (334, 334, 96, 1536),
    (334, 334, 128, 2048),
    (256, 256, 128, 2048),
    (256, 77, 128, 2048),
)
COLUMNS = ("queries", "keys", "head size", "width", "pass", "cycles of a head", "declared", "declared / scheduled",
           "bytes a cycle", "of HBM")  # fmt: skip
# Arrays of queries and of keys that a pass reads and writes.
ARRAYS = {"forward": (2, 2), "backward": (3, 4)}
# A line of a schedule: address, kind, a '>' for each loop around it, the bundle.
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:(\s*>*)\s*\{")


def main() -> None:
    """Writes the note, or in a process of its own prints the rows of one topology."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    parser.add_argument("--rows", metavar="TOPOLOGY", help="print the rows of this one as JSON lines")
    args = parser.parse_args()
    if args.rows:
        for case in CASES:
            print(json.dumps(measure(args.rows, *case)), flush=True)
    elif args.note:
        args.note.write_text(note({topology: rows_of(topology) for topology in TOPOLOGIES}))
    else:
        parser.error("give --note=FILE")


def rows_of(topology: str) -> list[dict]:
    """The results of `measure` for every case, from a process of its own, because libtpu reads its options once."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        topologies.prepare_environment([topology], environment)
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment["KERNEL_DUMPS"] = folder
        done = subprocess.run(
            [sys.executable, __file__, "--rows", topology], env=environment, stdout=subprocess.PIPE, text=True
        )
    if done.returncode:
        raise SystemExit(f"{topology}: exit status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(topology: str, queries: int, keys: int, size: int, width: int) -> dict:
    """The scheduled and the declared cycles of a head for both passes, or the kernel's obstacle."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from scaling_dit.nn import short_attention
    from scaling_dit.parallel import rules
    from scaling_dit.parallel.mesh import make_mesh

    mesh = make_mesh(devices=topologies.parse(topology).devices()[:1])
    heads = width // size
    row = {"case": [queries, keys, size, width]}

    def example(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    # Takes and gives heads joined, as the products before and after do, which saves copies.
    def attend(*wide: jax.Array) -> jax.Array:
        split = (x.reshape(*x.shape[:2], heads, size) for x in wide)
        return short_attention.attend(*split).reshape(wide[0].shape)

    def passes(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple:
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(d_out)

    q, k = example(BATCH, queries, width), example(BATCH, keys, width)
    with rules.activate(mesh):
        if reason := short_attention.obstacle(*(example(*x.shape[:2], heads, size) for x in (q, k))):
            return row | {"obstacle": reason}
        text = jax.jit(passes).lower(q, k, k, q).compile().as_text()
    steps = BATCH * width // short_attention.block_lanes(width, size, queries, keys)
    cores = 2 if topology.split(":")[0] in TWO_CORES else 1
    for name in ARRAYS:
        row[name] = {
            "scheduled": newest_bundles(f"{name}_kernel") * steps / cores / (BATCH * heads),
            "declared": declared_cycles(text, f"{name}_kernel") / (BATCH * heads),
        }
    return row


def newest_bundles(kernel: str) -> int:
    """Bundles inside the loop over the grid, of the kernel that was compiled last."""
    folder = pathlib.Path(os.environ["KERNEL_DUMPS"])
    found = [path for path in folder.glob(f"*{kernel}*final_bundles.txt") if "analysis" not in path.name]
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    loops = [match[1].count(">") for match in map(_BUNDLE.match, newest.read_text().splitlines()) if match]
    if max(loops) != 1:
        raise SystemExit(f"{kernel}: loops {max(loops)} deep, not the one over the grid")
    return sum(loops)


def declared_cycles(text: str, kernel: str) -> int:
    """The cycles that the call of a kernel in a compiled program declares."""
    for visit in Program(text).walk():
        if visit.instruction.opcode == "custom-call" and visit.instruction.name.startswith(kernel):
            return int(re.search(r'"estimated_cycles":"(\d+)"', visit.instruction.attributes)[1])
    raise SystemExit(f"{kernel}: the program does not call it")


def note(found: dict[str, list[dict]]) -> str:
    """All topologies as markdown."""
    lines = [
        *header("Cycles of the attention kernel for short sequences", "benchmarks/kernel_cycles.py"),
        "",
        "The compiler's schedule of the kernel in `scaling_dit/nn/short_attention.py`, by libtpu; no TPU was "
        "used. A cycle is an instruction bundle. Waiting for memory is not in it, nor are the copies between HBM and "
        "VMEM, which run beside. Cycles are of a head and a chip: v4 and v5p share the grid over two cores. Bytes are "
        "what the pass reads and writes of a head; above 100 % of the HBM's bandwidth, memory sets the time and not "
        "the schedule.",
        f"Batch {BATCH}, bfloat16, no mask. `declared` is the number that the kernel gives XLA for its estimates.",
    ]
    for topology, rows in found.items():
        name = topology.split(":")[0]
        chip = topologies.CHIPS[name]
        lines += [
            "",
            f"## {name}, {chip.clock / 1e9:.2f} GHz, {chip.hbm_bandwidth / chip.clock:.0f} bytes of HBM a cycle",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        obstacles = []
        for row in rows:
            if "obstacle" in row:
                obstacles += ["", f"{' x '.join(map(str, row['case']))}: {row['obstacle']}."]
                continue
            queries, keys, size, width = row["case"]
            for pass_, (of_queries, of_keys) in ARRAYS.items():
                scheduled, declared = row[pass_]["scheduled"], row[pass_]["declared"]
                rate = 2 * size * (of_queries * queries + of_keys * keys) / scheduled
                lines.append(
                    f"| {queries} | {keys} | {size} | {width} | {pass_} | {scheduled:.0f} | {declared:.0f} | "
                    f"{declared / scheduled:.2f} | {rate:.0f} | {rate * chip.clock / chip.hbm_bandwidth:.0%} |"
                )
        lines += obstacles
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

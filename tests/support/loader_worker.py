"""One process of a job that reads a global batch together; run as a script, see test_loader.py."""

import sys

import numpy as np

BATCH = 16


def read(positions):
    """Steps 2 to 4 of a loader over built-in shapes, rows at `positions`: arrays [3, len(positions), ...]."""
    from scaling_dit.data.loader import make_loader
    from scaling_dit.data.sources import create_source

    def tokenize(captions):
        ids = np.array([list(caption.ljust(100).encode()[:100]) for caption in captions], np.int32)
        return ids, ids != 32

    source = create_source("shapes", scenes=50)
    loader = make_loader(
        source, tokenize, batch=BATCH, seed=1, positions=positions, start_step=2, threads=2, prefetch=2
    )
    steps = [next(loader) for _ in range(3)]
    loader.close()
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


def main(process, processes, out, address):
    """Writes the rows of this process: those of its devices in a distributed job, else a scrambled share."""
    if address:
        import jax

        jax.distributed.initialize(address, processes, process, initialization_timeout=60)
        from scaling_dit.parallel import mesh, rules

        assert jax.process_count() == processes
        assert jax.local_device_count() == 2
        positions = rules.local_positions(mesh.make_mesh(data=2, fsdp=2), BATCH)
    else:
        positions = np.random.default_rng(0).permutation(BATCH)[process::processes]
    np.savez(out, positions=positions, **read(positions))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

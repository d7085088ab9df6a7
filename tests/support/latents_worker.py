"""One process of several that read a prepared set together; run as a script, see test_latents.py."""

import sys

import numpy as np

BATCH = 16


def read(folder, positions, start):
    """Five steps from `start`, rows at `positions`: arrays [5, len(positions), ...]; moments as their bits."""
    from scaling_dit.data.captions import CaptionPolicy
    from scaling_dit.data.loader import make_loader
    from scaling_dit.data.sources import create_source

    def tokenize(captions):
        ids = np.array([list(caption.ljust(40).encode()[:40]) for caption in captions], np.int32)
        return ids, ids != 32

    source = create_source(f"latents:{folder}", image_size=16)
    policy = CaptionPolicy(policy="mix", alt=0.5, synthetic=0.5)
    loader = make_loader(
        source,
        tokenize,
        batch=BATCH,
        seed=1,
        positions=positions,
        start_step=start,
        captions=policy,
        threads=2,
    )
    steps = [next(loader) for _ in range(5)]
    loader.close()
    arrays = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
    return arrays | {"latents": arrays["latents"].view(np.uint16)}


def main(folder, process, processes, out):
    """Writes the rows of this process: a scrambled share."""
    positions = np.random.default_rng(0).permutation(BATCH)[process::processes]
    np.savez(out, positions=positions, **read(folder, positions, start=0))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

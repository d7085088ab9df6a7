"""Validation loss on fixed triples of (image, timestep, noise), in eps space, so that any two runs can be compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scaling_dit.data.conditions.records import of_record
from scaling_dit.data.loader import KeyedGenerator, stack_images, stream_of
from scaling_dit.data.sources import Source, contract
from scaling_dit.diffusion import objectives, schedules
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules
from scaling_dit.trees import Params

# Of the noise: the same for every run, whatever its own seed.
_SEED = 20_000


class ValidationLoss:
    """Mean squared error of the implied noise on held-out images, over all timesteps and by timestep bin.

    The triples depend on the data and `images` alone: the first held-out records with their first captions, timesteps
    of scaled_linear spread evenly over [0, 1000), noise from a fixed seed. Runs with other predictions, weightings or
    backbones get the same ones. Runs with other schedules get them at those of their own timesteps that have the same
    ratio of noise to signal, so that the errors compare. A run with image conditions is given all of them.

    Args:
      images: how many triples, at least 1; at most as many records as are held out are used, repeated if fewer.
      bins: equal timestep bins for the split.
      batch: triples at a time; rounded up to what the mesh divides.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        mesh: jax.sharding.Mesh,
        *,
        images: int,
        bins: int,
        batch: int,
    ) -> None:
        self._model, self._mesh, self._bins = model, mesh, bins
        held_out = contract.held_out(source)
        records = [contract.read(held_out, i % len(held_out)) for i in range(images)]
        ids, mask = model.text_encoder.tokenize([record["captions"][0] for record in records])
        reference = schedules.make_schedule("scaled_linear")
        self._total = total = reference.num_timesteps
        # Evenly spread and then shuffled, so that a bin does not hold neighbouring records only.
        times = np.floor((np.arange(images) + 0.5) * total / images).astype(np.int32)
        times = np.random.default_rng(_SEED).permutation(times)
        alpha, sigma = reference.coefficients(times)
        self._rows: dict[str, Any] = {
            **stack_images(records),
            "ids": ids,
            "mask": mask,
            # For the bins.
            "reference_timesteps": times,
            "timesteps": model.schedule.timesteps_of(sigma / alpha).astype(np.float32),
            # Of the noise; 0 is the codec's.
            "number": np.arange(1, images + 1, dtype=np.int32),
        }
        if model.conditions:
            self._rows["conditions"] = held_out_conditions(model, records)
        self._batch = rules.round_batch(mesh, min(batch, images))
        self._run = jax.jit(self._errors)

    def __call__(self, params: Params, frozen: Params) -> dict[str, float]:
        """{"loss": mean, "loss_t0000-0199": mean of that bin, ...}; every process gets the same."""
        count = len(self._rows["number"])
        held = rules.local_positions(self._mesh, self._batch)
        sums, counts = np.zeros(self._bins), np.zeros(self._bins)
        for start in range(0, count, self._batch):
            # A short last batch is filled with row 0 and its weight set to 0: one shape, one compilation.
            index = np.arange(start, start + self._batch)
            weight = (index < count).astype(np.float32)
            index = np.where(index < count, index, 0)
            rows = jax.tree.map(lambda column, chosen=index[held]: column[chosen], self._rows)
            host = rows | {"weight": weight[held]}
            with rules.activate(self._mesh):
                added = self._run(params, frozen, rules.to_global(host, self._mesh, self._batch))
            sums += np.asarray(added[0])
            counts += np.asarray(added[1])
        edges = np.arange(self._bins + 1) * self._total // self._bins
        by_bin = {
            f"loss_t{edges[b]:04d}-{edges[b + 1] - 1:04d}": float(sums[b] / counts[b])
            for b in range(self._bins)
            if counts[b]
        }
        return {"loss": float(sums.sum() / counts.sum())} | by_bin

    def _errors(self, params: Params, frozen: Params, rows: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        model = self._model
        key = jax.random.key(_SEED)
        latents = model.batch_latents(frozen, rows, jax.random.fold_in(key, 0))
        noise = model.noise(key, rows["number"])
        noisy = objectives.add_noise(model.schedule, latents, noise, rows["timesteps"])
        text, text_mask, _ = model.encode_text(params, frozen, rows["ids"], rows["mask"])
        conditions = model.present_conditions(frozen, rows.get("conditions", {}))
        output = model.predict(params, noisy, rows["timesteps"], text, text_mask, conditions or None)
        errors = objectives.eps_mse(
            output, latents, noise, rows["timesteps"], model.schedule, prediction=model.prediction
        )
        bins = rows["reference_timesteps"] * self._bins // self._total
        one_hot = jax.nn.one_hot(bins, self._bins) * rows["weight"][:, None]
        return (one_hot * errors[:, None]).sum(0), one_hot.sum(0)


def held_out_conditions(model: Model, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The image conditions of some records, as batches hold them; record i has the same ones in every run.

    Each has a stream of its own, by its name: two masks of an image do not coincide.
    """
    keyed = KeyedGenerator(_SEED)
    return {
        one.name: np.stack(
            [
                of_record(one.condition, one.name, record, keyed.at(0, i, stream_of(one.name)))
                for i, record in enumerate(records)
            ]
        )
        for one in model.conditions
    }

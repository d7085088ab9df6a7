"""The evaluations of a run while it trains: validation loss, a captioned sample grid, and metrics on few prompts."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from scaling_dit.checkpoints.ema import find_ema
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.data.sources import Source, contract
from scaling_dit.errors import UserError
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import Scoring, score_together
from scaling_dit.evaluation.validation import ValidationLoss, held_out_conditions
from scaling_dit.model.adapters import BASE, Adapters
from scaling_dit.model.model import Model
from scaling_dit.monitor.grid import captioned_grid
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.trees import Params


class _Ended(Exception):
    """Evaluations end before they are complete."""


def _until(stop: Callable[[], bool], images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for batch in images:
        if stop():
            raise _Ended
        yield batch


class InTraining:
    """Evaluations of `config.eval`, on fixed prompts and noise, so that images of one run compare over time.

    Images and metrics use the weights that `config.sample.ema` names, the validation loss the raw ones.

    Raises:
      UserError: a metric that does not exist or does not fit the data.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        mesh: jax.sharding.Mesh,
        config: ConfigDict,
        adapters: Adapters | None = None,
    ) -> None:
        self._config, self._adapters = config, adapters
        if not config.eval.every:
            return
        self._loss = ValidationLoss(
            model,
            source,
            mesh,
            images=config.eval.loss_images,
            bins=config.eval.loss_bins,
            batch=config.batch,
        )
        self._sampler = Sampler(model, mesh, SamplingOptions.of(config.sample))
        if config.sample.strength < 1:
            raise UserError(
                f"config.sample.strength is {config.sample.strength}, but evaluation in training has no images to "
                "start from; leave it 1, and give --strength to `sample`"
            )
        held_out = contract.held_out(source)
        shown = [contract.read(held_out, i % len(held_out)) for i in range(config.eval.grid)]
        self._captions = [record["captions"][0] for record in shown]
        self._conditions = held_out_conditions(model, shown) or None
        # Metrics that score the same images (`Metric.tower`), the prompts to sample, and steps between evaluations.
        self._metrics: list[tuple[list[Scoring], list[str], int]] = []
        places: dict[Hashable, int] = {}
        for one in choose(config, config.eval.metrics):
            prompts = one.prompts(source, one.fields["prompts"] or config.eval.prompts)
            if ready := getattr(one.metric, "ready", None):
                ready()
            conditioned.check(prompts.items, config.conditioning.names, one.section)
            conditioned.check_options(prompts.items, self._sampler)
            scoring = Scoring(one.section, one.metric, prompts.items, one.fields["batch"])
            texts, every = prompts.texts, one.fields["every"] or config.eval.every
            tower = getattr(one.metric, "tower", None)
            key: Hashable = one.name
            if tower and not prompts.items[0].conditions:
                key = (tower(), scoring.batch, tuple(texts), every)
            if key not in places:
                places[key] = len(self._metrics)
                self._metrics.append(([], texts, every))
            self._metrics[places[key]][0].append(scoring)
        self._ema = find_ema(config, config.sample.ema)

    def due(self, step: int) -> bool:
        """Whether the config asks for an evaluation at this step: every so many, and at the end."""
        return bool(self._config.eval.every) and self._at(step, self._config.eval.every)

    def write(
        self,
        writer: Any,
        step: int,
        state: TrainState,
        frozen: Params,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Runs every evaluation that is due on `state` and hands the results to the run's writer.

        Args:
          stop: asked between batches; once it is true the evaluations end.

        Returns:
          False if `stop` ended them; then nothing is written.
        """
        losses = self._loss(self._whole(state.params, frozen), frozen)
        scalars = {f"validation/{name}": value for name, value in losses.items()}
        params = self._whole(state.params if self._ema is None else state.emas[self._ema], frozen)
        seed = self._config.seed
        for scorings, prompts, every in self._metrics:
            if not self._at(step, every):
                continue
            items = scorings[0].items
            images = conditioned.sampled(self._sampler, params, frozen, items, prompts, seed)
            try:
                results = score_together(scorings, _until(stop, images), seed)
            except _Ended:
                return False
            for scoring, result in zip(scorings, results, strict=True):
                if isinstance(result, Skipped):
                    # Such as a judge that is out of reach for now: no reason to stop training.
                    logging.warning("metric %s is skipped at step %d: %s", scoring.name, step, result)
                    continue
                found = result[0]["scalars"]
                twice = [name for name in found if f"evaluation/{name}" in scalars]
                if twice:
                    raise UserError(
                        f"metric {scoring.name!r}: another metric has a scalar {twice[0]!r} as well"
                    )
                scalars |= {f"evaluation/{name}": value for name, value in found.items()}
        if stop():
            return False
        grid = self._sampler(params, frozen, self._captions, seed=seed, conditions=self._conditions)
        writer.scalars(step, scalars)
        writer.images(step, {"samples": captioned_grid(grid, self._captions)})
        writer.flush()
        return True

    def _whole(self, params: Params, frozen: Params) -> Params:
        """All parameters of the model: of a run that trains adapters, its base with these added."""
        return params if self._adapters is None else self._adapters.merge(frozen[BASE], params)

    def _at(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._config.steps

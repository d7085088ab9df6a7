"""What a run looks at while it trains: validation loss, a sample grid with captions, and metrics on few prompts."""

from typing import Any

import jax
from ml_collections import ConfigDict

from scaling_dit.checkpoints.ema import find_ema
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.validation import ValidationLoss
from scaling_dit.model.model import Model
from scaling_dit.monitor.grid import captioned_grid
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.trees import Params


class InTraining:
    """Evaluations of `config.eval`, on fixed prompts and noise, so that pictures of one run compare over time.

    Pictures and metrics use the weights that `config.sample.ema` names, the validation loss the raw ones.
    """

    def __init__(self, model: Model, source: Source, mesh: jax.sharding.Mesh, config: ConfigDict) -> None:
        self._config = config
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
        held_out = source.held_out()
        self._captions = [held_out[i % len(held_out)]["captions"][0] for i in range(config.eval.grid)]
        for name in config.eval.metrics:
            if name not in METRICS:
                raise UserError(f"config.eval.metrics names {name!r}; {nearest(name, METRICS)}")
        self._items = {name: METRICS[name].items(source, config.eval.prompts) for name in config.eval.metrics}
        self._ema = find_ema(config, config.sample.ema)

    def due(self, step: int) -> bool:
        """Whether the config asks for an evaluation at this step: every so many, and at the end."""
        every = self._config.eval.every
        return bool(every) and (step % every == 0 or step == self._config.steps)

    def write(self, writer: Any, step: int, state: TrainState, frozen: Params) -> None:
        """Runs every evaluation on `state` and hands the results to the run's writer."""
        scalars = {f"validation/{name}": value for name, value in self._loss(state.params, frozen).items()}
        params = state.params if self._ema is None else state.emas[self._ema]
        for name, items in self._items.items():
            images = self._sampler(params, frozen, [item.prompt for item in items], seed=self._config.seed)
            result = METRICS[name].score(list(images), items, seed=self._config.seed)
            scalars |= {f"evaluation/{key}": value for key, value in result["scalars"].items()}
        grid = self._sampler(params, frozen, self._captions, seed=self._config.seed)
        writer.scalars(step, scalars)
        writer.images(step, {"samples": captioned_grid(grid, self._captions)})
        writer.flush()

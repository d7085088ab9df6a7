"""The verbs that say what a run costs: `count` and `plan`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb, config_flag, json_flag
from scaling_dit.errors import UserError
from scaling_dit.fields import COUNT, FROM_0, Rule


def _whole(names: str) -> Rule:
    """The rule of a shape: one whole number above 0 for each of the comma-separated names."""
    count = names.count(",") + 1
    return Rule(f"{names} in whole numbers above 0", lambda xs: len(xs) == count and min(xs) > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count(Verb):
    """Counts parameters, multiply-accumulates, training FLOPs and activation memory."""

    EXAMPLE = "scaling-dit count --backbone=uvit --config.backbone.size=h2048-d42-n16 --latents=32,32,4 --text=77,1024"
    OVERRIDES = True

    config: str | None = config_flag()
    backbone: str | None = flag("count this backbone alone: a name, or package.module:Class")
    latents: tuple[int, ...] | None = flag(
        "height,width,channels of a latent; 32,32,4 for --backbone", None, _whole("height,width,channels")
    )
    text: tuple[int, ...] | None = flag(
        "length,width of the text; 77,1024 for --backbone", None, _whole("length,width")
    )
    depth: int = flag("levels of modules listed in the breakdown", 1, COUNT)
    json: bool = json_flag()

    def run(self) -> int:
        """Prints the table."""
        if (self.config is None) == (self.backbone is None):
            raise UserError("count needs either --config or --backbone; for example --backbone=uvit")

        from scaling_dit import config as config_lib
        from scaling_dit.costs import count_table

        if self.config is not None:
            config = config_lib.load(self.config, self.overrides)
            counted = count_table.of_experiment(config, self.latents, self.text)
        else:
            config = _backbone_config(str(self.backbone), self.overrides)
            counted = count_table.of_backbone(config.backbone, self.latents, self.text)
        return count_table.main(counted, depth=self.depth, as_json=self.json)


def _backbone_config(name: str, overrides: Sequence[str]) -> Any:
    """The defaults with another backbone and overrides of its fields, resolved."""
    from scaling_dit import config as config_lib
    from scaling_dit.config import override_key, schema

    for override in overrides:
        if schema.derived(override_key(override)):
            raise UserError(f"{override}: with --backbone it follows from --latents and --text; set those")
        if not override.lstrip("-").startswith(("config.backbone.", "noconfig.backbone.")):
            raise UserError(f"{override}: with --backbone only --config.backbone.KEY=VALUE can be set")
    config = config_lib.defaults()
    config.backbone.name = name
    return config_lib.resolve(config, overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Verb):
    """Compiles a run for TPUs that are not attached: memory, FLOPs, speed, cost."""

    EXAMPLE = "scaling-dit plan --config=dit_scaling:uvit-h2048-d42-n16 --topology=v5p:4x4x4"
    OVERRIDES = True

    config: str = config_flag(required=True)
    topology: tuple[str, ...] = flag(
        "slice such as v5p:4x4x4 or v5e:16x16, or local; repeat it", (), required=True, repeat=True
    )
    slices: int = flag("equal slices joined by the data-centre network", 1, COUNT)
    step: Literal["train", "sample"] = flag("the program to plan", "train")
    search: bool = flag("try meshes, gather_once, microbatches and remat policies, and rank them", False)
    search_limit: int = flag("programs that a search compiles at most", 12, COUNT)
    quick: bool = flag(
        "compile no kernels: all but cycles and the estimate, in a fraction of the time; not for local",
        False,
    )
    price: float | None = flag(
        "US dollars for a chip-hour; by default a rough list price of 2025",
        None,
        FROM_0,
    )
    json: bool = json_flag()

    def run(self) -> int:
        """Prints a plan for each topology; 0 if something fits, 1 if nothing does."""
        from scaling_dit.parallel import topologies

        # Before jax is imported.
        topologies.prepare_environment(self.topology)

        from scaling_dit import config as config_lib
        from scaling_dit.planning import report

        slices = [f"--config.mesh.slices={self.slices}"] if self.slices > 1 else []
        return report.main(
            config_lib.load(self.config, [*self.overrides, *slices]),
            self.topology,
            slices=self.slices,
            step=self.step,
            search=self.search,
            search_limit=self.search_limit,
            quick=self.quick,
            price=self.price,
            as_json=self.json,
        )

"""The verbs that bring weights in and take them out: `import` and `export`."""

import dataclasses
from typing import Literal

from scaling_dit.cli.options import flag
from scaling_dit.cli.verb import Verb, config_flag, own_code_flag
from scaling_dit.errors import UserError
from scaling_dit.fields import FROM_0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import(Verb):
    """Starts a run from published weights, or converts pickled ones to safetensors."""

    EXAMPLE = "scaling-dit import --from=model.safetensors --config=shapes --workdir=runs/imported"
    OVERRIDES = True

    from_: str = flag(
        "safetensors file, index of shards, or folder of a model or pipeline of diffusers; or a file of adapters",
        required=True,
        path=True,
    )
    base: str | None = flag("for adapters: workdir of the run whose parameters they are added to", path=True)
    workdir: str | None = flag("folder of the new run, local or gs://", path=True)
    to: Literal["safetensors"] | None = flag(
        "convert a pickle that you trust (.bin, .pt, .ckpt) in place of starting a run; needs --out"
    )
    out: str | None = flag(
        "file that --to=safetensors writes; a folder for the shards of a .bin.index.json", path=True
    )
    config: str | None = config_flag()

    def run(self) -> int:
        """Converts a file, or writes a run at step 0."""
        if self.to:
            return self._convert()
        if self.out:
            raise UserError("import --out belongs to --to=safetensors; a run is written to --workdir")
        self.check_given({"workdir": self.workdir, "config": self.config})
        assert self.workdir and self.config

        from scaling_dit.scaling.folder import StudyFolder

        StudyFolder(self.workdir).check_is_no_study()

        from scaling_dit.interop import importing

        return importing.main(self.from_, self.workdir, self.config, self.overrides, self.base)

    def _convert(self) -> int:
        self.check_given({"out": self.out})
        if self.workdir or self.config or self.base or self.overrides:
            raise UserError(
                "import --to=safetensors converts a file and starts no run; leave --workdir, --base and --config out"
            )
        assert self.out

        from scaling_dit.weights import pickles

        return pickles.main(self.from_, self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Writes a run's weights for other code to read."""

    EXAMPLE = "scaling-dit export --workdir=runs/shapes --out=shapes-weights --to=safetensors"

    workdir: str = flag("folder of the trained run", required=True, path=True)
    out: str = flag("folder to write; it must not exist or be empty", required=True, path=True)
    to: Literal["diffusers", "diffusers-pipeline", "safetensors"] = flag(
        "the backbone for diffusers, the whole run for diffusers, or weights alone in the names of the published code",
        required=True,
    )
    step: int | None = flag("checkpoint to write; the latest by default", None, FROM_0)
    ema: str | None = flag("EMA decay to write, or none for the raw weights; config.sample.ema by default")
    adapter: bool = flag(
        "write the adapters alone, for load_lora_weights of diffusers; by default they are added to their base",
        False,
    )
    own_code: bool = own_code_flag()

    def run(self) -> int:
        """Writes the folder."""
        if self.adapter and self.to != "diffusers":
            raise UserError(
                f"export --adapter writes the format of diffusers; give --to=diffusers, not {self.to}"
            )

        from scaling_dit.interop import exporting

        return exporting.main(
            self.workdir,
            self.out,
            to=self.to,
            step=self.step,
            ema=self.ema,
            own_code=self.own_code,
            adapter=self.adapter,
        )

"""Golden files: the resolved config and the parameters of every experiment, the public API and the command line.

`make golden` rewrites them; test_golden.py compares them with the current code. A changed default, parameter shape or
flag appears as a diff that a reader can judge.
"""

import contextlib
import importlib.util
import inspect
import math
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterator

from scaling_dit.model.build import abstract_params

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Rows of a ladder differ only in the backbone's size, and docs/models.md has all of them. One of each kind is enough.
ROWS = {
    "editing": ("", "smoke", "inpaint-channel", "outpaint-token", "edges-channel", "edit-token"),
    "unet_scaling": ("", "sd2", "if-xl-c512", "sdxl-td4_4,pretrained"),
    "dit_scaling": ("", "pixart-h1536-d28", "large_dit-h2048-d28-n16", "next_dit-h2304-d24-n32"),
}


def current(
    experiments: pathlib.Path = ROOT / "experiments", untraced: Container[str] = ()
) -> dict[str, str]:
    """Path below `tests/golden` -> current text, for every golden file.

    Args:
      experiments: their folder.
      untraced: names of those whose parameters are left out.
    """
    from scaling_dit import config as config_lib

    texts = {"public.txt": public()}
    with _working_directory():
        for path in sorted(experiments.glob("[!_]*.py")):
            for argument in _arguments(path):
                name = f"{path.stem}-{argument}" if argument else path.stem
                config = config_lib.load(f"{path}:{argument}" if argument else str(path))
                texts[f"configs/{name}.txt"] = config_lib.dump(config)
                if name not in untraced:
                    texts[f"params/{name}.txt"] = params_text(abstract_params(config))
    return texts


def public() -> str:
    """The public names with their signatures, and the verbs with their flags."""
    import scaling_dit
    from scaling_dit.cli import main as cli
    from scaling_dit.cli.options import declared

    lines = ["public API"]
    for name in scaling_dit.__all__:
        value = getattr(scaling_dit, name)
        lines.append(f"  {name}{_parameters(value)}" if callable(value) else f"  {name}")
    below = {
        f"{verb} {name}": spec for verb, above in cli.VERBS.items() for name, spec in above.verbs().items()
    }
    for verb, spec in {**cli.VERBS, **below}.items():
        names = [
            f"--{flag.name}={list(flag.default) if flag.default == () else flag.default}"
            for flag in declared(spec)
        ]
        names += ["--config.KEY=VALUE"] if spec.OVERRIDES else []
        lines += [
            "",
            " ".join(filter(None, ("scaling-dit", verb, spec.ARGUMENTS))),
            *(f"  {name}" for name in names),
        ]
    return "\n".join(lines) + "\n"


def _parameters(function: Callable[..., object]) -> str:
    """`(config, workdir, *, seed=0)`: names and defaults, without annotations, whose text varies between versions."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


def params_text(tree: object) -> str:
    """One line per parameter with path, dtype and shape; the number of parameters at the end."""
    import jax

    rows, total = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        rows.append(f"{name} {leaf.dtype} {list(leaf.shape)}\n")
        total += math.prod(leaf.shape)
    return "".join(sorted(rows)) + f"total {total:,}\n"


def _arguments(path: pathlib.Path) -> tuple[str, ...]:
    """The arguments of an experiment file to dump; none for a file that experiments import."""
    from scaling_dit import config as config_lib

    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = config_lib.experiment_arguments(module) if hasattr(module, "get_config") else ()
    return ROWS.get(path.stem, arguments)


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """A new working directory with the data that experiments read from it."""
    from etils import epath

    from scaling_dit.data import digits, emoji

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        digits.write("data/digits")
        # Its captions alone, for drawing thousands of images takes a minute and configs read none.
        drawn = epath.Path("data/emoji")
        drawn.mkdir()
        emoji.write_lists(drawn, emoji.installed()[0])
        yield


def main() -> None:
    """Rewrites the golden files."""
    texts = current()
    shutil.rmtree(GOLDEN / "configs", ignore_errors=True)
    shutil.rmtree(GOLDEN / "params", ignore_errors=True)
    for name, text in texts.items():
        (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / name).write_text(text)
    print(f"{len(texts)} files in {GOLDEN}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

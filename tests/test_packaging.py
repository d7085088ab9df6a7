"""What an install promises: a light import, a public API that loads on demand, and consistent package files."""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

import scaling_dit
from scaling_dit.cli import main as cli
from tests.support import references
from tests.support.paths import ROOT


def python(code, cwd=ROOT):
    """Runs code in a fresh interpreter in a folder and returns what it prints."""
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(cwd)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, check=True
    ).stdout.strip()


def test_import_loads_nothing_heavy():
    loaded = python("import sys, scaling_dit; print([m for m in sys.modules if '.' not in m])")
    for heavy in ("tensorflow", "torch", "clu", "jax", "flax", "numpy"):
        assert f"'{heavy}'" not in loaded


def test_the_public_api_loads_neither_tensorflow_nor_torch():
    use = "import sys, scaling_dit as s; [getattr(s, name) for name in s.__all__]"
    assert python(f"{use}; print('tensorflow' in sys.modules, 'torch' in sys.modules)") == "False False"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with this package's `__init__.py` over modules that load at once."""
    package = tmp_path_factory.mktemp("stand_in") / "scaling_dit"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "scaling_dit" / "__init__.py").read_text())
    (package / "_version.py").write_text('__version__ = "0"\n')
    for folder, file, names in (("training", "loop", "train"), ("sampling", "pipeline", "load")):
        (package / folder).mkdir()
        (package / folder / "__init__.py").touch()
        (package / folder / f"{file}.py").write_text(
            f"def {names}(*args, **kwargs):\n    return args, kwargs\n"
        )
    return package.parent


@pytest.mark.parametrize(
    "first",
    [
        "import scaling_dit",
        "import scaling_dit.training.loop",
        "import scaling_dit; scaling_dit.train; import scaling_dit.training.loop",
        "from scaling_dit.training.loop import train",
        "from scaling_dit import train; import scaling_dit.sampling.pipeline",
        "from scaling_dit import load",
    ],
)
def test_train_is_called_whatever_was_imported_first(first, stand_in):
    check = """
import types
import scaling_dit
assert scaling_dit.train("config", workdir="dir") == (("config",), {"workdir": "dir"})
from scaling_dit import train
assert isinstance(train, types.FunctionType) and train is scaling_dit.train
print("right")
"""
    assert python(f"{first}\n{check}", cwd=stand_in) == "right"


def test_the_real_train_is_the_function():
    assert scaling_dit.train is importlib.import_module("scaling_dit.training.loop").train


def test_public_names():
    assert sorted(scaling_dit.__all__) == [
        "__version__",
        "count",
        "create",
        "interop",
        "load",
        "study",
        "train",
    ]
    assert set(scaling_dit.__all__) == {"__version__", *scaling_dit._LAZY}
    assert dir(scaling_dit) == sorted(scaling_dit.__all__)
    for name in scaling_dit.__all__:
        assert getattr(scaling_dit, name) is not None


def test_the_public_count_and_create_are_the_functions():
    assert scaling_dit.count is importlib.import_module("scaling_dit.costs.count").count
    assert scaling_dit.create is importlib.import_module("scaling_dit.backbones").create
    assert scaling_dit.load is importlib.import_module("scaling_dit.sampling.pipeline").load
    assert isinstance(scaling_dit.interop, types.ModuleType)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        scaling_dit.tarin  # noqa: B018


def test_verbs_are_described_in_one_line():
    for verb in cli.VERBS.values():
        assert verb.summary().endswith(".")
        assert len(verb.summary()) < 80


# setup.py and its companions


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py hands to setuptools."""
    import setuptools

    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", caught.update)
        patch.chdir(ROOT)
        code = compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec")
        exec(code, {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    return caught


def test_every_package_is_installed(setup_arguments):
    folders = {path.parent for path in (ROOT / "scaling_dit").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    at_the_root = {"scaling_dit.experiments", "scaling_dit.tpu"}
    packages |= at_the_root | {
        f"scaling_dit.{top}.{path.parent.name}"
        for top in ("experiments", "tpu")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    assert set(setup_arguments["packages"]) == packages
    for name in at_the_root:
        assert setup_arguments["package_dir"][name] == name.rpartition(".")[2]
    assert setup_arguments["version"] == scaling_dit.__version__


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normal(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()


def test_every_requirement_is_pinned(setup_arguments):
    wanted = {*setup_arguments["install_requires"], *setup_arguments["extras_require"]["all"]}
    assert {normal(requirement) for requirement in wanted} <= {normal(line) for line in pinned()}


def test_pins_are_exact_and_unique_for_each_python():
    for line in pinned():
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.12")?', line), line
    names = [normal(line) + line.partition(";")[2] for line in pinned()]
    assert len(set(names)) == len(names)
    for line in pinned():
        if ";" in line:
            assert sum(normal(other) == normal(line) for other in pinned()) == 2


def test_core_needs_neither_tensorflow_nor_torch(setup_arguments):
    core = {normal(requirement) for requirement in setup_arguments["install_requires"]}
    assert not core & {"tensorflow", "tensorflow-cpu", "torch", "clu", "tensorboard"}


def statements(tree):
    """All statements of a file, without what lies in their expressions, where most of the nodes are."""
    left = [tree]
    while left:
        node = left.pop()
        for name in ("body", "orelse", "handlers", "finalbody", "cases"):
            found = getattr(node, name, ())
            # Of a lambda or a choice it is an expression.
            left += found if isinstance(found, list) else ()
        yield node


def test_core_requires_what_is_imported_and_nothing_else(setup_arguments):
    distributions = {
        "PIL": "pillow",
        "absl": "absl-py",
        "orbax": "orbax-checkpoint",
        "sklearn": "scikit-learn",
        "google": "google-auth",
        "skimage": "scikit-image",
        "vl_convert": "vl-convert-python",
    }
    imported = set()
    for path in [
        path for folder in ("scaling_dit", "experiments", "tpu") for path in (ROOT / folder).rglob("*.py")
    ]:
        for node in statements(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    third_party = imported - sys.stdlib_module_names - {"scaling_dit"}
    needed = {normal(distributions.get(name, name)) for name in third_party}
    extras = {
        k: v for k, v in setup_arguments["extras_require"].items() if k not in ("all", "docs", "lint", "test")
    }
    optional = {normal(requirement) for extra in extras.values() for requirement in extra}
    # Used where a user installed it with a model of it.
    optional |= {"spacy"}
    core = {normal(requirement) for requirement in setup_arguments["install_requires"]}
    # An extra may add to a package that core requires.
    assert core == needed - (optional - core)


def missing_or_unfit(requirements):
    """What `pip check` would say of distributions and all that they ask for."""
    left, seen, faults = [(Requirement(text), "scaling-dit") for text in requirements], set(), []
    while left:
        wanted, asking = left.pop()
        try:
            found = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{asking} requires {wanted}, which is not installed")
            continue
        if not wanted.specifier.contains(found.version, prereleases=True):
            faults.append(f"{asking} requires {wanted}, but {found.version} is installed")
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) in seen:
                continue
            seen.add((wanted.name, extra))
            asked = map(Requirement, found.requires or ())
            left += [
                (one, wanted.name)
                for one in asked
                if one.marker is None or one.marker.evaluate({"extra": extra})
            ]
    return faults


def test_core_eval_and_test_ask_for_nothing_that_is_missing_or_unfit(setup_arguments):
    extras = setup_arguments["extras_require"]
    wanted = [
        text
        for text in (*setup_arguments["install_requires"], *extras["eval"], *extras["test"])
        if Requirement(text).marker is None or Requirement(text).marker.evaluate()
    ]
    assert missing_or_unfit(wanted) == []
    # It sees what is wrong.
    (fault,) = missing_or_unfit(["numpy<1"])
    assert fault.startswith("scaling-dit requires numpy<1, but ")
    assert missing_or_unfit(["no-such-thing"]) == [
        "scaling-dit requires no-such-thing, which is not installed"
    ]


def test_nothing_is_installed_without_what_it_asks_for():
    """The references of tests lie where `pip check` and programs do not look, and no extra names them."""
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^REFERENCES_test := (.+)$", makefile, re.MULTILINE)
    for line in makefile.splitlines():
        assert "--no-deps" not in line or "--target=.venv/references $(REFERENCES_$*)" in line
    setup = (ROOT / "setup.py").read_text()
    for name in names.split():
        assert normal(name) in {normal(line) for line in pinned()} and name not in setup
    assert pathlib.Path(sys.prefix, "references") == references.FOLDER


def test_torch_is_always_the_exact_version(setup_arguments):
    lists = [setup_arguments["install_requires"], *setup_arguments["extras_require"].values()]
    torch = {
        requirement
        for requirements in lists
        for requirement in requirements
        if normal(requirement) == "torch"
    }
    assert torch == {"torch==2.13.0"}


def test_make_targets_are_all_explained():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    for target in set(phony.split()) - {"help"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert f"@echo 'make {target} " in makefile, target


def test_the_ci_script_is_executable_and_valid():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)

"""Components by name: which class a name stands for, what can be set of it, and every mistake in one line."""

import dataclasses
import sys

import pytest

from scaling_dit.components import REQUIRED, Registry, tuples
from scaling_dit.errors import UserError

SOURCE = """
import dataclasses


@dataclasses.dataclass(frozen=True)
class Data:
    tool: object
    width: int = 8
    rates: tuple = dataclasses.field(default_factory=lambda: (0.5,))
    act: object = print
    split: str = dataclasses.field(default="train", metadata={"config": False})
    half: int = dataclasses.field(default=0, init=False)


class Bare:
    pass


class Plain:
    def __init__(self, depth, size="small", *more, **others):
        self.depth, self.size = depth, size
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Components of a user's own files, and a built-in name that stands for one of them."""
    (tmp_path / "own_parts.py").write_text(SOURCE)
    (tmp_path / "own_broken.py").write_text("\nimport no_such_package_anywhere\n")
    (tmp_path / "own_raises.py").write_text("def f():\n    return 1 / 0\n\n\nf()\n")
    (tmp_path / "own_typo.py").write_text("x = (\n")
    (tmp_path / "own_empty.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("part", {"data": "own_parts:Data", "broken": "own_broken:Data"}, filled=("tool",))
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_module_is_imported_when_its_component_is_asked_for(registry):
    assert "own_parts" not in sys.modules
    assert registry.resolve("data") is registry.resolve("own_parts:Data")
    assert "own_parts" in sys.modules


def test_arguments_and_what_a_config_sets_of_them(registry):
    arguments = registry.arguments("data")
    assert arguments == {"width": 8, "rates": (0.5,), "act": print}  # not what the program fills or hides
    assert registry.fields("data") == {"width": 8, "rates": (0.5,)}
    assert registry.arguments("own_parts:Plain") == {"depth": REQUIRED, "size": "small"}
    with pytest.raises(UserError, match="part 'own_parts:Plain': field 'depth' needs a default"):
        registry.fields("own_parts:Plain")


def test_create_gives_what_is_filled_and_no_lists(registry):
    made = registry.create("data", {"rates": [1, [2, 3]]}, tool="hammer")
    assert dataclasses.asdict(made) == {
        "tool": "hammer", "width": 8, "rates": (1, (2, 3)), "act": print, "split": "train", "half": 0
    }  # fmt: skip
    assert registry.create("own_parts:Plain", {"depth": 3}).depth == 3


def test_a_class_can_be_checked():
    def check(candidate, name):
        if candidate is not int:
            raise UserError(f"{name} is no int")

    checked = Registry("number", {"int": int, "float": float}, check=check)
    assert checked.resolve("int") is int
    with pytest.raises(UserError, match="'float' is no int"):
        checked.resolve("float")


@pytest.mark.parametrize(
    "name, given, message",
    [
        (
            "dat",
            {},
            r"unknown part 'dat'; did you mean 'data'\? \(or a class of your own: package.module:Class\)",
        ),
        ("dta:/a/path", {}, "unknown part 'dta:/a/path'; did you mean 'data'"),
        ("nowhere:Data", {}, "no module 'nowhere' on the Python path; known: broken, data"),
        ("own_parts.deeper:Data", {}, "no module 'own_parts.deeper' on the Python path"),
        ("own_parts:Dta", {}, "own_parts has no class 'Dta'; did you mean 'Data'"),
        ("own_empty:Data", {}, "own_empty has no class 'Data'; it defines none"),
        (
            "own_broken:Data",
            {},
            r"failed at .*own_broken.py, line 2: ModuleNotFoundError: .*no_such_package_any",
        ),
        ("own_raises:Data", {}, r"importing own_raises failed at .*own_raises.py, line 2: ZeroDivisionError"),
        ("own_typo:Data", {}, r"failed at .*own_typo.py, line 1: SyntaxError"),
        ("data", {"widht": 3}, "part 'data' has no field 'widht'; did you mean 'width'"),
        ("data", {"tool": 3}, "part 'data' has no field 'tool'"),
        ("data", {"split": "test"}, "part 'data' has no field 'split'"),
        ("own_parts:Bare", {"size": 1}, "part 'own_parts:Bare' has no field 'size'; it has none"),
        ("own_parts:Plain", {"size": "large"}, "part 'own_parts:Plain' needs a value for depth"),
    ],
)
def test_mistakes_are_told_in_one_line(registry, name, given, message):
    with pytest.raises(UserError, match=message) as error:
        registry.create(name, given)
    assert "\n" not in str(error.value)


def test_a_fault_of_a_built_in_keeps_its_traceback(registry):
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        registry.resolve("broken")


def test_tuples():
    assert tuples({"a": [1, [2, {"b": [3]}]], "c": "text"}) == {"a": (1, (2, {"b": (3,)})), "c": "text"}

"""Components by name: which class a name stands for, what can be set of it, and every mistake in one line."""

import dataclasses
import sys

import pytest

from scaling_dit.components import REQUIRED, Registry, Seam, check_methods, one_line, tuples
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


class Strict:
    def __init__(self, width=1):
        if width < 0:
            raise ValueError("width\\nis below 0")
        self.width = width


def made(total_steps, width=2):
    return total_steps, width


NUMBER = 3
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
    # Not what the program fills or hides.
    assert arguments == {"width": 8, "rates": (0.5,), "act": print}
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
            r"unknown part 'dat'; did you mean 'data'\? \(or one of your own: package.module:Name\)",
        ),
        ("dta:/a/path", {}, "unknown part 'dta:/a/path'; did you mean 'data'"),
        (
            "nowhere:Data",
            {},
            "no module 'nowhere' in .* or elsewhere on the Python path; .*; known: broken, data",
        ),
        ("own_parts.deeper:Data", {}, "no module 'own_parts.deeper' in "),
        ("own_parts:Dta", {}, "own_parts has no class or function 'Dta'; did you mean 'Data'"),
        ("own_empty:Data", {}, "own_empty has no class or function 'Data'; it defines none"),
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


def test_arguments_that_the_program_fills_are_given_where_there_are_any(registry):
    assert registry.create("own_parts:Strict", {"width": 3}, tool="hammer").width == 3
    with pytest.raises(UserError, match="'own_parts:Strict' has no field 'tool'; known: width"):
        registry.create("own_parts:Strict", {"tool": "saw"}, tool="hammer")


def test_what_a_constructor_raises_is_one_line_with_its_place(registry):
    with pytest.raises(
        UserError, match=r"part 'own_parts:Strict': it raised ValueError: width \(.*own_parts.py, line"
    ):
        registry.create("own_parts:Strict", {"width": -1})


def test_a_seam_has_built_in_parts_without_fields_and_those_of_a_user(registry):
    seam = Seam("optim.name", ("adamw",), filled=("total_steps",))
    assert (seam.is_own("adamw"), seam.is_own("own_parts:made")) == (False, True)
    assert (seam.fields("adamw"), seam.fields("own_parts:made")) == ({}, {"width": 2})
    checked = []

    def create(name, fields):
        return seam.create(name, fields, lambda: "Adam", lambda *found: checked.append(found), total_steps=7)

    assert create("adamw", {}) == "Adam" and not checked
    assert create("own_parts:made", {"width": 5}) == (7, 5)
    assert checked == [((7, 5), "config.optim.name 'own_parts:made'")]
    assert create("own_parts:Strict", {}).width == 1
    for name, message in (
        ("adam", "unknown config.optim.name 'adam'; did you mean 'adamw'"),
        (
            "own_parts:NUMBER",
            "config.optim.name 'own_parts:NUMBER': own_parts has no class or function 'NUMBER'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            create(name, {})


def test_methods_are_checked_by_name_and_arguments():
    class Part:
        def __call__(self, images):
            return images

        def late(self, first, second=None, *, third=3):
            return first

    check_methods(Part(), "it", {"__call__": "images", "late": "first, second"})
    for methods, message in (
        (
            {"__call__": "images, seeds"},
            r"it: __call__ has the call \(images\); it must take \(images, seeds\): too",
        ),
        ({"late": "first, second, third"}, "it: late has the call"),
        ({"early": "first"}, r"it: it has no method early\(first\); it is a Part"),
    ):
        with pytest.raises(UserError, match=message):
            check_methods(Part(), "it", methods)
    with pytest.raises(UserError, match=r"it has no method late\(first\); it is the class Part"):
        check_methods(Part, "it", {"late": "first"})


def test_one_line_leaves_user_errors_as_they_are():
    with pytest.raises(UserError, match="^as it is$"), one_line("it"):
        raise UserError("as it is")
    with (
        pytest.raises(UserError, match=r"^it raised KeyError: 'a' \(.*test_components.py, line \d+\)$"),
        one_line("it"),
    ):
        {}["a"]

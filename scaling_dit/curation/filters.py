"""Filters examples by an expression over their columns, such as `aesthetic >= 5 and min(width, height) >= 256`.

The expression has Python's syntax but only these operations, so text from a config or a command line can do nothing
but decide:

    columns       by name; column("odd-name") for a name that is no identifier
    values        numbers, texts, True, False, and lists of them: ["en", "de"]
    comparisons   < <= > >= == != in, not in, also chained: 0.5 < height / width < 2
    logic         and, or, not; the right side is evaluated only if the left side does not decide
    arithmetic    + - * / // % on numbers
    functions     len(x), abs(x), min(x, y, ...), max(x, y, ...), lower(text), number(text), has(column)

Missing columns: if the expression needs a value that an example lacks (no such column, null or NaN), the example is
dropped and counted as `missing:COLUMN`. `has` is False for such a value, so `not has(punsafe) or punsafe < 0.5` keeps
examples that were never scored. Values are never converted: an example whose text is compared with a number, say, is
dropped and counted as `type:` with that part of the expression.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from scaling_dit.errors import UserError, nearest

Row = Mapping[str, Any]
# A compiled part of the expression.
_Value = Callable[[Row], Any]

# The most characters of an expression, so that neither parsing nor a row can take long.
MAX_LENGTH = 4000
# The deepest nesting of its parts: each is a call within a call, for every row.
MAX_DEPTH = 100
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[type | tuple[type, ...], int, int | None, Callable[..., Any]]] = {
    # name: (type of an argument, fewest and most arguments, function)
    "len": ((str, list, tuple), 1, 1, len),
    "abs": ((int, float), 1, 1, abs),
    "min": ((int, float), 2, None, min),
    "max": ((int, float), 2, None, max),
    "lower": (str, 1, 1, str.lower),
    "number": ((int, float, str), 1, 1, float),
}
_COLUMN_FUNCTIONS = ("has", "column")


class _NotDecided(Exception):
    """The expression has no value for a row. Rows are counted by `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Filter:
    """A compiled expression. Called with a row it gives whether the example is kept.

    Attributes:
      columns: the column names that the expression reads.
    """

    def __init__(self, expression: str, columns: frozenset[str], value: _Value) -> None:
        self.columns = columns
        self._expression, self._value = expression, value

    def __call__(self, row: Row) -> bool:
        """Whether the example with these columns is kept."""
        return self.why_not(row) is None

    def why_not(self, row: Row) -> str | None:
        """None if the example is kept, else the reason why it is dropped.

        Args:
          row: column -> value: a number, a text, a bool, a list of these, or None.

        Returns:
          "filter" if the expression is False; "missing:COLUMN" or "type:PART" if it has no value.
        """
        try:
            return None if self._value(row) else "filter"
        except _NotDecided as undecided:
            return undecided.reason

    def __str__(self) -> str:
        return self._expression

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the expression's text: Beam sends filters to workers, and the compiled parts cannot be pickled."""
        return parse, (self._expression,)


def parse(expression: str, columns: Collection[str] | None = None) -> Filter:
    """Compiles an expression, see the module.

    Args:
      expression: what an example must satisfy to be kept.
      columns: the names that exist, if they are known; with None a row may lack any column.

    Raises:
      UserError: the expression is not valid, has an operation not listed above, or names an unknown column.
    """
    if len(expression) > MAX_LENGTH:
        raise UserError(f"the filter has {len(expression)} characters; at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        where = f"at character {error.offset}" if error.offset else "somewhere"
        raise UserError(f"filter {expression!r} is no expression: {error.msg} {where}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise UserError(f"filter of {len(expression)} characters cannot be read: {error}") from None
    if _depth(tree) > MAX_DEPTH:
        raise UserError(
            f"filter of {len(expression)} characters is nested more than {MAX_DEPTH} deep; simplify it"
        )
    compiler = _Compiler(expression, columns)
    value = compiler.truth(tree.body)
    return Filter(expression, frozenset(compiler.columns), value)


def _depth(tree: ast.AST) -> int:
    """How deep a syntax tree is; the chain of its own nodes, without recursion."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


class _Compiler:
    """Compiles the syntax tree of one expression to nested functions of a row."""

    def __init__(self, expression: str, known: Collection[str] | None) -> None:
        self.columns: set[str] = set()
        self._expression, self._known = expression, known

    def truth(self, node: ast.expr) -> _Value:
        """Compiles a part that must be true or false."""
        if not _may_be_truth(node):
            raise self._fault(node, "is a value, not a condition; compare it with something")
        value, part = self.value(node), ast.unparse(node)

        def checked(row: Row) -> bool:
            found = value(row)
            if not isinstance(found, bool):
                raise _NotDecided(f"type:{part}")
            return found

        return checked

    def value(self, node: ast.expr) -> _Value:
        """Compiles any part."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                return lambda row: constant
            case ast.Name(id=name):
                return self._column(node, name)
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                values = [self.value(item) for item in items]
                return lambda row: [value(row) for value in values]
            case ast.BoolOp(op=op, values=parts):
                truths = [self.truth(part) for part in parts]
                every = all if isinstance(op, ast.And) else any
                return lambda row: every(truth(row) for truth in truths)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self.truth(operand)
                return lambda row: not truth(row)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                sign = -1 if isinstance(op, ast.USub) else 1
                return self._arithmetic(node, operator.mul, lambda row: sign, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(node, _ARITHMETIC[type(op)], self.value(left), self.value(right))
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                return self._comparison(node)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(node, name, arguments)
        hint = "; has(column) asks for a value" if isinstance(node, ast.Constant | ast.Compare) else ""
        raise self._fault(node, f"has no place in a filter{hint}")

    def _column(self, node: ast.expr, name: str) -> _Value:
        if self._known is not None and name not in self._known:
            raise self._fault(node, f"is no column; {nearest(name, self._known)}")
        self.columns.add(name)

        def read(row: Row) -> Any:
            found = row.get(name)
            if _missing(found):
                raise _NotDecided(f"missing:{name}")
            return found

        return read

    def _call(self, node: ast.Call, name: str, arguments: list[ast.expr]) -> _Value:
        if name in _COLUMN_FUNCTIONS:
            return self._column_function(node, name, arguments)
        if name not in _FUNCTIONS:
            raise self._fault(node, f"calls {name!r}; {nearest(name, [*_FUNCTIONS, *_COLUMN_FUNCTIONS])}")
        types, fewest, most, function = _FUNCTIONS[name]
        if not fewest <= len(arguments) <= (most or len(arguments)):
            number = f"{fewest}" if most else f"{fewest} or more"
            raise self._fault(node, f"gives {len(arguments)} arguments; {name} takes {number}")
        values, part = [self.value(argument) for argument in arguments], ast.unparse(node)

        def call(row: Row) -> Any:
            found = [value(row) for value in values]
            if not all(isinstance(item, types) for item in found):
                raise _NotDecided(f"type:{part}")
            try:
                return function(*found)
            # For example number("many").
            except (ValueError, OverflowError):
                raise _NotDecided(f"type:{part}") from None

        return call

    def _column_function(self, node: ast.Call, name: str, arguments: list[ast.expr]) -> _Value:
        match arguments:
            case [ast.Constant(value=str() as column)]:
                pass
            case [ast.Name(id=column)] if name == "has":
                pass
            case _:
                raise self._fault(node, f"is wrong: {name} takes one column, such as {name}('width')")
        read = self._column(node, column)
        return read if name == "column" else lambda row: not _missing(row.get(column))

    def _arithmetic(
        self, node: ast.expr, op: Callable[[Any, Any], Any], left: _Value, right: _Value
    ) -> _Value:
        part = ast.unparse(node)

        def calculate(row: Row) -> Any:
            a, b = left(row), right(row)
            if not (isinstance(a, int | float) and isinstance(b, int | float)):
                raise _NotDecided(f"type:{part}")
            try:
                return op(a, b)
            # Division by zero or overflow.
            except ArithmeticError:
                raise _NotDecided(f"type:{part}") from None

        return calculate

    def _comparison(self, node: ast.Compare) -> _Value:
        values = [self.value(part) for part in (node.left, *node.comparators)]
        tests, part = [(_COMPARE[type(op)], type(op)) for op in node.ops], ast.unparse(node)

        def compare(row: Row) -> bool:
            left = values[0](row)
            for (test, kind), value in zip(tests, values[1:], strict=True):
                right = value(row)
                if not _comparable(kind, left, right):
                    raise _NotDecided(f"type:{part}")
                if not test(left, right):
                    return False
                left = right
            return True

        return compare

    def _fault(self, node: ast.expr, what: str) -> UserError:
        return UserError(f"filter {self._expression!r}: {ast.unparse(node)!r} {what}")


def _may_be_truth(node: ast.expr) -> bool:
    """Whether a part of this form can be true or false. A column may hold any value."""
    match node:
        case ast.Compare() | ast.BoolOp() | ast.Name() | ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name not in _FUNCTIONS
        case ast.Constant(value=value):
            return isinstance(value, bool)
        case ast.List() | ast.Tuple() | ast.Set() | ast.BinOp() | ast.UnaryOp():
            return False
    # `value` reports forms that filters do not have.
    return True


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    for name, types in (("number", (int, float)), ("text", str), ("list", (list, tuple))):
        if isinstance(value, types):
            return name
    return type(value).__name__


def _comparable(op: type[ast.cmpop], left: Any, right: Any) -> bool:
    """Whether this comparison accepts values of these two kinds."""
    if issubclass(op, ast.In | ast.NotIn):
        return _kind(right) == "list" or (_kind(left) == _kind(right) == "text")
    if issubclass(op, ast.Eq | ast.NotEq):
        return _kind(left) == _kind(right)
    return _kind(left) == _kind(right) and _kind(left) in ("number", "text")

"""Conditions on the columns of a table, such as `width >= 256 and aspect < 3 and language in ('en', 'ko')`.

They have Python syntax but are never run as Python: the text is parsed, and only the following is supported:
comparisons (also chained), `in` and `not in`, `is None`, `and or not`, `+ - * /`, numbers, texts and the functions of
`FUNCTIONS`. Missing values propagate as null, as in SQL, and rows whose condition is null are not selected.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.core.errors import UsageError, did_you_mean

_EXAMPLE = "for example: width >= 256 and language == 'en'"

# name -> (implementation, number of text arguments after the column)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "contains": (pc.match_substring, 1),
    "startswith": (pc.starts_with, 1),
    "endswith": (pc.ends_with, 1),
    "matches": (pc.match_substring_regex, 1),
    "lower": (pc.utf8_lower, 0),
}
_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
_LITERALS = (ast.Tuple, ast.List, ast.Set)
_MAX_LENGTH = 10_000  # characters
_OTHER_LANGUAGES = {"&&": "and", "||": "or", "<>": "!=", "&": "and", "|": "or"}


class Expression:
    """A parsed condition.

    Args:
        text: the condition, as a user wrote it.

    Raises:
        UsageError: the text cannot be parsed.
    """

    def __init__(self, text: str):
        self.text = " ".join(text.split("\n")).strip()
        try:
            if not 0 < len(self.text) <= _MAX_LENGTH:
                raise ValueError(f"it has {len(self.text)} characters, not 1 .. {_MAX_LENGTH}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes in texts
                self._tree = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            hints = [f"write {ours} for {theirs}" for theirs, ours in _OTHER_LANGUAGES.items() if theirs in self.text]
            if "=>" in self.text or "=<" in self.text:
                hints.append("write >= or <=")
            if re.search(r"[^=!<>]=[^=]", self.text):
                hints.append("write == to compare")
            self._fail(error.msg, (error.offset or len(self.text) + 1) - 1, hints[0] if hints else _EXAMPLE)
        except (ValueError, RecursionError, MemoryError) as error:
            raise UsageError(f"the expression cannot be read: {error}", where=self.text[:200]) from error

    @property
    def names(self) -> set[str]:
        """Return the columns that the expression uses."""
        called = {id(node.func) for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        return {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name) and id(node) not in called}

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return for each row whether the condition is true.

        Raises:
            UsageError: a column or function is unknown, or types do not match; also for an empty table.
        """
        return np.asarray(pc.fill_null(self._column(self._tree, table), False).to_numpy(zero_copy_only=False), bool)

    def count_failed(self, table: pa.Table) -> Iterator[tuple[str, int, int]]:
        """Yield, for each condition joined by the outermost `and`, its text, the number of rows in which it is not
        true, and the number of these in which it is null.
        """
        tree = self._tree
        for node in tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]:
            column = self._column(node, table)
            failed = len(table) - (pc.sum(column).as_py() or 0)
            yield str(ast.get_source_segment(self.text, node)), failed, column.null_count

    def _column(self, node: ast.expr, table: pa.Table) -> Any:
        value = self._value(node, table, "condition")
        return pa.array([value.as_py()] * len(table), pa.bool_()) if isinstance(value, pa.Scalar) else value

    def _value(self, node: ast.expr, table: pa.Table, wanted: str | None = None) -> Any:
        """Return a column or a scalar; `wanted` is its required type."""
        match node:
            case ast.BoolOp():
                function = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
                value = self._value(node.values[0], table, "condition")
                for other in node.values[1:]:
                    value = function(value, self._value(other, table, "condition"))
            case ast.UnaryOp(op=ast.Not()):
                value = pc.invert(self._value(node.operand, table, "condition"))
            case ast.UnaryOp(op=ast.USub()):
                value = pc.negate(_as_double(self._value(node.operand, table, "number")))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                sides = [_as_double(self._value(side, table, "number")) for side in (node.left, node.right)]
                value = _ARITHMETIC[type(node.op)](*sides)
            case ast.Compare():
                value = self._chain(node, table)
            case ast.Call():
                value = self._call(node, table)
            case ast.Name():
                if node.id not in table.column_names:
                    close = did_you_mean(node.id, table.column_names)
                    there = f"a text is quoted: '{node.id}'; for a column {_there_are(table.column_names)}"
                    self._fail(f"unknown column {node.id!r}", node, close or there)
                value = table[node.id]
            case ast.Constant() if isinstance(node.value, bool | int | float | str):
                value = self._constant(node)
            case ast.Constant(value=None):
                self._fail("None cannot be used as a value", node, "write COLUMN is None, or COLUMN is not None")
            case _:
                self._fail("unsupported syntax", node, "see mmvit-data filter --help")
        kind = _kind(value)
        if wanted is not None and kind != wanted:
            hint = "compare it, as in COLUMN == 'x' or COLUMN > 0" if wanted == "condition" else None
            self._fail(f"expected a {wanted}, got a {kind}", node, hint)
        return value

    def _chain(self, node: ast.Compare, table: pa.Table) -> Any:
        sides = [node.left, *node.comparators]
        value = None
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            one = self._compare(left, op, right, table)
            value = one if value is None else pc.and_kleene(value, one)
        return value

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
        if isinstance(op, ast.Is | ast.IsNot):
            if not isinstance(right, ast.Constant) or right.value is not None:
                self._fail("only None is allowed after is", right, "write == or !=")
            value = self._value(left, table)
            return pc.is_null(value) if isinstance(op, ast.Is) else pc.is_valid(value)
        if isinstance(op, ast.In | ast.NotIn):
            found = self._contains(left, right, table)
            return found if isinstance(op, ast.In) else pc.invert(found)
        first = self._value(left, table)
        second = self._value(right, table)
        if _kind(first) != _kind(second):
            column = f"{left.id}_name" if isinstance(left, ast.Name) and _kind(second) == "text" else ""
            named = f"write {column} to compare it with a text" if column in table.column_names else None
            hint = _other_kind(first, right) or named
            self._fail(f"cannot compare a {_kind(first)} with a {_kind(second)}", right, hint)
        return _COMPARISONS[type(op)](first, second)

    def _contains(self, left: ast.expr, right: ast.expr, table: pa.Table) -> Any:
        if not isinstance(right, _LITERALS):
            text = self._value(right, table, "text")
            return pc.match_substring(text, self._text(left))
        value = self._value(left, table)
        kind = _kind(value)
        choices = [self._value(choice, table, kind) for choice in right.elts]
        for choice, node in zip(choices, right.elts, strict=True):
            if not isinstance(choice, pa.Scalar):
                self._fail("a list can contain only numbers and texts", node)
        value = _as_double(value) if kind == "number" else value
        found = pc.is_in(value, value_set=pa.array([choice.as_py() for choice in choices], value.type))
        return pc.if_else(pc.is_valid(value), found, None)

    def _call(self, node: ast.Call, table: pa.Table) -> Any:
        name = ast.unparse(node.func)
        if name not in FUNCTIONS:
            self._fail(f"unknown function {name!r}", node, did_you_mean(name, FUNCTIONS) or _there_are(FUNCTIONS))
        function, num_texts = FUNCTIONS[name]
        if node.keywords or len(node.args) != 1 + num_texts:
            self._fail(f"{name} takes {1 + num_texts} arguments", node, f"{name}(COLUMN{', TEXT' * num_texts})")
        text = self._value(node.args[0], table, "text")
        texts = [self._text(argument) for argument in node.args[1:]]
        try:
            function(pa.array(["x"]), *texts)  # an empty column would not reveal an invalid pattern
            return function(text, *texts)
        except pa.ArrowInvalid as error:  # an invalid pattern
            self._fail(str(error), node)

    def _text(self, node: ast.expr) -> str:
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            self._fail("expected a text in quotes", node)
        return node.value

    def _constant(self, node: ast.Constant) -> Any:
        try:
            return pa.scalar(node.value)
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
            self._fail("the value is too large, or not a valid text", node)

    def _fail(self, what: str, at: ast.expr | int, hint: str | None = None) -> NoReturn:
        column = at if isinstance(at, int) else len(self.text.encode()[: at.col_offset].decode())
        raise UsageError(f"expression: {what}", where=f"{self.text}\n         {' ' * column}^", hint=hint)


def _kind(value: Any) -> str:
    if pa.types.is_boolean(value.type):
        return "condition"
    if pa.types.is_integer(value.type) or pa.types.is_floating(value.type):
        return "number"
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        return "text"
    return f"value of type {value.type}"


def _there_are(names: Iterable[str]) -> str:
    return f"choose from: {' '.join(names)}"


def _as_double(value: Any) -> Any:
    return value.cast(pa.float64(), safe=False)


def _other_kind(first: Any, right: ast.expr) -> str | None:
    """Return a hint on how to write the right side."""
    if not isinstance(right, ast.Constant):
        return None
    if _kind(first) == "number" and isinstance(right.value, str):
        return f"write {right.value} without quotes" if right.value.replace(".", "", 1).isdigit() else None
    return f"write '{right.value!s}' in quotes" if _kind(first) == "text" else None

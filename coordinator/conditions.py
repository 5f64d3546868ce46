"""Conditions of trigger rules: small expressions over an event's fields, never Python's eval.

simpleeval walks the syntax tree and knows only what is listed here: comparisons, arithmetic,
`and or not`, `in`, and five functions (docs/decisions/0006-conditions.md). Pure.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any

from simpleeval import EvalWithCompoundTypes, InvalidExpression

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import FieldValue

FUNCTIONS = {"abs": abs, "min": min, "max": max, "len": len}
MAX_LENGTH = 1000
_ALLOWED = (
    *(ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Constant, ast.Name, ast.Call, ast.List, ast.Tuple),
    *(ast.Attribute, ast.Subscript),
)


def check(path: str, expression: str) -> None:
    """Raises ConfigError with the position if `expression` is not one that `holds` understands."""
    if len(expression) > MAX_LENGTH:
        raise ConfigError(path, f"is longer than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as exc:
        raise ConfigError(f"{path}, column {exc.offset}", f"{exc.msg}: {expression!r}") from exc
    for node in ast.walk(tree.body):
        if isinstance(node, ast.expr) and not isinstance(node, _ALLOWED):
            raise ConfigError(f"{path}, column {node.col_offset + 1}", f"{type(node).__name__} is not allowed here")
        if isinstance(node, ast.Attribute | ast.Subscript) and _dotted(node) is None:
            raise ConfigError(
                f"{path}, column {node.col_offset + 1}",
                "names no field",
                "Write sensor.psi, data['model-name'] or records[0].key",
            )


def _dotted(node: ast.expr) -> str | None:
    """The field that `sensor.psi`, `sensor['psi']` and `records[0].psi` name; None if it is no such path."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=key):
            pass
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as key)):
            pass
        case _:
            return None
    root = _dotted(inner)
    return None if root is None else f"{root}.{key}"


class _Flattened(ast.NodeTransformer):
    """Names that stand for paths; `data.x` is the field x, as `data` is where an event's fields come from."""

    def __init__(self, fields: Collection[str]) -> None:
        self._fields = fields

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:  # ast's own
        return self._named(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return self._named(node)

    def _named(self, node: ast.expr) -> ast.expr:
        name = _dotted(node) or ""
        if name not in self._fields and name.startswith("data."):
            name = name.removeprefix("data.")
        return ast.copy_location(ast.Name(id=name, ctx=ast.Load()), node)


def names(expression: str) -> frozenset[str]:
    """The fields that an expression reads (none, if it is no expression)."""
    try:
        tree = _Flattened(()).visit(ast.parse(expression.strip(), mode="eval"))
    except SyntaxError:
        return frozenset()
    words = {"true", "false", "has", *FUNCTIONS}
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)) - words


def holds(expression: str, fields: Mapping[str, FieldValue]) -> bool:
    """Whether the condition is true for an event.

    Raises:
        ConfigError: it cannot be evaluated (a field that is missing, types that do not compare).
    """
    if not expression.strip():
        return True
    functions = {**FUNCTIONS, "has": lambda name: name in fields}
    values: dict[str, Any] = {**fields, "true": True, "false": False, "True": True, "False": False}
    evaluator = EvalWithCompoundTypes(functions=functions, names=values)
    try:
        tree = _Flattened(fields.keys()).visit(ast.parse(expression.strip(), mode="eval"))
        return bool(evaluator.eval("", previously_parsed=tree.body))
    except (
        InvalidExpression,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as exc:
        raise ConfigError("where", f"cannot be evaluated: {exc}") from exc

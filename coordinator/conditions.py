"""Conditions of trigger rules: small expressions over an event's fields, never Python's eval.

simpleeval walks the syntax tree and knows only what is listed here: comparisons, arithmetic,
`and or not`, `in`, and four functions (docs/decisions/0006-conditions.md). Pure.
"""

from __future__ import annotations

import ast
from typing import Any

from simpleeval import EvalWithCompoundTypes, InvalidExpression

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import FieldValue

FUNCTIONS = {"abs": abs, "min": min, "max": max, "len": len}
MAX_LENGTH = 1000
_ALLOWED = (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Constant, ast.Name, ast.Call, ast.List, ast.Tuple)


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


def names(expression: str) -> frozenset[str]:
    """The fields that an expression reads (none, if it is no expression)."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:
        return frozenset()
    words = {"true", "false", *FUNCTIONS}
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)) - words


def holds(expression: str, fields: dict[str, FieldValue]) -> bool:
    """Whether the condition is true for an event.

    Raises:
        ConfigError: it cannot be evaluated (a field that is missing, types that do not compare).
    """
    if not expression.strip():
        return True
    names: dict[str, Any] = {**fields, "true": True, "false": False, "True": True, "False": False}
    evaluator = EvalWithCompoundTypes(functions=FUNCTIONS, names=names)
    try:
        return bool(evaluator.eval(expression.strip()))
    except (
        InvalidExpression,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        TypeError,
        ValueError,
    ) as exc:
        raise ConfigError("where", f"cannot be evaluated: {exc}") from exc

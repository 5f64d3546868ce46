"""A strategy's state between rounds, as data: captured after a round, restored after a crash.

Walks the attributes of a strategy (and of a strategy that it wraps): numbers, texts, containers,
numpy arrays and array records are kept, e.g. the moments of FedAdam (Reddi et al. 2021,
arXiv:2003.00295) or the clipping norm of adaptive DP. Functions are the app's own and are made
anew by it, and so is what a strategy of ours names in `of_one_round`. No pickle: a checkpoint is
JSON and a tensor frame.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.tensors.frame import Tensor


class _Unkept(Exception):
    """A value that cannot be stored as data."""


@dataclass
class StrategyState:
    """`tree` is JSON-ready; arrays stand in `tensors` and are named from the tree."""

    tree: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Attributes that are neither data nor callable: they are reset after a crash."""


def capture(strategy: Strategy) -> StrategyState:
    """The state of `strategy` now."""
    state = StrategyState()
    state.tree = _capture_object(strategy, state)
    return state


def restore(strategy: Strategy, state: StrategyState) -> None:
    """Put a captured state into a fresh strategy of the same app.

    Raises:
        MalformedMessage: the state is of another kind of strategy.
    """
    _restore_object(strategy, state.tree, {t.name: t for t in state.tensors})


def _capture_object(owner: object, state: StrategyState) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    passing = getattr(owner, "of_one_round", ())
    for name, value in vars(owner).items():
        if name in passing:
            continue
        try:
            attributes[name] = _encode(value, state)
        except _Unkept:
            if not callable(value):
                state.skipped.append(f"{type(owner).__name__}.{name}")
    return {"type": type(owner).__name__, "attributes": attributes}


def _restore_object(owner: object, tree: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if tree["type"] != type(owner).__name__:
        raise MalformedMessage(f"the checkpoint is of a {tree['type']}, the app now uses {type(owner).__name__}")
    for name, value in tree["attributes"].items():
        if isinstance(value, dict) and "object" in value:
            _restore_object(getattr(owner, name), value["object"], tensors)
        else:
            setattr(owner, name, _decode(value, tensors))


def _encode(value: Any, state: StrategyState) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value if not isinstance(value, np.generic) else _array(np.asarray(value), state, "scalar")
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
        case np.ndarray():
            return _array(value, state, "array")
        case np.generic():
            return _array(np.asarray(value), state, "scalar")
        case Array():
            return {"flwr": _encode(value.numpy(), state)}
        case ArrayRecord():
            return {"record": [[k, _encode(v.numpy(), state)] for k, v in value.items()]}
        case list() | tuple() if type(value) in (list, tuple):
            return {type(value).__name__: [_encode(v, state) for v in value]}
        case dict():
            return {"dict": [[_encode(k, state), _encode(v, state)] for k, v in value.items()]}
        case Strategy():
            return {"object": _capture_object(value, state)}
        case _:
            raise _Unkept


def _array(value: np.ndarray[Any, Any], state: StrategyState, kind: str) -> dict[str, str]:
    name = str(len(state.tensors))
    try:
        state.tensors.append(Tensor.of(name, value))
    except MalformedMessage as exc:
        raise _Unkept from exc
    return {kind: name}


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()

    def inner(each: Any) -> Any:
        return _decode(each, tensors)

    readers: dict[str, Callable[[Any], Any]] = {
        "bytes": base64.b64decode,
        "array": lambda name: tensors[name].numpy().copy(),
        "scalar": lambda name: tensors[name].numpy()[()],
        "flwr": lambda each: Array(inner(each)),
        "record": lambda pairs: ArrayRecord({k: Array(inner(v)) for k, v in pairs}),
        "list": lambda values: [inner(v) for v in values],
        "tuple": lambda values: tuple(inner(v) for v in values),
        "dict": lambda pairs: {inner(k): inner(v) for k, v in pairs},
    }
    return readers[kind](body)

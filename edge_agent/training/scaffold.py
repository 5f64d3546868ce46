"""The node's half of SCAFFOLD, as a Flower mod: keeps the node's control variate in the context's state.

Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1 with option II. The app adds the record
`scaffold-correction` (c - c_i, by the names of its parameters) to its gradients, and reports its number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message

from fedtide.edge_agent.training.control_variates import correction, own_control, renewed
from fedtide.fabric.messages.scaffold import CHANGE, CONTROL

CORRECTION = "scaffold-correction"
_OWN = "fedtide.scaffold"

Arrays = dict[str, Any]


class ScaffoldMod:
    """For apps whose strategy is `fedtide.aggregation.strategies.Scaffold`; other messages pass unchanged."""

    def __init__(self, learning_rate: float, *, arrays: str = "arrays", steps_key: str = "num-steps") -> None:
        """
        Args:
            learning_rate: the app's own, of plain SGD.
            arrays: the record of the model, in messages and replies.
            steps_key: where the reply's metrics say how many steps were taken.
        """
        self._rate = learning_rate
        self._arrays = arrays
        self._steps_key = steps_key

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        if CONTROL not in message.content:
            return call_next(message, context)
        control = _numpy(message.content.array_records[CONTROL])
        own = own_control(control, _numpy(context.state.array_records.get(_OWN, ArrayRecord())))
        came = _numpy(message.content.array_records[self._arrays])
        del message.content[CONTROL]
        message.content[CORRECTION] = _record(correction(control, own))
        reply = call_next(message, context)
        if not reply.has_content():
            return reply
        steps = self._steps(reply)
        went = _numpy(reply.content.array_records[self._arrays])
        new = renewed(control, own, came, went, steps, self._rate)
        context.state[_OWN] = _record(new)
        reply.content[CHANGE] = _record({k: new[k] - own[k] for k in control})
        return reply

    def _steps(self, reply: Message) -> int:
        for metrics in reply.content.metric_records.values():
            steps = metrics.get(self._steps_key)
            if isinstance(steps, int) and steps > 0:
                return steps
        raise ValueError(f"SCAFFOLD needs the number of steps in the reply's metrics, as {self._steps_key!r}")


def _numpy(record: ArrayRecord) -> Arrays:
    return {k: a.numpy() for k, a in record.items()}


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({k: Array(np.asarray(v)) for k, v in arrays.items()})

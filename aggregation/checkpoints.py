"""Checkpoints of a run in JetStream: what a killed aggregator's successor goes on from.

After each round the *head*: arrays, histories, the strategy's state. Before each phase's messages
leave, its *plan*: which nodes stood to choice and the random state, so that the successor makes
the same choice and recognises the updates that were delivered meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy
from pydantic import Field

from aggregation import random_state, strategy_state
from aggregation.grid_link import GridLink
from aggregation.in_flight import Node
from aggregation.strategy_state import StrategyState
from fabric import flower
from fabric.blobs import BlobRef
from fabric.subjects import CHECKPOINTS, Subjects
from fabric.tensors import decode, encode
from fabric.wire import Arrays, Strict

M = TypeVar("M", bound=Strict)

Histories = dict[str, dict[int, dict[str, float | int | list[float] | list[int]]]]
_HISTORIES = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Plan(Strict):
    """A phase that is about to be sent, or was."""

    round: int
    phase: str
    nodes: list[tuple[str, str]] = Field(description="(name, region) of every node that stood to choice, in order")
    random: str


class Head(Strict):
    """The run after `round`."""

    round: int
    arrays: Arrays
    rounds_with_updates: int
    random: str = Field(description="The random generators after the round")
    histories: Histories
    strategy: str = Field(description="The strategy's state tree, JSON")
    strategy_tensors: BlobRef | None


class Checkpoints:
    """Reads and writes the checkpoints of one run."""

    def __init__(self, run: str, link: GridLink, subjects: Subjects) -> None:
        self._run = run
        self._link = link
        self._subjects = subjects

    def head(self) -> Head | None:
        return self._read("head", Head)

    def plan(self, round_: int, phase: str) -> Plan | None:
        """The plan of exactly this phase, if it was made before."""
        found = self._read(f"plan-{phase}", Plan)
        return found if found is not None and found.round == round_ else None

    def save_plan(self, plan: Plan) -> None:
        self._write(f"plan-{plan.phase}", plan)

    def save_head(
        self, round_: int, arrays: ArrayRecord, with_updates: int, result: Result, strategy: Strategy
    ) -> Head:
        """Make round `round_` durable. The arrays are what the next round sends: they are stored once."""
        state = strategy_state.capture(strategy)
        head = Head(
            round=round_,
            arrays=self._link.call(self._link.upload(encode(flower.tensors_of(arrays)))),
            rounds_with_updates=with_updates,
            random=random_state.capture(),
            histories={name: _values(getattr(result, name)) for name in _HISTORIES},
            strategy=json.dumps(state.tree),
            strategy_tensors=self._store(state),
        )
        self._write("head", head)
        return head

    def restore(self, head: Head, result: Result, strategy: Strategy) -> ArrayRecord:
        """Put a head back into a fresh result and strategy; returns the global arrays."""
        for name in _HISTORIES:
            records = {number: MetricRecord(dict(values)) for number, values in head.histories[name].items()}
            getattr(result, name).update(records)
        random_state.restore(head.random)
        tensors = decode(memoryview(self._fetch(head.strategy_tensors))) if head.strategy_tensors is not None else []
        strategy_state.restore(strategy, StrategyState(json.loads(head.strategy), tensors))
        frame = head.arrays.inline
        if head.arrays.blob is not None:
            blob = self._link.fetch(head.arrays.blob, prefix=self._link.round_prefix)
            frame = bytes(self._link.call(blob))
        return flower.record_of(frame or b"")

    def _store(self, state: StrategyState) -> BlobRef | None:
        if not state.tensors:
            return None
        return self._link.call(self._link.store(encode(state.tensors), keep=False, **self._place))

    def _fetch(self, ref: BlobRef) -> bytearray:
        return self._link.call(self._link.fetch(ref, **self._place))

    @property
    def _place(self) -> dict[str, Any]:
        prefix: Callable[[str], str] = lambda digest: self._subjects.checkpoint_blob(self._run, digest)  # noqa: E731
        return {"stream": CHECKPOINTS, "prefix": prefix}

    def _read(self, name: str, kind: type[M]) -> M | None:
        data = self._link.call(self._link.read(CHECKPOINTS, self._subjects.checkpoint(self._run, name)))
        return kind.model_validate_json(data) if data is not None else None

    def _write(self, name: str, value: Strict) -> None:
        subject = self._subjects.checkpoint(self._run, name)
        self._link.call(self._link.write(subject, value.model_dump_json().encode()))


def nodes_of(plan: Plan) -> list[Node]:
    return [Node.of(name, region) for name, region in plan.nodes]


def _values(history: dict[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    return {number: dict(record) for number, record in history.items()}

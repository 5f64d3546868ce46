"""Checkpoints of a run in JetStream, from which the next attempt of a killed aggregator resumes.

The *head* is stored after each round: arrays, histories, the strategy's state. The *plan* is stored
before a phase's messages are sent: the candidate nodes and the random state. With it the next attempt
makes the same choice and recognises the updates that were delivered meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from pydantic import Field

from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.rounds import random_state, strategy_state
from fedtide.aggregation.rounds.progress import HISTORIES, Best, Progress
from fedtide.aggregation.rounds.strategy_state import StrategyState
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.checkpoints import Elsewhere, ModelAfter
from fedtide.fabric.messages.tasks import Arrays
from fedtide.fabric.nats.subjects import CHECKPOINTS, Subjects
from fedtide.fabric.strict import Strict
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import decode, encode

M = TypeVar("M", bound=Strict)

Histories = dict[str, dict[int, dict[str, float | int | list[float] | list[int]]]]
_LARGE_BYTES = 1024 * 1024
"""Larger records are blobs; a message may have 8 MiB."""
_ELSEWHERE = b'{"elsewhere"'


class Plan(Strict):
    """The candidates and the random state of one phase's node sampling."""

    round: int
    trial: int = 1
    phase: str
    nodes: list[tuple[str, str]] = Field(description="(name, region) of every candidate node, in order")
    random: str
    codecs: dict[str, list[str]] = Field(default={}, description="Codecs that each node supports")


class OutstandingTask(Strict):
    """An outstanding training task, whose update a later round may count."""

    task: str
    name: str
    region: str
    round: int
    expires_at: float

    @property
    def node(self) -> Node:
        return Node.of(self.name, self.region)


class RetryCheckpoint(Strict):
    """The next trial of an abandoned round; `outstanding`: tasks whose updates it may still count."""

    round: int
    trial: int
    outstanding: list[OutstandingTask]


class Metrics(Strict):
    """The metrics of one round, by history."""

    histories: Histories


class RoundCheckpoint(Strict):
    """The state of a stage after `round`. `bases`: models that `outstanding` tasks train from, by round of the run."""

    round: int
    arrays: Arrays
    rounds_with_updates: int
    random: str = Field(description="The random generators after the round")
    strategy: str = Field(description="The strategy's state tree, JSON")
    strategy_tensors: BlobRef | None
    outstanding: list[OutstandingTask] = []
    bases: dict[int, Arrays] = {}
    bytes_moved: int = 0
    anchor: Arrays | None = Field(default=None, description="Model that coded models are differences to")
    best: ModelAfter | None = None
    asked_to_train: bool = False

    def models(self) -> set[BlobRef]:
        """The models that are blobs."""
        best = [self.best.arrays] if self.best is not None else []
        anchor = [self.anchor] if self.anchor is not None else []
        return {a.blob for a in (self.arrays, *self.bases.values(), *best, *anchor) if a.blob is not None}


class Checkpoints:
    """Reads and writes the checkpoints of one run."""

    def __init__(self, run: str, link: GridLink, subjects: Subjects) -> None:
        self._run = run
        self._link = link
        self._subjects = subjects
        self._states: dict[str, set[BlobRef]] = {}
        """Blobs of the stored records, by record."""

    def head(self, stage: int) -> RoundCheckpoint | None:
        """The last checkpoint of the `stage`-th strategy."""
        head = self._read(_head(stage), RoundCheckpoint)
        if head is not None and head.strategy_tensors is not None:
            self._states.setdefault(_head(stage), set()).add(head.strategy_tensors)
        return head

    def plan(self, round_: int, trial: int, phase: str) -> Plan | None:
        """The stored plan of exactly this phase, if there is one."""
        found = self._read(f"plan-{phase}", Plan)
        return found if found is not None and (found.round, found.trial) == (round_, trial) else None

    def mark(self, round_: int) -> RetryCheckpoint | None:
        """The mark of this round, if it was abandoned before."""
        found = self._read("mark", RetryCheckpoint)
        return found if found is not None and found.round == round_ else None

    def save_mark(self, progress: Progress) -> None:
        """Store the current trial, before the previous trial's replies may be acknowledged."""
        mark = RetryCheckpoint(round=progress.place, trial=progress.trial, outstanding=_out(progress))
        self._write("mark", mark)

    def save_plan(self, plan: Plan) -> None:
        self._write(f"plan-{plan.phase}", plan)

    def save_head(self, progress: Progress, bytes_moved: int) -> RoundCheckpoint:
        """Store the current round. Its arrays are those that the next round sends: they are stored once."""
        number = progress.round
        histories = {name: getattr(progress.result, name) for name in HISTORIES}
        metrics = {name: {number: dict(of[number])} for name, of in histories.items() if number in of}
        if metrics:  # before the head: a round that is closed has its metrics
            self._write(_metrics(progress.stage, number), Metrics(histories=metrics))
        state = strategy_state.capture(progress.strategy)
        best = progress.best
        head = RoundCheckpoint(
            round=number,
            arrays=self._upload(progress.arrays),
            rounds_with_updates=progress.rounds_with_updates,
            random=random_state.capture(),
            strategy=json.dumps(state.tree),
            strategy_tensors=self._store(state),
            outstanding=_out(progress),
            bases={number: self._upload(base) for number, base in progress.bases.items()},
            bytes_moved=bytes_moved,
            anchor=self._upload(progress.anchor) if progress.anchor is not None else None,
            best=ModelAfter(round=best.round, arrays=self._upload(best.arrays)) if best is not None else None,
            asked_to_train=progress.asked_to_train,
        )
        tensors = {head.strategy_tensors} if head.strategy_tensors is not None else set()
        self._write(_head(progress.stage), head, tensors)
        return head

    def forget(self, models: set[BlobRef]) -> None:
        """Delete models that no round needs any more."""
        self._link.call(self._link.storage.forget(models, ()))

    def restore(self, head: RoundCheckpoint, progress: Progress) -> None:
        """Restore a head into a new `Progress`."""
        for number in range(head.round + 1):
            found = self._read(_metrics(progress.stage, number), Metrics)
            for name, values in found.histories.items() if found is not None else ():
                getattr(progress.result, name)[number] = MetricRecord(dict(values[number]))
            progress.series.append((number, progress.metrics(number)))
        random_state.restore(head.random)
        self.restore_strategy(head, progress.strategy)
        progress.arrays = self._download(head.arrays)
        progress.bases = {number: self._download(arrays) for number, arrays in head.bases.items()}
        progress.round, progress.rounds_with_updates = head.round, head.rounds_with_updates
        progress.bytes_before, progress.asked_to_train = head.bytes_moved, head.asked_to_train
        progress.anchor = self._download(head.anchor) if head.anchor is not None else None
        if head.best is not None:
            progress.best = Best(head.best.round, self._download(head.best.arrays))

    def restore_strategy_of(self, progress: Progress) -> None:
        """Undo what a round that does not count has changed in the strategy."""
        head = self.head(progress.stage)
        if head is not None:
            self.restore_strategy(head, progress.strategy)

    def restore_strategy(self, head: RoundCheckpoint, strategy: Strategy) -> None:
        tensors = decode(memoryview(self._fetch(head.strategy_tensors))) if head.strategy_tensors is not None else []
        strategy_state.restore(strategy, StrategyState(json.loads(head.strategy), tensors))

    def _upload(self, arrays: ArrayRecord) -> Arrays:
        return self._link.call(self._link.storage.upload(encode(flower.tensors_of(arrays))))

    def _download(self, arrays: Arrays) -> ArrayRecord:
        frame = arrays.inline
        if arrays.blob is not None:
            storage = self._link.storage
            frame = bytes(self._link.call(storage.fetch(arrays.blob, prefix=storage.round_prefix)))
        return flower.record_of(frame or b"")

    def _store(self, state: StrategyState) -> BlobRef | None:
        if not state.tensors:
            return None
        return self._link.call(self._link.storage.store(encode(state.tensors), **self._place))

    def _fetch(self, ref: BlobRef) -> bytearray:
        return self._link.call(self._link.storage.fetch(ref, **self._place))

    @property
    def _place(self) -> dict[str, Any]:
        prefix: Callable[[str], str] = lambda digest: self._subjects.checkpoint_blob(self._run, digest)  # noqa: E731
        return {"stream": CHECKPOINTS, "prefix": prefix}

    def _read(self, name: str, kind: type[M]) -> M | None:
        data = self._link.call(self._link.storage.read(CHECKPOINTS, self._subjects.checkpoint(self._run, name)))
        if data is None:
            return None
        if data.startswith(_ELSEWHERE):
            data = bytes(self._fetch(from_json(Elsewhere, data, name).elsewhere))
        return from_json(kind, data, name)

    def _write(self, name: str, value: Strict, states: Collection[BlobRef] = ()) -> None:
        """Store a record, as a blob if it is large; the blobs of the one that it replaces go.

        Args:
            states: blobs that the record names.
        """
        data, named = to_json(value), set(states)
        if len(data) > _LARGE_BYTES:
            ref = self._link.call(self._link.storage.store([data], **self._place))
            data, named = to_json(Elsewhere(elsewhere=ref)), named | {ref}
        self._link.call(self._link.storage.write(self._subjects.checkpoint(self._run, name), data))
        gone = self._states.get(name, set()) - named
        self._states[name] = named
        self._link.call(self._link.storage.forget((), gone))


def _head(stage: int) -> str:
    return "head" if stage == 1 else f"head-{stage}"


def _metrics(stage: int, number: int) -> str:
    return f"metrics-{stage}-{number}"


def _out(progress: Progress) -> list[OutstandingTask]:
    asked = progress.grid.outstanding() | progress.grid.kept()
    return [
        OutstandingTask(task=t, name=a.node.name, region=a.node.region, round=a.place.round, expires_at=a.expires_at)
        for t, a in asked.items()
    ]


def nodes_of(plan: Plan) -> list[Node]:
    return [Node.of(name, region, plan.codecs.get(name, ())) for name, region in plan.nodes]

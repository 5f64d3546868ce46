"""Flower's Grid over NATS: replies are handed on as they arrive, and dropped once handed on.

Implements `flwr.serverapp.Grid` for unmodified ServerApps: the strategies of flwr, custom
mains with push and pull, and the legacy API, which calls from several threads at once.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import DEFAULT_TTL, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from aggregation.admission import Refusal
from aggregation.config import WorkerConfig
from aggregation.grid_link import GridLink
from aggregation.in_flight import Arrived, Inbox, Node
from aggregation.replies import Replies
from fabric import flower
from fabric.blobs import BlobRef
from fabric.errors import MalformedMessage, NotFound
from fabric.events import RoundOpened, RoundsRestarted, UpdateReceived, UpdateRefused
from fabric.ids import flower_int
from fabric.wire import Arrays, Task

Admission = Callable[[Message], Refusal | None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A message on its way: what its answer needs to be understood."""

    message: Message
    node: Node
    round: int
    phase: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A driven phase: `pinned` are the nodes to choose from, if that was settled before a crash;
    `before_send` is told the nodes that stood to choice, before the first message leaves."""

    round: int
    name: str
    admission: Admission | None
    pinned: list[Node] | None
    before_send: Callable[[list[Node]], None]


class NatsGrid(Grid):
    """One run's Grid. A round driver, if there is one, says with `enter` which phase it is in."""

    def __init__(self, config: WorkerConfig, link: GridLink, run_config: dict[str, bool | int | float | str]) -> None:
        self._config = config
        self._link = link
        self._run_config = run_config
        self._run = flower.Run.create_empty(flower_int(config.run))
        self._nodes: dict[int, Node] = {}
        self._choice: list[Node] = []
        self._asked: dict[str, Asked] = {}
        self._pulled: Inbox = queue.SimpleQueue()
        self._ready: dict[str, Message] = {}
        self._counter = itertools.count(1)
        self._uploads: dict[int, tuple[ArrayRecord | MetricRecord | ConfigRecord, Arrays]] = {}
        self._lock = threading.RLock()
        self._told_restart = False
        self._phase: Phase | None = None
        self._per_node: Counter[str] = Counter()

    def enter(self, phase: Phase) -> None:
        """From here on messages belong to `phase`: their tasks get names that a successor would give them too."""
        self._phase = phase
        self._per_node.clear()
        if phase.pinned is not None:
            self._nodes |= {n.node_id: n for n in phase.pinned}

    def leave(self) -> None:
        """The driver is done: what the app still sends is its own affair."""
        self._phase = None

    def set_run(self, run: flower.Run) -> None:
        self._run = run

    @property
    def run(self) -> flower.Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        pinned = self._phase.pinned if self._phase is not None else None
        nodes = pinned if pinned is not None else self._link.call(self._link.nodes())
        with self._lock:
            self._choice = nodes
            self._nodes |= {n.node_id: n for n in nodes}
        return [n.node_id for n in nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._push(messages, self._pulled)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            while not self._pulled.empty():
                arrived = self._pulled.get()
                self._ready[arrived.task] = self._reply(arrived)
            return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send now; the returned sequence yields each reply when it arrives.

        A node that raised, vanished or answered with something that `admission` refuses yields an
        error reply. After `timeout` seconds the rest is given up, and counted as such.
        """
        inbox: Inbox = queue.SimpleQueue()
        limit = min(timeout if timeout is not None else DEFAULT_TTL, self._config.spec.round_timeout_s)
        waiting = set(self._push(messages, inbox))
        return Replies(self._replies(inbox, waiting, time.monotonic() + limit))

    def _replies(self, inbox: Inbox, waiting: set[str], deadline: float) -> Iterator[Message]:
        while waiting:
            try:
                arrived = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._give_up(waiting)
                return
            waiting.discard(arrived.task)
            yield self._reply(arrived)

    def _push(self, messages: Iterable[Message], inbox: Inbox) -> list[str]:
        with self._lock:
            self._uploads.clear()
            sent = [self._prepare(message) for message in messages]
            self._asked |= {task.task: asked for task, asked in sent}
        if self._phase is None:
            self._restarted()
        elif sent:
            self._phase.before_send(self._choice)
        for (round_, phase), group in itertools.groupby(sent, key=lambda s: (s[1].round, s[1].phase)):
            self._announce(round_, phase, list(group))
        for task, asked in sent:
            self._link.call(self._link.send(task, asked.node, inbox))
        self._link.call(self._link.look_for_absent())
        return [task.task for task, _ in sent]

    def _restarted(self) -> None:
        """Without a driver a crashed run cannot go on where it was: its first push says that it begins again."""
        self._link.call(self._link.stop_holding())
        if self._config.attempt > 1 and not self._told_restart:
            self._told_restart = True
            restarted = RoundsRestarted(run=self._config.run, attempt=self._config.attempt)
            self._link.call(self._link.report(restarted))

    def _announce(self, round_: int, phase: str, sent: list[tuple[Task, Asked]]) -> None:
        size = sum(len(task.model_dump_json()) + sum(b.size_bytes for b in task.message.blobs()) for task, _ in sent)
        opened = RoundOpened(
            run=self._config.run,
            attempt=self._config.attempt,
            round=round_,
            phase=phase,
            nodes=[asked.node.name for _, asked in sent],
            bytes_down=size,
        )
        self._link.call(self._link.report(opened))

    def _prepare(self, message: Message) -> tuple[Task, Asked]:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            raise NotFound(
                f"no node with id {message.metadata.dst_node_id} takes part in this run",
                "Send only to ids that get_node_ids() returned",
            )
        task_id = self._task_id(node)
        flower.stamp(message, task_id)
        arrays = {name: self._upload(message.content[name]) for name in flower.framed(message.content)}
        task = Task(
            task=task_id,
            run=self._config.run,
            app=self._config.spec.app,
            run_config=self._run_config,
            message=flower.to_wire(message, arrays),
            expires_at=message.metadata.created_at + min(message.metadata.ttl, self._config.spec.round_timeout_s),
        )
        return task, Asked(message, node, self._round_of(message), message.metadata.message_type)

    def _upload(self, record: ArrayRecord | MetricRecord | ConfigRecord) -> Arrays:
        # The same record object goes to many nodes: it is encoded and stored once a push.
        known = self._uploads.get(id(record))
        if known is None:
            known = (record, self._link.call(self._link.upload(flower.frame_of(record))))
            self._uploads[id(record)] = known
        return known[1]

    def _task_id(self, node: Node) -> str:
        run = self._config.run
        if self._phase is None:
            return f"{run}-a{self._config.attempt}-{next(self._counter)}"
        self._per_node[node.name] += 1
        return f"{run}-r{self._phase.round}-{self._phase.name}-{self._per_node[node.name]}-{node.name}"

    def _round_of(self, message: Message) -> int:
        if self._phase is not None:
            return self._phase.round
        group = message.metadata.group_id
        return int(group) if group.isdigit() else 0

    def model_blob(self) -> list[BlobRef]:
        """The blobs of the last push: a driver drops them when their round is over."""
        return [a.blob for _, a in self._uploads.values() if a.blob is not None]

    def _reply(self, arrived: Arrived) -> Message:
        with self._lock:
            asked = self._asked.pop(arrived.task)
        if arrived.reply is None:
            return self._refuse(asked, arrived.category, arrived.lost, flower.ErrorCode.NODE_UNAVAILABLE)
        try:
            message = flower.from_wire(arrived.reply.message, arrived.frames)
        except MalformedMessage as exc:
            return self._refuse(asked, "malformed", str(exc), flower.ErrorCode.UNKNOWN)
        if message.has_error():
            return self._refuse(asked, "app_error", message.error.reason or "no reason given", message.error.code)
        admission = self._phase.admission if self._phase is not None else None
        refusal = admission(message) if admission is not None else None
        if refusal is not None:
            return self._refuse(asked, refusal.category, refusal.reason, flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
        received = UpdateReceived(
            run=self._config.run,
            attempt=self._config.attempt,
            round=asked.round,
            phase=asked.phase,
            node=asked.node.name,
            bytes_up=arrived.size_bytes,
            seconds=arrived.reply.seconds,
        )
        self._link.call(self._link.report(received))
        return message

    def _refuse(self, asked: Asked, category: str, reason: str, code: int) -> Message:
        self._count_refused(asked, category, reason)
        return Message(Error(code, reason), reply_to=asked.message)

    def _count_refused(self, asked: Asked, category: str, reason: str) -> None:
        refused = UpdateRefused.model_validate(
            {
                "run": self._config.run,
                "attempt": self._config.attempt,
                "round": asked.round,
                "phase": asked.phase,
                "node": asked.node.name,
                "category": category,
                "reason": reason[:2000],
            }
        )
        self._link.call(self._link.report(refused))

    def _give_up(self, waiting: set[str]) -> None:
        with self._lock:
            given_up = [self._asked.pop(t) for t in sorted(waiting) if t in self._asked]
        for asked in given_up:
            self._count_refused(asked, "timeout", "no answer before the round's deadline")
        self._link.call(self._link.give_up(sorted(waiting)))

"""Flower messages on their way out: as tasks with names, their arrays stored once."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from aggregation.config import WorkerConfig
from aggregation.grid_link import GridLink
from aggregation.in_flight import Node
from fabric import flower
from fabric.blobs import BlobRef
from fabric.wire import Arrays, ConfigValues, Task

EXPIRY_MARGIN_S = 60.0
"""How long after its round's deadline a task is still worth an answer: the deadline is the coordinator's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run a message belongs; `driven` if a successor would send it under the same name."""

    round: int
    trial: int
    phase: str
    driven: bool


def place_of(task: str, run: str) -> Place | None:
    """Where a driven task of a run belongs, by its name; None if it is not one."""
    found = re.match(r"-r(\d+)-t(\d+)-([a-z_]+)-", task.removeprefix(run))
    if found is None:
        return None
    return Place(int(found[1]), int(found[2]), found[3], driven=True)


class Outgoing:
    """Prepares the messages of one push after the other; `blobs` are those of the present one."""

    def __init__(self, config: WorkerConfig, link: GridLink, run_config: ConfigValues) -> None:
        self._config = config
        self._link = link
        self._run_config = run_config
        self._uploads: dict[int, tuple[ArrayRecord | MetricRecord | ConfigRecord, Arrays]] = {}
        self._counter = itertools.count(1)
        self._per_node: Counter[str] = Counter()

    def enter_phase(self) -> None:
        """Names are counted anew."""
        self._per_node.clear()

    def begin_push(self) -> None:
        self._uploads.clear()

    def prepare(self, message: Message, node: Node, place: Place) -> Task:
        task_id = self._task_id(node, place)
        flower.stamp(message, task_id)
        arrays = {name: self._upload(message.content[name]) for name in flower.framed(message.content)}
        return Task(
            task=task_id,
            run=self._config.run,
            app=self._config.spec.app,
            run_config=self._run_config,
            message=flower.to_wire(message, arrays),
            expires_at=message.metadata.created_at + min(message.metadata.ttl, self._worth_s(place)),
        )

    def blobs(self) -> list[BlobRef]:
        return [a.blob for _, a in self._uploads.values() if a.blob is not None]

    def _worth_s(self, place: Place) -> float:
        """Seconds for which a task is worth an answer."""
        policy = self._config.spec.policy
        if not place.driven:
            return policy.deadline_s
        rounds = 1 + (policy.max_staleness if policy.carries else 0)
        return policy.deadline_s * rounds + EXPIRY_MARGIN_S

    def _upload(self, record: ArrayRecord | MetricRecord | ConfigRecord) -> Arrays:
        # The same record object goes to many nodes: it is encoded and stored once a push.
        known = self._uploads.get(id(record))
        if known is None:
            known = (record, self._link.call(self._link.storage.upload(flower.frame_of(record))))
            self._uploads[id(record)] = known
        return known[1]

    def _task_id(self, node: Node, place: Place) -> str:
        run = self._config.run
        if not place.driven:
            return f"{run}-a{self._config.attempt}-{next(self._counter)}"
        self._per_node[node.name] += 1
        return f"{run}-r{place.round}-t{place.trial}-{place.phase}-{self._per_node[node.name]}-{node.name}"

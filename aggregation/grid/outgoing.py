"""Turns outgoing Flower messages into named tasks; a record for many nodes is stored once."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Collection

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Node
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.link.phase_id import PhaseId
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.messages.tasks import INLINE_BYTES, Arrays, Task
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors import frame as frames
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.codecs import Codec, encode, is_coded
from fedtide.fabric.tensors.frame import Buffer, Tensor, frame_size

EXPIRY_MARGIN_S = 60.0
"""How long a task stays valid after its round's deadline, which the coordinator enforces."""


def place_for(message: Message, during: PhaseId | None) -> PhaseId:
    """The place of a message that belongs to no driven phase.

    Args:
        during: the driven phase in which the app asks this beside; without one, the round is what the app set as the
            message's group id, or as Flower's strategies do in a config record, `server-round`.
    """
    kind, group = message.metadata.message_type, message.metadata.group_id
    if during is not None:
        return PhaseId(during.round, during.trial, f"{during.phase}/{kind}", driven=False)
    if group.isdecimal() and len(group) < 10:
        return PhaseId(int(group), 1, kind, driven=False)
    said = [record.get("server-round") for record in message.content.config_records.values()]
    numbers = [n for n in said if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9]
    return PhaseId(numbers[0] if numbers else 0, 1, kind, driven=False)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.spec == b.spec and np.array_equal(np.frombuffer(a.data, np.uint8), np.frombuffer(b.data, np.uint8))


def _reads(node: Node, codec: str) -> bool:
    return bool(codec) and Codec.parse(codec).kind in node.codecs


class Outgoing:
    """Prepares messages, push by push; `blobs` are those of the current push."""

    def __init__(self, config: WorkerConfig, link: GridLink, run_config: ConfigValues) -> None:
        self._config = config
        self._link = link
        self._run_config = run_config
        self._uploads: dict[tuple[int, bool], tuple[ArrayRecord | MetricRecord | ConfigRecord, Arrays]] = {}
        self._counter = itertools.count(1)
        self._per_node: Counter[str] = Counter()
        self._summing: Collection[str] = ()
        self._anchor: tuple[BlobRef, dict[str, Tensor]] | None = None

    def code_against(self, anchor: ArrayRecord) -> None:
        """Send models from now on as coded differences to `anchor`, which the nodes keep."""
        frame = flower.frame_of(anchor)
        if frame_size(frame) > INLINE_BYTES:
            storage = self._link.storage
            ref = self._link.call(storage.store(frame, prefix=storage.round_prefix))
            storage.anchors.append(ref)
            self._anchor = (ref, {t.name: t for t in flower.tensors_of(anchor)})

    def enter_phase(self) -> None:
        """Reset the counters that are part of task names."""
        self._per_node.clear()

    def begin_push(self, summing: Collection[str] = ()) -> None:
        """Begin a group of messages; updates from the regions in `summing` stay in their region."""
        self._uploads.clear()
        self._summing = summing

    def prepare(self, message: Message, node: Node, place: PhaseId) -> Task:
        task_id = self._task_id(node, place)
        flower.stamp(message, task_id)
        policy = self._config.spec.policy
        one_model = len(message.content.array_records) == 1
        down = place.driven and one_model and _reads(node, policy.down)
        arrays = {name: self._upload(message.content[name], coded=down) for name in flower.framed(message.content)}
        trains = place.phase == "train" and one_model
        return Task(
            task=task_id,
            run=self._config.run,
            app=self._config.spec.app,
            run_config=self._run_config,
            message=flower.to_wire(message, arrays),
            codec=policy.up if trains and _reads(node, policy.up) else "",
            stay=trains and place.driven and node.region in self._summing,
            expires_at=message.metadata.created_at + min(message.metadata.ttl, self._worth_s(place)),
        )

    def blobs(self) -> list[BlobRef]:
        kept = self._anchor[0] if self._anchor is not None else None
        return [a.blob for _, a in self._uploads.values() if a.blob is not None and a.blob != kept]

    def _worth_s(self, place: PhaseId) -> float:
        """Seconds for which a task stays valid."""
        policy = self._config.spec.policy
        if not place.driven:
            return policy.deadline_s
        rounds = 1 + (policy.max_staleness if policy.carries else 0)
        return policy.deadline_s * rounds + EXPIRY_MARGIN_S

    def _upload(self, record: ArrayRecord | MetricRecord | ConfigRecord, *, coded: bool) -> Arrays:
        # The same record object goes to many nodes: it is encoded and stored once a push.
        key = (id(record), coded)
        known = self._uploads.get(key)
        if known is None:
            known = (record, self._coded(record) if coded else self._plain(flower.frame_of(record)))
            self._uploads[key] = known
        return known[1]

    def _plain(self, frame: list[Buffer]) -> Arrays:
        return self._link.call(self._link.storage.upload(frame))

    def _coded(self, record: ArrayRecord | MetricRecord | ConfigRecord) -> Arrays:
        plain = flower.frame_of(record)
        if self._anchor is None or not isinstance(record, ArrayRecord) or frame_size(plain) <= INLINE_BYTES:
            return self._plain(plain)
        anchor, base = self._anchor
        tensors = flower.tensors_of(record)
        if all(t.name in base and _equal(t, base[t.name]) for t in tensors):
            return Arrays(blob=anchor, base=anchor)
        # The seed depends on the model alone: every phase sends the same bytes.
        seed = zlib.crc32(b"".join(zlib.crc32(t.data).to_bytes(4, "big") for t in tensors))
        coded = encode(tensors, base, Codec.parse(self._config.spec.policy.down), seed)
        return self._plain(frames.encode(coded)).model_copy(update={"coded": is_coded(coded), "base": anchor})

    def _task_id(self, node: Node, place: PhaseId) -> str:
        run, life = self._config.run, self._config.life
        if not place.driven:
            return f"{run}-a{self._config.attempt}-{next(self._counter)}-{node.name}"
        self._per_node[node.name] += 1
        begun = "" if life == 1 else f"-l{life}"  # a task of a life before may have been cancelled
        return f"{run}{begun}-r{place.round}-t{place.trial}-{place.phase}-{self._per_node[node.name]}-{node.name}"

"""What is on its way between an aggregator and its nodes."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fedtide.fabric.errors import TooLarge
from fedtide.fabric.ids import flower_int
from fedtide.fabric.messages.tasks import Reply
from fedtide.fabric.nats.subjects import ReplyTo, parse_as
from fedtide.fabric.plans.round_policy import TimeIsUp
from fedtide.fabric.tensors.frame import Buffer

RefusalCategory = Literal[
    "node_lost",
    "malformed",
    "timeout",
    "too_large",
    "wrong_shape",
    "not_finite",
    "out_of_range",
    "bad_weight",
    "too_far",
]


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the coordinator describes it to a run."""

    name: str
    region: str
    node_id: int
    codecs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str, region: str, codecs: Iterable[str] = ()) -> Node:
        return cls(name, region, flower_int(name), frozenset(codecs))


@dataclass(frozen=True, slots=True)
class Arrived:
    """A reply with its tensors, or the notice that no reply will come.

    `folded`: the tensors are already in the round's sum. `lost`: why no reply will come, counted under `category`.
    """

    task: str
    reply: Reply | None
    frames: dict[str, Buffer] = field(default_factory=dict)
    folded: bool = False
    size_bytes: int = 0
    lost: str = ""
    category: RefusalCategory = "node_lost"


Inbox = queue.SimpleQueue[Arrived | TimeIsUp]


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A sent task: the node that has it, and the inbox that its reply goes to."""

    node: Node
    inbox: Inbox


def check_size(reply: Reply, limit: int | None) -> None:
    """Raises TooLarge if an update exceeds its run's limit, before any of it is read."""
    size = sum(ref.size_bytes for ref in reply.message.blobs())
    if limit is not None and size > limit:
        raise TooLarge(f"the update is {size} bytes, allowed are {limit}")


def is_theirs(subject: str, task: str, asked: str | None) -> bool:
    """Whether a reply under `subject` comes from the node that was given the task (`asked`, if that is known).

    The broker authenticates the node in the subject, so no node can reply for another.
    """
    node = parse_as(ReplyTo, subject).node
    return task.endswith(f"-{node}") and asked in (None, node)

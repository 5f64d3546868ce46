"""JetStream's protocol: API prefixes, answers, error codes, and messages as we pass them on. Pure."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fedtide.fabric.errors import BrokerUnavailable, FedtideError, StaleWriter, StoreFull

STREAM_NAME_IN_USE = 10058
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
PULL_BATCH = 256
PULL_HEARTBEAT_S = 5.0
_PULL_EXPIRES_S = 30.0
_ACK_WAIT_S = 60
_UNLIMITED = -1
"""A round may hold as many unacknowledged replies as it has nodes."""
_NANOSECONDS = 1_000_000_000
_WRONG_LAST_SEQUENCE = 10071
_WRONG_LAST_SEQUENCE_CONSTANT = 10164
_INCOMPLETE_BATCH = 10176
_NO_ROOM = (10002, 10023, 10047, 10077)
"""For the account, for the server, for another stream, for a message."""
_NO_PEERS = 10005
"""A cluster has no servers for a stream; what it says beside it tells whether for want of room."""


@dataclass(frozen=True, slots=True)
class Ack:
    """JetStream's confirmation that a message is stored; `duplicate` if its id was already known."""

    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it arrived; `reply` is where an answer goes, if one is wanted."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: str = ""

    @property
    def sequence(self) -> int:
        return int(self.headers.get("Nats-Sequence", 0))

    @property
    def stored_at(self) -> datetime:
        """By the clock of the server that stored it."""
        return datetime.fromisoformat(self.headers["Nats-Time-Stamp"])

    @property
    def sequence_at_source(self) -> int:
        """Its sequence in the stream that this one has it from; 0 if it came from nowhere else."""
        told = self.headers.get("Nats-Stream-Source", "").split()
        return int(told[1]) if len(told) > 1 and told[1].isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message of a durable consumer; it comes again until `ack` was called."""

    subject: str
    data: bytes
    ack: Callable[[], Awaitable[None]]
    sequence: int = 0
    """Its sequence in the stream: the same if it is delivered again, another for a copy of it."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """How full a stream is; `max_bytes` is negative if it has no limit."""

    messages: int
    bytes: int
    max_bytes: int
    created: datetime

    @property
    def fill(self) -> float:
        """From 0 to 1."""
        return self.bytes / self.max_bytes if self.max_bytes > 0 else 0.0


class ApiError(FedtideError):
    """JetStream refused a call; `code` is its own error code."""

    def __init__(self, code: int, what: str) -> None:
        self.code = code
        super().__init__(what)


def api(domain: str | None) -> str:
    """The API prefix of a JetStream domain (None: of the server one is connected to)."""
    return "$JS.API" if domain is None else f"$JS.{domain}.API"


def parse_answer(data: bytes) -> dict[str, Any]:
    """The body of an API answer or publish acknowledgement.

    Raises:
        StaleWriter: an expected last sequence was not the last one.
        StoreFull: there is no room.
        BrokerUnavailable: JetStream cannot do it now (no leader).
        ApiError: it refuses, and would again.
    """
    answer: dict[str, Any] = json.loads(data)
    error = answer.get("error")
    if error is None:
        return answer
    code, text = int(error.get("err_code", 0)), str(error.get("description", "JetStream refused"))
    if code in (_WRONG_LAST_SEQUENCE, _WRONG_LAST_SEQUENCE_CONSTANT):
        raise StaleWriter(text, "Another coordinator leads; this one stops writing")
    if code in _NO_ROOM or (code == _NO_PEERS and "storage" in text):
        raise StoreFull(f"the broker's store is full: {text}", "See `fedtide storage`; `fedtide gc` makes room")
    if int(error.get("code", 0)) >= 500 or code == _INCOMPLETE_BATCH:
        raise BrokerUnavailable(f"JetStream: {text}", "Check the broker's disk and memory limits")
    raise ApiError(code, f"JetStream: {text}")


def pull_request() -> bytes:
    """The body of a long poll that the server fills as messages come."""
    expires, heartbeat = (int(s * _NANOSECONDS) for s in (_PULL_EXPIRES_S, PULL_HEARTBEAT_S))
    return json.dumps({"batch": PULL_BATCH, "expires": expires, "idle_heartbeat": heartbeat}).encode()


def consumer_request(stream: str, durable: str, pattern: str, start: int | None) -> bytes:
    """The body that creates a durable consumer; `start` is the first sequence it delivers (None: all)."""
    config = {
        "durable_name": durable,
        "filter_subject": pattern,
        "ack_policy": "explicit",
        "ack_wait": _ACK_WAIT_S * _NANOSECONDS,
        "max_ack_pending": _UNLIMITED,
        "deliver_policy": "all",
    }
    if start is not None:
        config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    return json.dumps({"stream_name": stream, "config": config}).encode()

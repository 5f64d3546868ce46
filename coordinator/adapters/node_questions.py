"""Questions to one node over the broker: inference requests, and questions about its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel

from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.fleet.fleet import Node
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, NotFound, TransientError
from fedtide.fabric.ids import check_token
from fedtide.fabric.messages.logs import LogPage, LogQuestion
from fedtide.fabric.messages.requests import SamplesQuestion
from fedtide.fabric.messages.views import Problem
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import ALL_MODELS, Subjects

V = TypeVar("V", bound=BaseModel)

STATUS, VERSION, LENGTH = "Status", "Model-Version", "Inference-Header-Content-Length"


class NodeSilent(TransientError):
    """A node did not answer in time."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The node's answer; `header_length` is the length of the JSON part, if binary tensors follow it."""

    body: bytes
    status: int
    header_length: str


class NodeQuestions:
    """Asks through the region's leaf, so it works wherever tasks reach the node."""

    def __init__(self, broker: Broker, subjects: Subjects, director: Director) -> None:
        self._broker = broker
        self._subjects = subjects
        self._director = director

    async def infer(
        self, node: Node, model: str, body: bytes, header_length: str, version: str, timeout_s: float
    ) -> Inferred:
        """One request of the Open Inference Protocol.

        Raises:
            NodeSilent: no answer within `timeout_s`.
            ConfigError: `model` is not a valid name.
        """
        subject = self._subjects.infer(node.region, node.name, check_token("model", model))
        headers = {name: value for name, value in ((LENGTH, header_length), (VERSION, version)) if value}
        found = await self._ask(subject, body, headers, node, timeout_s)
        status = found.headers.get(STATUS, "200")
        return Inferred(found.data, int(status) if status in _STATUSES else 502, found.headers.get(LENGTH, ""))

    async def samples(self, node: Node, model: str, asked: SamplesQuestion, kind: type[V], timeout_s: float) -> V:
        """Ask a node about its samples.

        Raises:
            NodeSilent: no answer within `timeout_s`.
            ConfigError: the node refuses the question.
            MalformedMessage: the node's answer does not decode.
        """
        name = model if model == ALL_MODELS else check_token("model", model)
        return await self._told(self._subjects.samples(node.region, node.name, name), asked, kind, node, timeout_s)

    async def logs(self, node: Node, run: str, asked: LogQuestion, timeout_s: float) -> LogPage:
        """Ask a node what an app has printed there.

        Raises:
            NodeSilent: no answer within `timeout_s`.
            ConfigError: the node refuses the question.
            MalformedMessage: the node's answer does not decode.
        """
        return await self._told(self._subjects.logs(node.region, node.name, run), asked, LogPage, node, timeout_s)

    async def _told(self, subject: str, asked: BaseModel, kind: type[V], node: Node, timeout_s: float) -> V:
        found = await self._ask(subject, to_json(asked), {}, node, timeout_s)
        if STATUS in found.headers:
            refused = from_json(Problem, found.data, f"answer of {node.name}")
            raise ConfigError(node.name, refused.detail, refused.remedy)
        return from_json(kind, found.data, f"answer of {node.name}")

    async def _ask(self, subject: str, body: bytes, headers: dict[str, str], node: Node, timeout_s: float) -> Received:
        if not node.online:
            raise NotFound(f"node {node.name} is offline: {node.reason}", "See `fedtide fleet ls`")
        try:
            signed = self._director.at_headers(subject, body)
            return await self._broker.ask_with_headers(subject, body, {**headers, **signed}, timeout_s=timeout_s)
        except BrokerUnavailable as exc:
            raise NodeSilent(
                f"node {node.name} did not answer within {timeout_s:g} s", "It may be busy, frozen or cut off"
            ) from exc


_STATUSES = {"200", "400", "404", "413", "429", "500"}

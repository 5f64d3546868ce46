"""Inference over NATS request and reply: the protocol's bodies, on a subject a model.

The body's JSON length, if binary tensors follow, is the header of the same name as over HTTP; an
error answers `{"error": ...}` with the header `Status`, the HTTP status that says the same.
"""

from __future__ import annotations

import json
import logging

from edge_agent.inference_server import answer, status_of
from edge_agent.protocol import HEADER_LENGTH
from edge_agent.serving import Serving
from fabric.broker import Broker
from fabric.errors import NotFound, RemoteError, TransientError
from fabric.jetstream import Received
from fabric.subjects import Subjects, last_token

log = logging.getLogger(__name__)


class NatsInference:
    """Answers on `infer.<region>.<node>.<model>`; requests run beside each other."""

    def __init__(self, broker: Broker, serving: Serving) -> None:
        self._broker = broker
        self._serving = serving

    async def listen(self, subjects: Subjects, region: str, node: str) -> None:
        await self._broker.answer(subjects.infer(region, node, "*"), self._answer)

    async def _answer(self, message: Received) -> tuple[bytes, dict[str, str]]:
        model, length = last_token(message.subject), message.headers.get(HEADER_LENGTH)
        try:
            body, json_length = await answer(self._serving, model, None, message.data, length)
        except (RemoteError, NotFound, TransientError) as exc:
            return json.dumps({"error": str(exc)}).encode(), {"Status": str(status_of(exc))}
        return body, {} if json_length is None else {HEADER_LENGTH: str(json_length)}

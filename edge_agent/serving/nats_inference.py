"""Inference over NATS request and reply: the protocol's bodies, one subject per model.

If binary tensors follow, the JSON length is in the same header as over HTTP. An error is answered by
`{"error": ...}`, with the corresponding HTTP status in the header `Status`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from fedtide.edge_agent.serving.inference_server import answer, status_of
from fedtide.edge_agent.serving.protocol import HEADER_LENGTH
from fedtide.edge_agent.serving.serving import Serving
from fedtide.fabric.errors import NotFound, RemoteError, TransientError
from fedtide.fabric.nats.broker import Answerer, Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import Question, Subjects, parse_as

log = logging.getLogger(__name__)


VERSION = "Model-Version"
"""Header of a request: the version to use, if not the active one."""
MAX_ANSWER_BYTES = 7 * 1024 * 1024


def _refusal(status: int, reason: str) -> tuple[bytes, dict[str, str]]:
    return json.dumps({"error": reason}).encode(), {"Status": str(status)}


class NatsInference:
    """Answers on `infer.<region>.<node>.<model>`; requests run concurrently."""

    def __init__(self, broker: Broker, serving: Serving) -> None:
        self._broker = broker
        self._serving = serving

    async def listen(self, subjects: Subjects, region: str, node: str, guarded: Callable[[Answerer], Answerer]) -> None:
        await self._broker.answer(subjects.infer(region, node, "*"), guarded(self._answer))

    async def _answer(self, message: Received) -> tuple[bytes, dict[str, str]]:
        model, length = parse_as(Question, message.subject).about, message.headers.get(HEADER_LENGTH)
        try:
            version = message.headers.get(VERSION)
            body, json_length = await answer(self._serving, model, version, message.data, length)
        except (RemoteError, NotFound, TransientError) as exc:
            return _refusal(status_of(exc), str(exc))
        except Exception as exc:  # the client must always get an answer
            log.exception("inference.failed")
            return _refusal(500, f"{type(exc).__name__}: {exc}")
        if len(body) > MAX_ANSWER_BYTES:
            return _refusal(413, f"the answer has {len(body)} bytes, more than a message holds; ask over HTTP")
        return body, {} if json_length is None else {HEADER_LENGTH: str(json_length)}

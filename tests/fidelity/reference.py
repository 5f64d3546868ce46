"""Runs an app on flwr's own loop, with a grid in this process; all messages pass through Flower's protobuf.

    python -m tests.fidelity.reference APP_DIR NODE... < one JSON run config a line

writes a line for each: `trace.json` of the app, or of an app that leaves none its last result: the SHA-256 of each
array, and the metrics of every round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtide.fabric.flower.apps import describe
from fedtide.fabric.ids import flower_int

RUN = 17


class InProcessGrid(Grid):
    """Nodes are called one after the other, in the order of their ids."""

    def __init__(self, app: ClientApp, nodes: list[str], run_config: dict[str, Any]) -> None:
        self._app = app
        self._contexts = {
            flower_int(name): Context(
                run_id=RUN,
                node_id=flower_int(name),
                node_config={"partition-id": number, "num-partitions": len(nodes)},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number, name in enumerate(nodes)
        }
        self._there: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(RUN)

    def create_message(
        self, content: RecordDict, message_type: str, dst: int, group_id: str, ttl: Any = None
    ) -> Message:
        return Message(content, dst, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            key = f"m{self._sent}"
            message.metadata.__dict__["_message_id"] = key
            ids.append(key)
            self._there[key] = _passed(self._answer(_passed(message)))
        return ids

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        TaskIdentity.node_id = node
        context = self._contexts[node]
        before = context.state
        try:
            context.state = RecordDict(dict(before))
            return self._app(message, context)
        except Exception as exc:  # as Flower's SuperNode does
            context.state = before
            reason = f"{type(exc).__name__}: {exc}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        finally:
            TaskIdentity.node_id = SUPERLINK_NODE_ID

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._there.pop(key) for key in message_ids if key in self._there]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(self.pull_messages(list(self.push_messages(messages))))
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def _passed(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))


def shown(arrays: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each array, with its dtype and shape."""
    return {
        name: f"{a.dtype}{a.shape} {hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()}"
        for name, a in arrays.items()
    }


def _shown(result: Result) -> dict[str, Any]:
    histories = {
        "": result.evaluate_metrics_serverapp,
        "eval_": result.evaluate_metrics_clientapp,
        "train_": result.train_metrics_clientapp,
    }
    metrics: dict[int, dict[str, Any]] = {}
    for prefix, history in histories.items():
        for number, found in history.items():
            metrics.setdefault(number, {}).update({f"{prefix}{k}": v for k, v in found.items()})
    return {"arrays": shown({k: a.numpy() for k, a in result.arrays.items()}), "metrics": metrics}


def _remembered(results: list[Result]) -> None:
    """Keep what strategies come to; nothing else of them changes."""
    original = Strategy.start

    def start(self: Strategy, *args: Any, **kwargs: Any) -> Result:
        results.append(original(self, *args, **kwargs))
        return results[-1]

    Strategy.start = start


def main() -> None:
    results: list[Result] = []
    _remembered(results)
    directory, nodes = Path(sys.argv[1]).resolve(), sys.argv[2:]
    logging.getLogger("flwr").setLevel(logging.ERROR)
    described = describe(directory)
    sys.path.insert(0, str(directory))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    server, client = (
        load_app(described.serverapp, ValueError, directory),
        load_app(described.clientapp, ValueError, directory),
    )
    assert isinstance(server, ServerApp) and isinstance(client, ClientApp)
    for line in sys.stdin:
        config = {**described.config, **json.loads(line)}
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            context = Context(RUN, SUPERLINK_NODE_ID, {}, RecordDict(), config)
            try:
                server(grid=InProcessGrid(client, nodes, config), context=context)
            except Exception as exc:
                logging.getLogger(__name__).warning("%s: %s", type(exc).__name__, exc)
            left = Path("trace.json")
            print(json.dumps(json.loads(left.read_text()) if left.exists() else _shown(results[-1])), flush=True)


if __name__ == "__main__":
    main()

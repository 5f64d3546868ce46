"""The trainer process: runs a Flower ClientApp, one job a line, in files.

Reads `Job` lines from stdin and answers one JSON line each. The answer itself is
`message.json` (a WireMessage) and one file a blob, named by its digest, in the job's folder.
This is the only part of an agent that loads flwr and what the app imports.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from edge_agent.compression import CompressionMod
from edge_agent.disk import is_full
from edge_agent.outbox import STATE
from edge_agent.trainer import Job
from fabric import flower, logs
from fabric.apps import describe
from fabric.blobs import chunked, manifest_of
from fabric.codecs import is_coded
from fabric.errors import ConfigError
from fabric.tensors import Buffer, frame_size
from fabric.transfer import map_file
from fabric.wire import INLINE_BYTES, Arrays, Task

log = logging.getLogger(__name__)


def main() -> int:
    requests, answers = sys.stdin.buffer, _private_stdout()
    logs.to_stderr()
    apps: dict[Path, ClientApp] = {}
    for line in requests:
        answer: dict[str, object] = {"done": True}
        try:
            _do(Job.model_validate_json(line), apps)
        except OSError as exc:
            if not is_full(exc):
                raise
            answer = {"done": False, "reason": str(exc)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
    return 0


def _private_stdout() -> BinaryIO:
    # Apps print: what they print must not reach the agent as an answer.
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def _do(job: Job, apps: dict[Path, ClientApp]) -> None:
    task = Task.model_validate_json(job.task_file.read_bytes())
    flower.adopt_identity(task.message.run_id, job.node_id)
    message = flower.from_wire(task.message, {d: map_file(p) for d, p in job.blobs.items()})
    try:
        state = flower.load_state(job.state_file.read_bytes()) if job.state_file.exists() else RecordDict()
        context = flower.context_of(task.message.run_id, job.node_id, job.node_config, task.run_config, state)
        app = apps.get(job.app_dir) or apps.setdefault(job.app_dir, _load(job.app_dir))
        mod = CompressionMod(task.codec) if task.codec else None
        reply = mod(message, context, app) if mod is not None else app(message, context)
        # The state changes with the answer: it becomes the run's once the answer is safe (edge_agent.outbox).
        (job.out_dir / STATE).write_bytes(flower.dump_state(context.state))
        _write_reply(job.out_dir, reply)
        return
    except (flower.AppLoadError, ConfigError) as exc:
        log.exception("app.load_failed")
        reply = Message(Error(flower.ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(exc)), reply_to=message)
    except Exception as exc:  # a ClientApp may raise anything: it becomes an error reply, as in Flower
        if is_full(exc):
            raise
        log.exception("app.raised")
        reason = f"{type(exc).__name__}: {exc}"
        reply = Message(Error(flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    _write_reply(job.out_dir, reply)


def _load(app_dir: Path) -> ClientApp:
    reference = describe(app_dir).clientapp
    app: Any = flower.load_component(reference, app_dir)
    if not isinstance(app, ClientApp):
        raise ConfigError(reference, "is not a flwr ClientApp")
    return app


def _write_reply(out_dir: Path, reply: Message) -> None:
    arrays: dict[str, Arrays] = {}
    if reply.has_content():
        for name in flower.framed(reply.content):
            record = reply.content[name]
            arrays[name] = _write_frame(out_dir, flower.frame_of(record), coded=_is_coded(record))
    (out_dir / "message.json").write_text(flower.to_wire(reply, arrays).model_dump_json())


def _is_coded(record: object) -> bool:
    return isinstance(record, ArrayRecord) and is_coded(flower.tensors_of(record))


def _write_frame(out_dir: Path, frame: list[Buffer], *, coded: bool) -> Arrays:
    if frame_size(frame) <= INLINE_BYTES:
        return Arrays(inline=b"".join(frame), coded=coded)
    ref = manifest_of(list(chunked(frame))).ref
    with (out_dir / ref.digest).open("wb") as file:
        file.writelines(frame)
    return Arrays(blob=ref, coded=coded)


if __name__ == "__main__":
    sys.exit(main())

"""The trainer process: runs a Flower ClientApp, one job a line, in files.

Reads `Job` lines from stdin and answers one JSON line each. The answer itself is
`message.json` (a WireMessage) and one file a blob, named by its digest, in the job's folder.
This is the only part of an agent that loads flwr and what the app imports.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtide.edge_agent.training.compression import CompressionMod
from fedtide.edge_agent.training.job import STATE, Job
from fedtide.edge_agent.training.job_loop import serve, write_frame, write_message
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.flower.app_errors import place_of, told
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.flower.working_dir import enter
from fedtide.fabric.messages.tasks import Arrays, Task
from fedtide.fabric.process.files import is_full, map_file
from fedtide.fabric.tensors.codecs import is_coded

log = logging.getLogger(__name__)


def main() -> int:
    apps: dict[Path, ClientApp] = {}
    return serve(lambda job: _do(job, apps))


def _do(job: Job, apps: dict[Path, ClientApp]) -> None:
    task = from_json(Task, job.task_file.read_bytes(), "task")
    flower.adopt_identity(task.message.run_id, job.node_id)
    message = flower.from_wire(task.message, {d: map_file(p) for d, p in job.blobs.items()})
    try:
        enter(job.work_dir, job.app_dir)
        state = _state(job.state_file)
        context = flower.context_of(task.message.run_id, job.node_id, job.node_config, task.run_config, state)
        app = apps.get(job.app_dir) or apps.setdefault(job.app_dir, _load(job.app_dir))
        mod = CompressionMod(task.codec) if task.codec else None
        reply = mod(message, context, app) if mod is not None else app(message, context)
        _write_reply(job.out_dir, _checked(reply, message, app, job.app_dir))
        # The new state is part of the reply: it becomes the run's state once the reply is stored (tasks.outbox).
        (job.out_dir / STATE).write_bytes(flower.dump_state(context.state))
        return
    except (flower.AppLoadError, ConfigError) as exc:
        log.exception("app.load_failed")
        reply = Message(Error(flower.ErrorCode.LOAD_CLIENT_APP_EXCEPTION, str(exc)), reply_to=message)
    except Exception as exc:  # a ClientApp may raise anything: it becomes an error reply, as in Flower
        if is_full(exc):
            raise
        log.exception("app.raised")
        reason = told(exc, job.app_dir)
        reply = Message(Error(flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    _write_reply(job.out_dir, reply)


def _checked(reply: object, asked: Message, app: ClientApp, app_dir: Path) -> Message:
    """Raises TypeError if an app returned something else than a message."""
    if isinstance(reply, Message):
        return reply
    kind = asked.metadata.message_type
    registered = getattr(app, "_registered_funcs", {})  # Flower has no public way to it
    place = place_of(registered.get(kind if "." in kind else f"{kind}.default"), app_dir)
    raise TypeError(f"the app's function for {kind!r}{place} returned {_kind(reply)}, expected a flwr Message")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _state(file: Path) -> RecordDict:
    try:
        return flower.load_state(file.read_bytes())
    except FileNotFoundError:
        return RecordDict()
    except MalformedMessage:
        log.warning("app.state_of_another_runtime")  # written by the bundle trainer: start empty
        return RecordDict()


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
            arrays[name] = write_frame(out_dir, flower.frame_of(record), coded=_is_coded(record))
    write_message(out_dir, flower.to_wire(reply, arrays))


def _is_coded(record: object) -> bool:
    return isinstance(record, ArrayRecord) and is_coded(flower.tensors_of(record))


if __name__ == "__main__":
    sys.exit(main())

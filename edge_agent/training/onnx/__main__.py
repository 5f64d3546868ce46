"""The trainer process of nodes without torch: does tasks from an app's training bundle, a job a line (see job_loop)."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from fedtide.edge_agent.training.job import STATE, Job
from fedtide.edge_agent.training.job_loop import serve, write_frame, write_message
from fedtide.edge_agent.training.onnx.batches import Batches, open_source
from fedtide.edge_agent.training.onnx.task import TaskContext, content, perform
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import FedtideError, MalformedMessage
from fedtide.fabric.flower.app_objects import AppLoadError
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.messages.tasks import Task, WireError
from fedtide.fabric.process.files import is_full
from fedtide.fabric.tensors import training_bundle
from fedtide.fabric.tensors.codecs import is_coded
from fedtide.fabric.tensors.frame import Tensor, decode, encode
from fedtide.fabric.tensors.training_bundle import TRAINING, TrainingBundle

log = logging.getLogger(__name__)

_LOAD_FAILED, _APP_RAISED = 1, 2
"""Flower's ErrorCode: the client app cannot be loaded, or raised."""


def main() -> int:
    bundles: dict[Path, TrainingBundle] = {}
    return serve(lambda job: _do(job, bundles))


def _do(job: Job, bundles: dict[Path, TrainingBundle]) -> None:
    task = from_json(Task, job.task_file.read_bytes(), "task")
    try:
        bundle = bundles.get(job.app_dir) or bundles.setdefault(job.app_dir, _read(job.app_dir))
        model = describe(job.app_dir).model
        source = open_source(job.app_dir, bundle.manifest.data, model, job.node_config, task.run_config)
        context = TaskContext(
            bundle=bundle,
            batches=Batches(source, bundle.manifest),
            blobs=job.blobs,
            state=_state(job.state_file),
            node_id=job.node_id,
            threads=job.threads,
            progress=job.progress_file,
            checkpoint_s=job.checkpoint_s,
        )
        answer = perform(task, context)
    except (FedtideError, MemoryError) as exc:
        log.exception("training.refused")
        code = _LOAD_FAILED if isinstance(exc, AppLoadError | MalformedMessage) else _APP_RAISED
        reason = str(exc) or "there is not enough memory (limits.memory_bytes)"
        _write_error(job, task, code, f"{type(exc).__name__}: {reason}")
        return
    except Exception as exc:  # ONNX Runtime and a user's data source raise anything: it becomes an error reply
        if is_full(exc):
            raise
        log.exception("training.raised")
        _write_error(job, task, _APP_RAISED, f"{type(exc).__name__}: {exc}")
        return
    if answer.state:
        with (job.out_dir / STATE).open("wb") as file:
            file.writelines(encode(answer.state.values()))
    arrays = {
        name: write_frame(job.out_dir, encode(tensors), coded=is_coded(tensors))
        for name, tensors in answer.records.items()
    }
    write_message(job.out_dir, task.message.reply(time.time(), content=content(answer, arrays)))


def _read(app_dir: Path) -> TrainingBundle:
    return training_bundle.read((app_dir / TRAINING).read_bytes())


def _state(file: Path) -> dict[str, Tensor]:
    try:
        return {t.name: t for t in decode(file.read_bytes())}
    except FileNotFoundError:
        return {}
    except MalformedMessage:
        log.warning("training.state_of_another_runtime")  # written by the flwr trainer: start empty
        return {}


def _write_error(job: Job, task: Task, code: int, reason: str) -> None:
    write_message(job.out_dir, task.message.reply(time.time(), error=WireError(code=code, reason=reason)))


if __name__ == "__main__":
    sys.exit(main())

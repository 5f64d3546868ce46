"""Tasks for a trainer process, as an agent hands them over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtide.edge_agent.tasks.trainer import THREAD_VARIABLES
from fedtide.edge_agent.training.job import Job
from fedtide.fabric.messages.tasks import Arrays, Task, Values, WireMessage
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.frame import Tensor, encode


def message(kind: str, arrays: Mapping[str, Tensor], config: ConfigValues) -> WireMessage:
    frame = b"".join(encode(arrays.values()))
    values = Values(kind="config", values=dict(config))
    return WireMessage(
        run_id=1,
        message_id="m1",
        src_node_id=1,
        dst_node_id=2,
        created_at=time.time(),
        ttl=3600.0,
        message_type=kind,
        content={"arrays": Arrays(inline=frame), "config": values},
    )


def job(folder: Path, app: Path, task: Task, node: ConfigValues, checkpoint_s: float = 0.0) -> Job:
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "task.json").write_text(task.model_dump_json())
    return Job(
        run="run-1",
        log_file=folder / "log",
        task_file=out / "task.json",
        blobs={},
        app_dir=app,
        work_dir=folder / "work",
        state_file=folder / "state",
        progress_file=folder / "progress",
        out_dir=out,
        node_id=2,
        node_config=node,
        checkpoint_s=checkpoint_s,
        threads=1,
    )


def task(message: WireMessage, run_config: ConfigValues, codec: str = "") -> Task:
    app = AppRef(name="app", bundle=BlobRef(digest="0" * 64, size_bytes=1))
    return Task(
        task="t1",
        run="run-1",
        app=app,
        run_config=run_config,
        message=message,
        expires_at=time.time() + 3600,
        codec=codec,
    )


class TrainerProcess:
    """A trainer of its own, driven by lines; `path` goes before everything that is installed."""

    def __init__(self, module: str, path: Path | None = None) -> None:
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")}
        environment["PYTHONPATH"] = os.pathsep.join([str(p) for p in (path, Path.cwd()) if p])
        command = [sys.executable, "-m", module]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def send(self, job: Job) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(job.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def do(self, job: Job) -> WireMessage:
        self.send(job)
        assert self.process.stdout is not None
        answer: Any = json.loads(self.process.stdout.readline())
        assert answer["done"], answer
        return WireMessage.model_validate_json((job.out_dir / "message.json").read_bytes())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

"""The trainer's parent and its children, with jobs that an app could do: real processes, real pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtide.fabric.process.pid_file import is_alive

PARENT = """
import os, subprocess, sys
from contextlib import suppress
from pathlib import Path
from fedtide.edge_agent.training.job_loop import serve

def do(job):
    with suppress(OSError):  # it has no output any more
        print("working for", job.run, flush=True)
    if job.run == "mute":
        os.closerange(1, 3)
    if job.run == "leaves":
        pid = subprocess.Popen(["sleep", "1000"]).pid
        (job.out_dir / "pid").write_text(str(pid))
    if job.run == "dies":
        os._exit(7)

sys.exit(serve(do))
"""


@contextmanager
def _parent(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        yield process  # its end closes the input, which ends it


def _do(process: subprocess.Popen[bytes], folder: Path, run: str) -> dict[str, object]:
    out = folder / f"{run}-out"
    out.mkdir(exist_ok=True)
    places = dict.fromkeys(("task_file", "app_dir", "work_dir", "state_file", "progress_file"), str(folder))
    job = {**places, "run": run, "log_file": str(folder / f"{run}.jsonl"), "out_dir": str(out), "blobs": {}}
    job |= {"node_id": 1, "node_config": {}, "checkpoint_s": 1.0, "threads": 1}
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    found: dict[str, object] = json.loads(answer) if answer else {}
    return found


@pytest.mark.parametrize("run", ["plain", "mute"])
def test_a_job_is_answered_whatever_the_app_does_to_its_output(tmp_path: Path, run: str) -> None:
    with _parent(tmp_path) as parent:
        for _ in range(2):
            assert _do(parent, tmp_path, run) == {"done": True}
        assert _do(parent, tmp_path, "other") == {"done": True}
    assert f"working for {run}" in (tmp_path / f"{run}.jsonl").read_text()


def test_what_an_app_leaves_running_ends_with_its_task(tmp_path: Path) -> None:
    with _parent(tmp_path) as parent:
        _do(parent, tmp_path, "leaves")
        assert not is_alive(int((tmp_path / "leaves-out" / "pid").read_text()))
        assert _do(parent, tmp_path, "leaves") == {"done": True}, "it goes on"


def test_a_child_that_dies_ends_its_parent_in_the_same_way(tmp_path: Path) -> None:
    with _parent(tmp_path) as parent:
        assert _do(parent, tmp_path, "dies") == {}
        assert parent.wait(30) == 7

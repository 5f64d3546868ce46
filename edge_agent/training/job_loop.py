"""The main loop of a trainer process: reads `Job` lines from stdin, and writes one JSON line for each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fedtide.edge_agent.training.job import Job
from fedtide.fabric import logs
from fedtide.fabric.encoding import to_json
from fedtide.fabric.messages.tasks import INLINE_BYTES, Arrays, WireMessage
from fedtide.fabric.process.files import is_full
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.tensors.frame import Buffer, frame_size


def serve(do: Callable[[Job], None]) -> int:
    """Do jobs until stdin ends. `do` leaves the answer in the job's folder; a full disk is reported, not raised."""
    requests, answers = sys.stdin.buffer, _private_stdout()
    logs.to_stderr()
    for line in requests:
        answer: dict[str, object] = {"done": True}
        try:
            do(Job.model_validate_json(line))
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


def write_message(out_dir: Path, message: WireMessage) -> None:
    (out_dir / "message.json").write_bytes(to_json(message))


def write_frame(out_dir: Path, frame: list[Buffer], *, coded: bool) -> Arrays:
    """A record's frame: inside the message if it is small, else a file named by its digest."""
    if frame_size(frame) <= INLINE_BYTES:
        return Arrays(inline=b"".join(frame), coded=coded)
    ref = manifest_of(list(chunked(frame))).ref
    with (out_dir / ref.digest).open("wb") as file:
        file.writelines(frame)
    return Arrays(blob=ref, coded=coded)

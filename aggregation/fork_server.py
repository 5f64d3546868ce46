"""A process with all libraries loaded that forks one aggregator for each run: importing Flower takes seconds.

It takes requests as lines of JSON on standard input and tells what it did on standard output:

    {"config": FILE, "note": PID_FILE, "attempt": N}  ->  {"config": FILE, "pid": P}, {"pid": P, "code": C, "cpu_us": T}

It ends at the end of its input; what it has forked goes on. While it has nothing to do it holds one fork ready, which
has paid for what a fork's first steps cost (copied pages), and which ends with it.

Nothing that starts threads may be loaded in it (numpy's survive a fork; those of ONNX Runtime and torch do not), and a
fork must leave by `os._exit`: exit handlers of libraries would wait for threads that it does not have.
"""

from __future__ import annotations

import gc
import json
import os
import select
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from fedtide.aggregation.rehearsal import rehearse
from fedtide.fabric.packages.requirements import unmet
from fedtide.fabric.process import pid_file

_INPUT, _OUTPUT = 0, 1
_PIECE = 65_536
_QUIET_S = 1.0
"""Nothing is forked ahead before there was no request for so long: an aggregator that starts needs the cores."""


def config_of_this_fork() -> Path | None:
    """Serve requests. Returns in each fork the configuration of its run; in the server None, at the end of input."""
    unmet(["numpy"])  # what finds packages keeps what it has seen
    gc.freeze()  # the collector does not touch, and so does not copy, what all forks share
    running: dict[int, int] = {}
    spare: _Spare | None = None
    unread = b""
    while True:
        ready = select.select([_INPUT, *running], [], [], None if spare else _QUIET_S)[0]
        if not ready:
            spare = _Spare()
            if spare.request is not None:
                return _as_aggregator(spare.request, running)
        for handle in ready:
            if handle in running:
                _tell_end(handle, running.pop(handle))
                continue
            piece = os.read(_INPUT, _PIECE)
            if not piece:
                return None
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                if _is_closed():
                    return None  # whoever asked is gone, and its successor has given these attempts up
                request = json.loads(line)
                pid = (spare and spare.hand(line)) or os.fork()
                spare = None
                if pid == 0:
                    return _as_aggregator(request, running)
                running[os.pidfd_open(pid)] = pid
                _tell(config=request["config"], pid=pid)


class _Spare:
    """A fork that waits for its request. In the server `request` is None; in the fork the constructor ends with one."""

    request: dict[str, Any] | None = None

    def __init__(self) -> None:
        source, self._target = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(source)
            return
        os.close(self._target)
        try:
            rehearse()
        except Exception:  # a full disk, a long TMPDIR: the fork is slower then, and as good
            traceback.print_exc()
        try:
            with os.fdopen(source, "rb") as requests:
                line = requests.readline()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        if not line:
            os._exit(0)  # the server has ended
        self.request = json.loads(line)

    def hand(self, line: bytes) -> int | None:
        """The PID of the fork, which starts with this request; None if it has ended."""
        try:
            os.write(self._target, line + b"\n")
        except BrokenPipeError:
            os.waitpid(self._pid, 0)
            return None
        finally:
            os.close(self._target)
        return self._pid


def _is_closed() -> bool:
    poll = select.poll()
    poll.register(_INPUT, select.POLLHUP)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _tell(**what: Any) -> None:
    os.write(_OUTPUT, json.dumps(what).encode() + b"\n")


def _tell_end(handle: int, pid: int) -> None:
    os.close(handle)
    _, status, used = os.wait4(pid, 0)
    _tell(pid=pid, code=os.waitstatus_to_exitcode(status), cpu_us=round(1e6 * (used.ru_utime + used.ru_stime)))


def _as_aggregator(request: dict[str, Any], of_others: dict[int, int]) -> Path:
    """Become a process of its own: session, files, random numbers, and the note by which a coordinator finds it."""
    os.setsid()
    config = Path(request["config"])
    logfile = os.open(config.parent / "aggregator.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (logfile, 1), (logfile, 2)):
        os.dup2(source, target)
    for handle in (nothing, logfile, *of_others):
        os.close(handle)
    if not pid_file.claim(Path(request["note"]), int(request["attempt"])):
        os._exit(0)  # whoever asked is gone, and its successor has started this attempt, or given it up
    np.random.seed()  # an app that uses it must not get the same numbers as every other run
    return config

"""The trainer process: a parent that has the libraries loaded, and a child for each run, forked from it.

The parent imports nothing of an app, so no run sees what another has done to a module, and it believes nothing that a
child says. It hands jobs on to the child of their run, and its answers back; what the child prints goes into the run's
log. It has one such child at a time, and while it has nothing to do one that waits for the next run. A child whose app
has packages of its own becomes their interpreter once it has confined itself.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedtide.edge_agent.sandbox import forks
from fedtide.edge_agent.sandbox.confine import Confinement, enter
from fedtide.edge_agent.training.job import USUAL_PROCESSES, Job
from fedtide.fabric import logs
from fedtide.fabric.encoding import to_json
from fedtide.fabric.flower.app_log import AppLog, mark_records
from fedtide.fabric.messages.tasks import INLINE_BYTES, Arrays, WireMessage
from fedtide.fabric.process.families import is_dead, is_still
from fedtide.fabric.process.files import is_full
from fedtide.fabric.process.metering import descendants
from fedtide.fabric.process.parent_death import adopt_orphans, die_with_parent
from fedtide.fabric.process.python import module_command
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.tensors.frame import Buffer, frame_size

log = logging.getLogger(__name__)

Do = Callable[[Job], None]
LOADED_ONCE = ("torch", "sklearn", "scipy", "pandas", "xgboost", "lightgbm")
"""Libraries that take long to load, and start no thread by it: the parent loads them too once an app has used them."""
IDLE_S = 0.2
LONGEST_ANSWER, LONGEST_REASON = 65_536, 500
CONTINUES = "--continues"
_READ = 65_536


def serve(do: Do) -> int:
    """Do jobs until stdin ends, each in the child of its run.

    `do` leaves the answer in the job's folder; a full disk is reported, not raised. A child that dies ends this process
    in the same way.
    """
    if sys.argv[1:2] == [CONTINUES]:
        job, answers = map(int, sys.argv[2:])
        with open(job, "rb") as first:
            _be_child(do, answers, None, first.read())
    logs.to_stderr()
    adopt_orphans()
    return _Parent(do, answers=os.dup(1)).run()


@dataclass
class _Child:
    """`run` is empty for one that waits for a run."""

    pid: int
    jobs: int
    answers: int
    output: int
    run: str = ""
    log: AppLog | None = None
    task: str = ""
    control: socket.socket | None = None
    """Through which it hands over the listener of its forks."""
    listener: int | None = None
    processes: int = 0
    """How many it may have at a time."""
    is_mute: bool = False
    """It has closed its output."""

    @property
    def watched(self) -> list[int]:
        found = [self.answers] if self.is_mute else [self.answers, self.output]
        if self.listener is not None:
            return [*found, self.listener]
        return [*found, self.control.fileno()] if self.control is not None else found

    def answer_forks(self, ready: list[int]) -> None:
        """Take the listener, or answer what it asks."""
        if self.control is not None and self.control.fileno() in ready:
            self.listener = forks.taken(self.control)
            self.control.close()
            self.control = None
        elif self.listener is not None and self.listener in ready and not forks.decide(self.listener, self.may_fork):
            os.close(self.listener)
            self.listener = None

    def may_fork(self) -> bool:
        return sum(1 for _ in descendants(self.pid)) < self.processes

    def close(self) -> None:
        for number in (self.jobs, self.answers, self.output, *([self.listener] if self.listener is not None else [])):
            os.close(number)
        if self.control is not None:
            self.control.close()

    def begin(self, run: str, log_file: Path) -> None:
        self.run, self.log = run, AppLog(log_file)


class _Parent:
    def __init__(self, do: Do, answers: int) -> None:
        self._do = do
        self._answers = answers
        self._child: _Child | None = None
        self._spare: _Child | None = None
        self._wanted: set[str] = set()
        self._loading: threading.Thread | None = None
        os.dup2(2, 1)  # nobody here may write into the answers
        # A child that stops or goes on says so: the kernel tells its parent, who is woken by it.
        self._woken, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> int:
        unread = b""
        while True:
            watched = [0, self._woken, *(self._child.watched if self._child is not None else [])]
            is_ready = self._spare is not None and not self._wanted
            ready, _, _ = select.select(watched, [], [], None if is_ready else IDLE_S)
            if self._woken in ready:
                os.read(self._woken, _READ)
                self._end_if_awake()
            if self._child is not None and self._child.output in ready:
                self._take_output(self._child)
            if self._child is not None:
                self._child.answer_forks(ready)
            if self._child is not None and self._child.answers in ready:
                self._end_like(self._child)  # it has nothing to answer: it is dead
            if 0 in ready:
                data = os.read(0, _READ)
                if not data:
                    _end(self._child)
                    _end(self._spare)
                    return 0
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    self._hand_on(line)
            elif not ready:
                self._prepare()

    def _end_if_awake(self) -> None:
        """Between tasks the child stands still; an app that has a timer wake it does what nobody asked for."""
        if self._child is not None and not is_still(self._child.pid):
            log.warning("trainer.woke_itself", extra={"run": self._child.run})
            _end(self._child)
            self._child = None

    def _prepare(self) -> None:
        """For the next run, while there is nothing to do: load a library that apps use, or fork its child.

        It is loaded beside: the run that goes on does not wait for it.
        """
        if self._loading is not None and self._loading.is_alive():
            return
        if self._wanted:
            _end(self._spare)
            self._spare = None
            self._loading = threading.Thread(target=_load, args=(self._wanted.pop(),), daemon=True)
            self._loading.start()
        else:
            self._spare = self._forked()

    def _hand_on(self, line: bytes) -> None:
        job = json.loads(line)  # its child validates it
        before = None
        if self._child is None or self._child.run != job["run"]:
            before, self._child = self._child, self._spare or self._forked()
            self._spare = None
            self._child.begin(job["run"], Path(job["log_file"]))
        child = self._child
        child.processes = job.get("processes", USUAL_PROCESSES)
        child.task = Path(job["out_dir"]).name
        os.kill(child.pid, signal.SIGCONT)
        with suppress(BrokenPipeError):  # it is dead: it has no answer
            os.write(child.jobs, line + b"\n")
        _end(before)
        found = _checked(self._answer_of(child))
        if found is None:
            self._end_like(child)
        while self._take_output(child, wait=False):
            pass
        # Threads of the app stand still until its next task, and what it has started ends.
        _stop(child.pid)
        self._end_strays()
        loaded = {*LOADED_ONCE}.intersection(found.pop("loaded"))
        self._wanted |= loaded - sys.modules.keys() if job.get("python") is None else set()
        os.write(self._answers, json.dumps(found).encode() + b"\n")

    def _answer_of(self, child: _Child) -> bytes:
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < LONGEST_ANSWER:
            ready, _, _ = select.select([self._woken, *child.watched], [], [])
            child.answer_forks(ready)
            if self._woken in ready:
                os.read(self._woken, _READ)
                if is_dead(child.pid) and child.answers not in ready:
                    return b""  # what it has started may still hold its end of the pipe
            if child.output in ready:
                self._take_output(child)
                continue
            if child.answers in ready:
                data = os.read(child.answers, _READ)
                if not data:
                    return b""
                answer += data
        return answer

    def _take_output(self, child: _Child, *, wait: bool = True) -> bool:
        """Whether there was any."""
        if child.is_mute or (not wait and not select.select([child.output], [], [], 0)[0]):
            return False
        data = os.read(child.output, _READ)
        child.is_mute = not data
        if child.log is not None:
            with suppress(OSError):  # a full disk: the app goes on without a log
                child.log.feed(data, child.task)
        return bool(data)

    def _forked(self) -> _Child:
        if self._loading is not None:
            self._loading.join()  # a fork while a module is half loaded would keep it so
        gc.freeze()  # what is shared stays shared
        (job_out, job_in), (answer_out, answer_in), (text_out, text_in) = os.pipe(), os.pipe(), os.pipe()
        control, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            others = [n for c in (self._child, self._spare) if c is not None for n in (c.jobs, *c.watched)]
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (job_in, answer_out, text_out, self._answers, self._woken, self._wakes, *others):
                os.close(number)
            control.close()
            os.dup2(job_out, 0)
            for number in (1, 2):
                os.dup2(text_in, number)
            _be_child(self._do, answer_in, theirs)
        theirs.close()
        for number in (job_out, answer_in, text_in):
            os.close(number)
        return _Child(pid, job_in, answer_out, text_out, control=control)

    def _end_strays(self) -> None:
        """End whatever an app has started, also what has got away from its family."""
        own = {each.pid for each in (self._child, self._spare) if each is not None}
        while strays := [pid for pid in descendants(os.getpid()) if pid not in own and not is_dead(pid)]:
            for pid in strays:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in strays:
                with suppress(ChildProcessError):  # it is the app's to bury
                    os.waitpid(pid, 0)

    def _end_like(self, child: _Child) -> NoReturn:
        """End as the child did: the agent sees one process. One that still lives has said what it must not."""
        while self._take_output(child, wait=False):
            pass
        os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self._end_strays()
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(os.waitstatus_to_exitcode(status) or 1)


def _stop(pid: int) -> None:
    """Stop a child, and wait until it has stopped; one that has itself continued may be awake again."""
    os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOHANG)  # what it was told for its task
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WEXITED | os.WNOWAIT)


def _end(child: _Child | None) -> None:
    """End a child that has nothing to do."""
    if child is None:
        return
    for pid in (child.pid, *descendants(child.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    child.close()


def _load(module: str) -> None:
    with suppress(Exception):
        importlib.import_module(module)


def _be_child(do: Do, answers: int, control: socket.socket | None, first: bytes = b"") -> NoReturn:
    """Never returns: what is of the parent must not be undone here.

    Args:
        control: None in the interpreter that a confined child has become, whose first job it had read.
    """
    code = 1
    try:
        die_with_parent()
        mark_records()
        for line in itertools.chain([first] if first else [], sys.stdin.buffer):
            answer: dict[str, object] = {"done": True}
            job = Job.model_validate_json(line)
            if control is not None:  # one child serves one run: that is done once
                if job.confinement is not None:
                    listener = enter(Confinement.model_validate_json(job.confinement))
                    if listener is not None:
                        forks.hand_over(listener, control)
                control.close()
                control = None
                if job.python is not None:
                    _become(job.python, line, answers)
            try:
                do(job)
            except OSError as exc:
                if not is_full(exc):
                    raise
                answer = {"done": False, "reason": str(exc)}
            with suppress(OSError):  # the app has closed it
                sys.stdout.flush()
            loaded = [name for name in LOADED_ONCE if name in sys.modules]
            os.write(answers, json.dumps({**answer, "loaded": loaded}).encode() + b"\n")
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        log.exception("trainer.failed")
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _become(python: Path, job: bytes, answers: int) -> NoReturn:
    """Be the same child in another interpreter, whose packages are the app's and nobody else's."""
    first = os.memfd_create("job", 0)
    os.write(first, job)
    os.lseek(first, 0, os.SEEK_SET)
    os.set_inheritable(answers, True)
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    command = module_command(spec.name, CONTINUES, str(first), str(answers), python=python)
    os.execv(python, command)


def _checked(answer: bytes) -> dict[str, Any] | None:
    """What a child says, in so far as it may; None: it is dead, or says something else."""
    try:
        told = json.loads(answer)
        done, reason, loaded = told["done"] is True, str(told.get("reason", "")), [*map(str, told["loaded"])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {"done": done, "loaded": loaded, **({} if done else {"reason": reason[:LONGEST_REASON]})}


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

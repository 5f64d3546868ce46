"""What this process and what it has started have used: CPU, memory over time, GPUs. Nothing runs between two readings.

CPU time is the kernel's account of ended children (getrusage(2)) and of those that still run (/proc/PID/stat, in steps
of 10 ms). Memory is taken to have changed evenly between two looks at it; what processes share is divided between them
(PSS, proc_pid_smaps(5)).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

LOOK_EVERY_S = 10.0
"""At most so often memory and GPUs are looked at: the kernel walks all pages, some milliseconds for torch's."""

_TICKS, _PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
Scope = Literal["self", "children", "both", "none"]


class Used(NamedTuple):
    """Between two marks. The fields are those of `fabric.messages.usage.Usage`."""

    cpu_us: int
    memory_kb_s: int
    gpu_us: int


class Meter:
    """Of this process, of all that it has started (ended or not), or of both."""

    def __init__(
        self,
        scope: Scope,
        also: Callable[[], Iterable[int]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`scope` none: only those of `also`. `also`: processes that count as well, but not what they have started."""
        self._scope = scope
        self._also = also
        self._clock = clock
        self._at, self._looked_at = clock(), float("-inf")
        self._cpu_us, self._memory_kb, self._gpus = 0, 0, 0

    def mark(self) -> Used:
        """What was used since the last mark; the first one gives all CPU time since the process started."""
        at = self._clock()
        pids, also = [*self._pids()], [*self._also()]
        cpu_us, memory_kb, gpus = self._cpu(pids) + sum(map(_own_cpu_us, also)), self._memory_kb, self._gpus
        if at - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = at
            memory_kb, gpus = sum(map(_memory_kb, [*pids, *also])), held_gpus(pids)
        seconds = at - self._at
        used = Used(
            cpu_us=max(cpu_us - self._cpu_us, 0),
            memory_kb_s=round(seconds * (memory_kb + self._memory_kb) / 2),
            gpu_us=round(1e6 * seconds * (gpus + self._gpus) / 2),
        )
        self._at, self._cpu_us, self._memory_kb, self._gpus = at, max(cpu_us, self._cpu_us), memory_kb, gpus
        return used

    def _pids(self) -> Iterator[int]:
        """Those that run now."""
        if self._scope in ("self", "both"):
            yield os.getpid()
        if self._scope in ("children", "both"):
            yield from descendants(os.getpid())

    def _cpu(self, pids: list[int]) -> int:
        own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        of_self = _us(own.ru_utime + own.ru_stime) if self._scope in ("self", "both") else 0
        of_ended = _us(ended.ru_utime + ended.ru_stime) if self._scope in ("children", "both") else 0
        return of_self + of_ended + sum(_cpu_us(pid) for pid in pids if pid != os.getpid())


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started and that still run, and what those have started.

    As Linux lists them for each thread: looking at all processes of the machine takes long.
    """
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, _read(f"/proc/{pid}/task/{thread}/children").split()):
                yield child
                yield from descendants(child)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if it is gone (proc_pid_statm(5)). It is told with every task."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if fields else 0


def held_gpus(pids: list[int]) -> int:
    """How many GPUs these processes hold, by NVIDIA's management library; 0 without `pip install nvidia-ml-py`."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        devices = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        working = [{p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(device)} for device in devices]
        return sum(not held.isdisjoint(pids) for held in working)
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()


def _memory_kb(pid: int) -> int:
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open() as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    except (OSError, ValueError):
        return 0


def _cpu_us(pid: int) -> int:
    return sum(_times_us(pid))


def _own_cpu_us(pid: int) -> int:
    return sum(_times_us(pid)[:2])


def _times_us(pid: int) -> list[int]:
    """utime, stime, cutime, cstime of proc_pid_stat(5); nothing if it is gone. It is read with every task."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:15]
    return [int(ticks) * 1_000_000 // _TICKS for ticks in fields]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _us(seconds: float) -> int:
    return round(1e6 * seconds)

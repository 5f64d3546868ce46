"""An app that tries what it must not: each attempt is a metric, 1 if it worked."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtide.edge_agent.samples.source import SAMPLES, CapturedSamples

app, server = ClientApp(), ServerApp()


def reads(path: Path) -> float:
    try:
        path.read_bytes()
    except OSError:
        return 0.0
    return 1.0


def lists(path: Path) -> float:
    try:
        return float(bool(os.listdir(path)))
    except OSError:
        return 0.0


def writes(path: Path) -> float:
    try:
        path.write_text("x")
    except OSError:
        return 0.0
    return 1.0


def others() -> list[int]:
    """Processes that are not this one or its own parent's."""
    mine = {os.getpid(), os.getppid(), 1}
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in mine]


def environment(pid: int) -> float:
    """Of a thread of the kernel it is empty, for everybody."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes()
        return float(bool(found))
    except OSError:
        return 0.0


def signals() -> float:
    for pid in others():
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return 1.0
    return 0.0


def traces() -> float:
    libc = ctypes.CDLL(None)
    for pid in [*others(), os.getppid()]:
        if libc.ptrace(16, pid, 0, 0) == 0:  # PTRACE_ATTACH
            return 1.0
    return 0.0


def connects(family: int, address: tuple[str, int]) -> float:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as there:
            there.connect(address)
            there.sendto(b"x", address)
    except OSError:
        return 0.0
    return 1.0


def look(data: Path, node: dict[str, str]) -> dict[str, float]:
    return {
        "credentials": reads(data / "identity.creds"),
        "token": reads(Path(node["hidden"])),
        "samples": reads(data / "samples.sqlite"),
        "other-state": reads(data / "runs" / "run-0.state") + lists(data / "runs"),
        "other-work": lists(data / "work" / "run-0"),
        "other-answers": lists(data / "outbox") + lists(data / "jobs" / "run-0"),
        "own-code": writes(Path(__file__)),
        "system": writes(Path("/usr/x")) + writes(Path(sys.prefix) / "x"),
        "environment": sum(environment(pid) for pid in [*others(), os.getppid()]),
        "secrets": float("FEDTIDE_JOIN_TOKEN" in os.environ),
        "signals": signals(),
        "traces": traces(),
        "ungranted": reads(Path(node["ungranted"])),
    }


def replaces(folder: Path) -> float:
    """Its folder of the answer, by a link to what the agent would then change."""
    try:
        folder.rename(folder.with_name("mine"))
        folder.symlink_to("/etc")
    except OSError:
        return 0.0
    return 1.0


def who(node: dict[str, str]) -> dict[str, float]:
    """Who it is, and what it is let by being that."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    regained = 0.0
    with contextlib.suppress(OSError):
        os.setuid(0)
        regained = 1.0
    return {
        "uid": float(os.geteuid()),
        "gid": float(os.getegid()),
        "groups": float(len(os.getgroups())),
        "capabilities": float(int(status["CapPrm"], 16)),
        "regained": regained,
        "roots-own": reads(Path(node["granted"]).with_name("roots-own")),
        "own-processes": float(Path(f"/proc/{os.getpid()}/environ").read_bytes() != b""),
        "shared-memory": writes(Path("/dev/shm/x")),
        "bounding": float(int(status["CapBnd"], 16)),
        "out": replaces(answer_of(Path(node["data"]))),
        "owner-of-output": float(Path("mine.txt").stat().st_uid if writes(Path("mine.txt")) else 0),
    }


def allowed(node: dict[str, str]) -> dict[str, float]:
    with tempfile.NamedTemporaryFile("w") as scratch:
        scratch.write("x")
    return {
        "work": writes(Path("mine.txt")),
        "home": writes(Path.home() / "kept.txt"),
        "granted": reads(Path(node["granted"])),
        "subprocess": float(subprocess.run([sys.executable, "-c", "print(1)"], check=False).returncode == 0),
    }


def network() -> dict[str, float]:
    families = {"ipv4": (socket.AF_INET, "127.0.0.1"), "ipv6": (socket.AF_INET6, "::1")}
    return {name: connects(family, (host, 9)) for name, (family, host) in families.items()}


def bomb() -> None:
    """Each process forks another one, for as long as it can."""
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def grow() -> None:
    """Takes memory, and writes to it, for as long as it can."""
    taken = []
    while True:
        taken.append(bytearray(b"x") * 2**24)


def burn(seconds: float) -> None:
    """So many seconds of CPU time."""
    while time.process_time() < seconds:
        pass


def says(line: bytes) -> None:
    """Something else to the process that hands its answers on."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(entry) > 2 and os.readlink(f"/proc/self/fd/{entry}").startswith("pipe:"):
                os.write(int(entry), line)
    time.sleep(60)  # its true answer must not come first: it is ended before


def wakes(work: Path) -> None:
    """Goes on when it has been stopped: a timer of the kernel continues it."""
    libc = ctypes.CDLL(None)
    event = (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0)  # sigevent: SIGEV_SIGNAL
    timer = ctypes.c_void_p()
    signal.signal(signal.SIGCONT, lambda *_: None)
    assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
    libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 50_000_000, 0, 50_000_000), None)

    def count() -> None:
        while True:
            (work / "awake").write_text(str(time.time()))
            time.sleep(0.01)

    threading.Thread(target=count, daemon=True).start()
    while not (work / "awake").exists():
        time.sleep(0.01)


def answer_of(data: Path) -> Path:
    """The folder that its answer goes into."""
    return next((data / "jobs").glob("run-1/out/*"))


def sparse(out: Path) -> None:
    """An answer of terabytes that need no room."""
    with (out / "message.json").open("wb") as file:
        file.truncate(2**42)
    os._exit(0)


def nests(out: Path) -> None:
    """Folders in folders, deeper than who removes them may recurse."""
    here = os.open(out, os.O_DIRECTORY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_DIRECTORY, dir_fd=here), here
        os.close(above)


def outlive(work: Path) -> None:
    """A process that leaves its family, and a thread."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            (work / "daemon").write_text("")
            while True:
                (work / "daemon").write_text(str(time.time()))
                time.sleep(0.02)
        os._exit(0)

    def count() -> None:
        while True:
            (work / "thread").write_text(str(time.time()))
            time.sleep(0.02)

    threading.Thread(target=count, daemon=True).start()
    while not ((work / "daemon").exists() and (work / "thread").exists()):
        time.sleep(0.01)


def links(data: Path, job: Path) -> None:
    """Its answer as a link to what it may not read: the agent could."""
    (job / "message.json").symlink_to(data / "identity.creds")
    os._exit(0)


@app.train()
def train(message: Message, context: Context) -> Message:
    attempt, _, told = str(context.run_config["attempt"]).partition(":")
    # What is a whole path in a node's configuration is granted: these are not.
    node = {name: str(value).removeprefix("at:") for name, value in context.node_config.items()}
    work, data = Path.cwd(), Path(node["data"])
    attempts = {
        "look": lambda: {**look(data, node), **{f"may-{k}": done for k, done in allowed(node).items()}, **network()},
        "samples": lambda: {"samples": float(len(CapturedSamples.open(str(context.node_config[SAMPLES]), "m")))},
        "who": lambda: who(node),
        "say": lambda: says(told.encode() + b"\n"),
        "wake": lambda: wakes(work),
        "nest": lambda: nests(answer_of(data)),
        "sparse": lambda: sparse(answer_of(data)),
        "outlive": lambda: outlive(work),
        "bomb": bomb,
        "grow": grow,
        "burn": lambda: burn(1.0),
        "link": lambda: links(data, answer_of(data)),
    }
    found = attempts[attempt]() or {}
    content = RecordDict({"arrays": ArrayRecord({}), "metrics": MetricRecord({**found, "num-examples": 1.0})})
    return Message(content, reply_to=message)

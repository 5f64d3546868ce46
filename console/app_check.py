"""Tries an app on this machine before a fleet gets it: a whole installation of its own, a few nodes, one round."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtide.console import endpoints
from fedtide.console.app_bundles import TrainWith, pushed
from fedtide.console.client import Client
from fedtide.console.embedded.plan import lay_out
from fedtide.console.embedded.supervisor import locked, running
from fedtide.console.home import Home
from fedtide.console.output import say
from fedtide.console.publishing import key_of
from fedtide.console.watching import run_lines
from fedtide.fabric.errors import CapabilityMissing, FedtideError, TransientError
from fedtide.fabric.flower.app_files import app_files
from fedtide.fabric.flower.apps import describe, fuse
from fedtide.fabric.messages.logs import LogLine
from fedtide.fabric.messages.views import RUN_ENDED, RunView
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.process.until_signalled import until_signalled
from fedtide.fabric.strict import ConfigValues

REGION = "check"
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONLINE_WITHIN_S = 60.0
SHOWN_LINES = 200


class Interrupted(FedtideError):
    """Somebody ended the check."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried. `index`: the package index for what the app needs, as `PackageRules.index`."""

    app: Path
    nodes: int = 2
    rounds: int = 1
    settings: ConfigValues = field(default_factory=dict)
    train: TrainWith = TrainWith.flower
    timeout_s: float = 600.0
    index: str = ""
    with_wheels: bool = False


def check(trial: Trial, folder: Path | None) -> list[str]:
    """Run the trial, show what the app prints, and return what is wrong with it: nothing, if all is well.

    Args:
        folder: where the installation's files stay; None: they are removed.

    Raises:
        ConfigError: the app directory or its run config is wrong.
        CapabilityMissing: this environment runs no Flower apps.
    """
    described = describe(trial.app)
    fuse(described.config, trial.settings)
    if find_spec("flwr") is None:
        raise CapabilityMissing("a check runs the app here, and there is no flwr", "pip install 'fedtide[demo]'")
    files = app_files(trial.app).files
    size = sum(file.stat().st_size for file in files.values())
    say(f"{described.name}: {len(files)} files, {size / 1e6:.1f} MB")
    problems: list[str] = []
    with _home(folder) as home, locked(home):
        if asyncio.run(until_signalled(_tried(home, trial, problems), ENDS)):
            raise Interrupted("the check was ended before its app")
    return problems


@contextmanager
def _home(folder: Path | None) -> Iterator[Home]:
    if folder is not None:
        yield Home(folder.resolve())
        return
    with TemporaryDirectory(prefix="fedtide-check-", ignore_cleanup_errors=True) as scratch:
        yield Home(Path(scratch))


async def _tried(home: Home, trial: Trial, problems: list[str]) -> None:
    agent = {"train_runtime": trial.train.value}
    layout = lay_out(home, [REGION], trial.nodes, agent=agent, app_index=trial.index)
    async with running(home, layout):
        problems += await _in_a_thread(lambda: _act(home, trial))


async def _in_a_thread(work: Callable[[], list[str]]) -> list[str]:
    """In one that nobody waits for at the end: a client tries patiently, also what is on its way down."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[str]] = loop.create_future()

    def do() -> None:
        try:
            found = work()
        except Exception as exc:  # it is raised where `done` is awaited
            loop.call_soon_threadsafe(_set, done.set_exception, exc)
        else:
            loop.call_soon_threadsafe(_set, done.set_result, found)

    def _set(how: Callable[..., None], what: object) -> None:
        if not done.done():
            how(what)

    threading.Thread(target=do, daemon=True).start()
    return await done


def _act(home: Home, trial: Trial) -> list[str]:
    state = home.state_of_this_process()
    client = Client.of(home, state.apis, by="check")
    _until_online(client, trial.nodes)
    settings = dict(trial.settings)
    described = describe(trial.app)
    if "num-server-rounds" in described.config:
        settings.setdefault("num-server-rounds", trial.rounds)
    key = str(key_of(home))
    app = pushed(client, trial.app, settings, trial.train, with_wheels=trial.with_wheels, key=key)
    policy = RoundPolicy(deadline_s=trial.timeout_s / 2, retries=0)  # what hangs is said before the check is over
    request = RunRequest(app=app, model=described.model, rounds=trial.rounds, run_config=settings, policy=policy)
    run = client.send(endpoints.start_run(request)).run
    view = _ended(client, run, trial.timeout_s)
    _show_output(client, view, state.nodes)
    return list(_problems(view, trial))


def _until_online(client: Client, count: int) -> None:
    """Poll: nodes join in their own time."""
    deadline = time.monotonic() + ONLINE_WITHIN_S
    while client.send(endpoints.status()).nodes.online < count:
        if time.monotonic() > deadline:
            raise TransientError(f"not all {count} nodes of the check came online in {ONLINE_WITHIN_S:.0f} s")
        time.sleep(0.1)


def _ended(client: Client, run: str, timeout_s: float) -> RunView:
    """The run's last view; after `timeout_s` it is cancelled."""
    deadline, last = time.monotonic() + timeout_s, client.send(endpoints.run(run))
    for last in client.stream(endpoints.watch_run(run), timeout_s=timeout_s):
        if last.state in RUN_ENDED or time.monotonic() > deadline:
            break
    if last.state not in RUN_ENDED:
        client.send(endpoints.act_on_run(run, "cancel"))
    return last


def _show_output(client: Client, view: RunView, nodes: list[str]) -> None:
    for place in ("", *nodes):
        lines: list[LogLine] = client.send(endpoints.run_logs(view.run, place, None)).lines
        if len(lines) > SHOWN_LINES:
            say(f"{place or 'server'} | ... {len(lines) - SHOWN_LINES} earlier lines")
        for line in lines[-SHOWN_LINES:]:
            say(f"{place or 'server'} | {line.level} {line.text}")
    for text in run_lines(view):
        say(text)


def _problems(view: RunView, trial: Trial) -> Iterator[str]:
    if view.state not in RUN_ENDED:
        yield f"it had not ended after {trial.timeout_s:g} s: {view.reason or _last_phase(view)}"
    elif view.state != "completed":
        yield f"the run {view.state}: {view.reason}"
    for each in view.rounds:
        for phase, tally in each.phases.items():
            for node, refused in tally.refused.items():
                yield f"{phase} on {node}: {refused.reason}"
    if view.state == "completed" and view.model and view.version is None:
        yield f"no release of {view.model}: {view.reason or 'see the output above'}"


def _last_phase(view: RunView) -> str:
    return view.rounds[-1].reason if view.rounds else "no round was opened"

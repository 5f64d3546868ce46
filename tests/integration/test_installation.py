"""`fedtide up` as a user meets it: errors in one line, nothing left behind, what dies comes back."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedtide.console.embedded.supervisor import GIVE_UP_AFTER
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, children, until


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("run", "start", "--app", "/nowhere"), "there is no such app directory", 2),
        (("run", "start", "--app", str(APPS / "mean"), "--set", "speed=1"), "declares no such config key", 2),
        (("run", "start", "--app", str(APPS / "mean"), "--set", "size"), "is not key=value", 2),
        (("run", "start", "--app", str(APPS / "mean"), "--nodes", "region=mars"), "no region 'mars'", 4),
        (("run", "start", "--app", str(APPS / "mean"), "--nodes", "node=x"), "no node 'x'", 4),
        (("run", "start", "--app", str(APPS / "mean"), "--nodes", "zone=x"), "no node has the labels", 4),
        (("run", "show", "run-0"), "there is no run 'run-0'", 4),
        (("fleet", "show", "x"), "Known: eu-1, eu-2, us-1, us-2", 4),
        (("rollout", "start", "x"), "there is no model 'x'", 4),
        (("round", "trigger", "x"), "there is no model 'x'", 4),
        (("model", "pull", "x"), "there is no model 'x'", 4),
    ],
)
def test_a_mistake_gets_one_line_that_helps_and_an_exit_code(
    installation: Installation, arguments: tuple[str, ...], words: str, code: int
) -> None:
    done = installation.run(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_round_of_the_built_in_app_shows_that_nodes_train(installation: Installation) -> None:
    done = installation.run("try", "--nodes", "region=eu")
    assert done.returncode == 0 and "trained on 2 of 2 nodes" in done.stdout, done.stderr
    assert "none of them with Flower" in installation.run("try", "--nodes", "region=mars").stdout


def test_listings_come_as_table_json_and_yaml_without_colour(installation: Installation) -> None:
    nodes = installation.nodes()
    assert [n.name for n in nodes] == ["eu-1", "eu-2", "us-1", "us-2"]
    assert yaml.safe_load(installation.run("fleet", "ls", "-o", "yaml").stdout)[0]["name"] == "eu-1"
    table = installation.run("fleet", "ls").stdout
    assert "us-2" in table
    assert "\x1b" not in table
    status = installation.json("status")
    assert status["nodes"] == {"online": 4, "known": 4}


def test_a_second_up_in_the_same_home_is_refused_and_touches_nothing(installation: Installation) -> None:
    files = [*(installation.home / "config").iterdir(), installation.home / "up.json"]
    before = {f: f.read_bytes() for f in files}
    done = installation.process("up", "-d")
    assert done.returncode == 2
    assert "already up here" in done.stderr
    assert {f: f.read_bytes() for f in files} == before
    assert (installation.home / "coordinator" / "coordinator.json").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_an_up_in_the_foreground_takes_everything_with_it(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "FEDTIDE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fedtide.console.cli", "up", "--regions", "eu", "--nodes-per-region", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as up:
        try:
            until(lambda: len(_processes(tmp_path)) == 7 and (tmp_path / "up.json").exists(), "everything")
            up.send_signal(number)
            up.wait(60)
        finally:
            up.kill()  # else a failure waits for it
    until(lambda: not _processes(tmp_path), "the end of every process")


def test_without_an_installation_the_remedy_is_named(tmp_path: Path) -> None:
    done = Installation(tmp_path).run("status")
    assert done.returncode == 4
    assert "Start one with `fedtide up`" in done.stderr


def test_a_port_in_use_is_said_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = Installation(tmp_path).process("up", "-d", "--port", str(port), "--regions", "eu")
    assert done.returncode != 0
    assert f"port {port} cannot be used" in done.stderr
    until(lambda: not _processes(tmp_path), "the end of every process")


@pytest.mark.slow
def test_two_installations_stand_side_by_side_and_a_killed_one_leaves_nothing(
    installation: Installation, tmp_path: Path
) -> None:
    other = bring_up(tmp_path, "eu", 1)
    assert [n.name for n in other.nodes()] == ["eu-1"]
    run = other.json("run", "start", "--app", str(APPS / "faulty"), "--set", "mode=hang", "--nodes", "node=eu-1")["run"]
    until(lambda: other.show(run).state == "running", "the aggregator")
    os.kill(other.state["pid"], signal.SIGKILL)
    until(lambda: not _processes(tmp_path), "the end of every process")
    assert installation.json("status")["nodes"]["online"] == 4
    assert other.run("status").returncode == 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One region of two nodes, whose processes may be hurt; each test ends with all of them back."""
    home = tmp_path_factory.mktemp("small")
    there = bring_up(home, "eu", 2)
    yield there
    there.run("down")
    assert not _processes(home)


@pytest.mark.slow
def test_a_node_that_vanishes_in_a_round_is_counted_as_lost_and_the_run_goes_on(small: Installation) -> None:
    """The agent's process is stopped, not killed: nothing restarts it, and only its silence tells."""
    (agent,) = children(small.state["pid"], "agent-eu-1")
    run = small.json("run", "start", "--app", str(APPS / "faulty"), "--set", "mode=hang")["run"]
    until(lambda: bool(small.show(run).rounds), "the round")
    os.kill(agent, signal.SIGSTOP)
    try:
        view = small.finish(run)
        assert view.state == "completed"
        refused = view.rounds[0].phases["train"].refused["eu-1"]
        assert refused.category == "node_lost"
        assert "no heartbeat" in refused.reason
        assert small.node("eu-1").state == "offline"
    finally:
        os.kill(agent, signal.SIGCONT)
    until(lambda: small.node("eu-1").state == "online", "the node's return")
    assert small.train(APPS / "faulty").participants == ["eu-1", "eu-2"]


@pytest.mark.slow
def test_coordinator_and_hub_come_back_with_everything_they_knew(small: Installation) -> None:
    first = small.train(APPS / "mean", "--rounds", "1")
    for word in ("coordinator.json", "hub.conf"):
        (pid,) = children(small.state["pid"], word)
        os.kill(pid, signal.SIGKILL)
        until(lambda gone=pid, word=word: children(small.state["pid"], word) not in ([], [gone]), f"a new {word}")
    until(lambda: small.run("run", "ls").returncode == 0, "the API")
    assert small.show(first.run).state == "completed"
    assert small.train(APPS / "mean", "--rounds", "2").state == "completed"


def test_a_coordinator_that_dies_in_a_run_finds_it_again_and_the_run_completes(small: Installation) -> None:
    settings = ("--set", "delay=1", "--set", "everyone=true", "--rounds", "3")
    run = small.json("run", "start", "--app", str(APPS / "mean"), *settings)["run"]
    until(lambda: len(small.show(run).rounds) >= 2, "the first round")
    (pid,) = children(small.state["pid"], "coordinator.json")
    os.kill(pid, signal.SIGKILL)
    until(lambda: small.run("run", "ls").returncode == 0, "the API")
    view = small.finish(run)
    assert view.state == "completed", view.reason
    assert view.attempt == 1
    assert [r.metrics["train_calls"] for r in view.rounds[1:]] == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_a_coordinator_that_dies_again_and_again_does_not_end_what_works(small: Installation) -> None:
    for _ in range(GIVE_UP_AFTER + 1):
        until(lambda: children(small.state["pid"], "coordinator.json") != [], "a coordinator")
        (pid,) = children(small.state["pid"], "coordinator.json")
        os.kill(pid, signal.SIGKILL)
        until(lambda gone=pid: gone not in children(small.state["pid"], "coordinator.json"), "its end")
    until(lambda: small.run("status").returncode == 0, "the API")
    until(lambda: small.node("eu-1").state == small.node("eu-2").state == "online", "the nodes")
    assert small.train(APPS / "faulty").participants == ["eu-1", "eu-2"]


def test_a_run_outlives_the_process_it_was_forked_from_and_the_next_one_starts(
    small: Installation,
) -> None:
    settings = ("--set", "delay=1", "--set", "everyone=true", "--rounds", "2")
    run = small.json("run", "start", "--app", str(APPS / "mean"), *settings)["run"]
    until(lambda: len(small.show(run).rounds) >= 2, "the first round")
    (coordinator,) = children(small.state["pid"], "coordinator.json")
    (server,) = children(coordinator, "--fork-server")
    assert small.aggregator(run) in children(server, "--fork-server")
    os.kill(server, signal.SIGKILL)
    view = small.finish(run)
    assert (view.state, view.attempt) == ("completed", 1), view.reason
    assert small.train(APPS / "mean", "--rounds", "1").state == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["hub", "leaf-eu"])
def test_a_broker_whose_disk_was_full_writes_again_by_itself(small: Installation, server: str) -> None:
    """Its first failed write leaves a nats-server refusing writes, also when there is room again."""
    full = small.child(server)
    resource.prlimit(full, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    run = small.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "1")["run"]
    view = small.finish(run)
    assert view.state == "completed", view.reason
    assert view.participants == ["eu-1", "eu-2"]
    assert small.child(server) != full


def test_a_node_that_cannot_write_is_counted_and_the_fleet_goes_on(small: Installation) -> None:
    apps = small.home / "nodes" / "eu-1" / "apps"
    shutil.rmtree(apps, ignore_errors=True)
    apps.write_text("a file where the agent wants a folder")
    view = small.train(APPS / "faulty")
    assert view.state == "completed"
    assert "the node's disk" in view.rounds[0].phases["train"].refused["eu-1"].reason
    apps.unlink()
    assert small.train(APPS / "faulty").participants == ["eu-1", "eu-2"]


@pytest.mark.slow
def test_an_agent_whose_process_keeps_dying_does_not_end_the_others(small: Installation) -> None:
    config = small.home / "config" / "agent-eu-1.json"
    good = config.read_text()
    config.write_text("broken")
    (pid,) = children(small.state["pid"], "agent-eu-1")
    os.kill(pid, signal.SIGKILL)
    until(lambda: small.node("eu-1").state == "offline", "its absence")
    assert small.node("eu-2").state == "online"
    config.write_text(good)
    until(lambda: small.node("eu-1").state == "online", "its return")


@pytest.mark.parametrize(
    "call", ["raise SystemExit(0)", pytest.param("import os; os._exit(0)", marks=pytest.mark.slow)]
)
def test_an_app_that_leaves_by_itself_ends_its_run(installation: Installation, tmp_path: Path, call: str) -> None:
    (tmp_path / "pyproject.toml").write_text((APPS / "mean" / "pyproject.toml").read_text())
    server = (APPS / "mean" / "mean_server.py").read_text()
    (tmp_path / "mean_server.py").write_text(server.replace("    size = int(", f"    {call}\n    size = int("))
    view = installation.train(tmp_path)
    assert view.state == "failed"
    assert view.reason


def test_an_idle_agent_loads_neither_flwr_nor_torch(installation: Installation) -> None:
    code = (
        "import sys; import fedtide.edge_agent.__main__, fedtide.edge_agent.agent; "
        "print([m for m in ('flwr', 'torch', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    (agent,) = children(installation.state["pid"], "agent-us-2")
    assert "flwr" not in Path(f"/proc/{agent}/maps").read_text()


def _processes(home: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(home) in (entry / "cmdline").read_text() and entry.name != str(os.getpid()):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found

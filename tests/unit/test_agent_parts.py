"""Parts of the agent on their own: configuration, outbox, trainer, preprocessing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from fedtide.edge_agent.config import AgentConfig, load
from fedtide.edge_agent.owner_policy import AppRule
from fedtide.edge_agent.tasks import node_folders
from fedtide.edge_agent.tasks import trainer as trainer_module
from fedtide.edge_agent.tasks.app_packages import AppPackages
from fedtide.edge_agent.tasks.app_places import AppPlaces
from fedtide.edge_agent.tasks.fair_queue import FairQueue
from fedtide.edge_agent.tasks.governor import Governor, Latency
from fedtide.edge_agent.tasks.outbox import STORED_FOR_S, Outbox
from fedtide.edge_agent.tasks.trainer import Trainer
from fedtide.edge_agent.training.job import Job
from fedtide.fabric.errors import CapabilityMissing, ConfigError, MalformedMessage, RemoteError
from fedtide.fabric.messages.tasks import Reply, Task, WireMessage
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.tensors.preprocessing import Normalize, Reshape, Scale, apply

NEEDED = {"FEDTIDE_NODE": "n1", "FEDTIDE_REGION": "eu", "FEDTIDE_NATS_URL": "nats://127.0.0.1:4222"}


def test_a_file_is_read_and_the_environment_goes_over_it(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('node = "a"\nregion = "eu"\nnats_url = "nats://127.0.0.1:4222"\n[labels]\nzone = "b"\n')
    config = load(file, {"FEDTIDE_NODE": "c", "FEDTIDE_NODE_CONFIG": '{"partition-id": 3}'})
    assert (config.node, config.labels, config.node_config) == ("c", {"zone": "b"}, {"partition-id": 3})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "FEDTIDE_NODE"),
        ({**NEEDED, "FEDTIDE_NODE": "a.b"}, "not a valid name"),
        ({**NEEDED, "FEDTIDE_REGION": "hub"}, "taken by the hub"),
        ({**NEEDED, "FEDTIDE_HTTP_PORT": "99999"}, "http_port"),
        ({**NEEDED, "FEDTIDE_LABELS": "zone=a"}, "is not JSON"),
    ],
)
def test_a_wrong_configuration_names_the_field(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(None, environment)


def _reply(task: str) -> Reply:
    message = WireMessage(
        run_id=1, message_id="", src_node_id=2, dst_node_id=1, created_at=0.0, ttl=1.0, message_type="train", content={}
    )
    return Reply(task=task, run="run-1", node="n1", seconds=1.0, message=message)


def test_an_answer_survives_a_restart_until_it_was_sent_and_is_then_only_remembered(tmp_path: Path) -> None:
    first = Outbox(tmp_path, tmp_path / "runs")
    first.open("t1")
    first.commit(_reply("t1"))
    second = Outbox(tmp_path, tmp_path / "runs")
    assert second.waiting() == ["t1"]
    assert second.read("t1").reply == _reply("t1")
    second.sent("t1")
    third = Outbox(tmp_path, tmp_path / "runs")
    assert third.waiting() == []
    assert third.knows("t1")
    assert not third.knows("t2")


def test_a_half_written_answer_is_gone_after_a_restart_and_its_task_is_not_done(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, tmp_path / "runs")
    outbox.open("t1")
    (outbox.folder("t1") / "message.json").write_text("{")
    again = Outbox(tmp_path, tmp_path / "runs")
    assert not again.knows("t1")
    assert again.waiting() == []


def test_a_damaged_entry_is_said_to_be_damaged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, tmp_path / "runs")
    outbox.commit(_reply("t1"))
    (tmp_path / "pending" / "t1" / "reply.json").write_text("{")
    with pytest.raises(MalformedMessage, match="damaged"):
        outbox.read("t1")


async def test_a_node_without_flower_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "find_spec", lambda name: None)
    config = AgentConfig(node="n1", region="eu", nats_url="nats://127.0.0.1:4222", data_dir=tmp_path)
    paths = dict.fromkeys(
        ("task_file", "log_file", "app_dir", "work_dir", "state_file", "progress_file", "out_dir"), tmp_path
    )
    job = Job(**paths, run="r", blobs={}, node_id=1, node_config={}, checkpoint_s=0.0, threads=1)
    app = AppRef(name="a", bundle=BlobRef(digest="a" * 64, size_bytes=1))
    packages = AppPackages(config, fetch=None, show=print)
    places = AppPlaces(config, "none")
    trainer = Trainer(config, Governor(config.limits, "UTC", Latency(), print), packages, places, "none")
    with pytest.raises(CapabilityMissing, match=r"fedtide\[train\]"):
        await trainer.train(job, app, AppRule())


def test_preprocessing_steps_follow_one_another() -> None:
    steps = [Scale(factor=0.5, offset=1.0), Normalize(mean=[1.0, 2.0], std=[1.0, 2.0]), Reshape(shape=[1, -1])]
    out = apply(steps, np.array([[2.0, 4.0]], np.float32))
    assert out.tolist() == [[1.0, 0.5]]
    assert out.dtype == np.float32


def test_an_input_that_does_not_fit_a_step_is_refused() -> None:
    with pytest.raises(RemoteError, match="reshape"):
        apply([Reshape(shape=[2, 2])], np.zeros(3, np.float32))


def test_runs_take_turns_on_a_node() -> None:
    queue = FairQueue()
    app = AppRef(name="app", bundle=BlobRef(digest="a" * 64, size_bytes=1))
    message = _reply("t").message
    for name in ("a-1", "a-2", "a-3", "b-1"):
        queue.put(Task(task=name, run=name[0], app=app, run_config={}, message=message, expires_at=1.0))
    taken = [task.task for task in iter(queue.take, None)]
    assert taken == ["a-1", "b-1", "a-2", "a-3"]


def test_what_the_broker_has_of_an_answer_is_known_to_the_next_process(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, tmp_path / "runs")
    outbox.commit(_reply("t1"))
    stored = outbox.stored("t1")
    stored.add("up.1")
    stored.add("up.2")
    file = tmp_path / "pending" / "t1" / "stored"
    with file.open("a") as torn:
        torn.write("up.3")
    assert Outbox(tmp_path, tmp_path / "runs").stored("t1") == {"up.1", "up.2"}
    _, *lines = file.read_text().split("\n")
    file.write_text("\n".join([str(time.time() - STORED_FOR_S - 1), *lines]))
    assert outbox.stored("t1") == set(), "the oldest chunk may have expired"
    file.write_bytes(b"\xff\xff\n")
    assert outbox.stored("t1") == set()
    outbox.sent("t1")
    assert outbox.stored("t1") == set()


def test_a_node_keeps_the_apps_that_were_used_last(tmp_path: Path) -> None:
    for number in range(node_folders.MOST_APPS + 3):
        app = tmp_path / "apps" / f"app{number:02}"
        app.mkdir(parents=True)
        at = time.time() - (number % 5) * node_folders.DAY_S - number
        os.utime(app, (at, at))
    old = tmp_path / "runs" / "r.state"
    old.parent.mkdir()
    old.write_text("x")
    os.utime(old, (1, 1))
    node_folders.tidy(tmp_path)
    left = {p.name for p in (tmp_path / "apps").iterdir()}
    assert len(left) == node_folders.MOST_APPS and {"app00", "app05", "app10"} <= left
    assert not {"app14", "app19", "app09"} & left and not old.exists()

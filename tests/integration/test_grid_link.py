"""The link between aggregator and broker: what a long round and a successor make of replies."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import time
from pathlib import Path

import pytest

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived, Node
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.coordinator.adapters.run_services import RunStreams
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.messages.run_questions import Purge, RepliesReady
from fedtide.fabric.messages.tasks import Cancel, Reply, Task, WireMessage
from fedtide.fabric.nats import jetstream
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import RunAsks, Subjects, parse_as, reply_consumer, up_stream
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef
from tests.conftest import Topology

SUBJECTS = Subjects()
NODE = Node.of("n1", "eu")
APP = AppRef(name="app", bundle=BlobRef(digest="a" * 64, size_bytes=1))
MESSAGE = WireMessage(
    run_id=1, message_id="t", src_node_id=1, dst_node_id=2, created_at=0.0, ttl=1.0, message_type="train", content={}
)


def _task(name: str, left_s: float = 60.0) -> Task:
    return Task(task=name, run="run-1", app=APP, run_config={}, message=MESSAGE, expires_at=time.time() + left_s)


@pytest.fixture(autouse=True)
async def coordinator(at_hub: Broker) -> None:
    """What an aggregator asks its coordinator before it reads replies, and when a round is closed."""
    streams = RunStreams(at_hub, SUBJECTS, ["eu"])

    async def answer(message: Received) -> tuple[bytes, dict[str, str]]:
        asked = parse_as(RunAsks, message.subject)
        if asked.verb == "replies":
            await streams.take_over_replies(asked.run)
            return to_json(RepliesReady()), {}
        if asked.verb == "backlog":
            return to_json(await streams.backlog(asked.run)), {}
        return to_json(await streams.purge(asked.run, from_json(Purge, message.data, "purge"))), {}

    await at_hub.answer(SUBJECTS.asked_by_run("run-1", "*"), answer)


def _link(topology: Topology, folder: Path, attempt: int) -> GridLink:
    config = WorkerConfig(
        run="run-1", attempt=attempt, spec=RunSpec(app=APP), nats_url=topology.hub.url, work_dir=folder, regions=["eu"]
    )
    link = GridLink(config, os._exit)
    link.open()
    return link


async def _answer(at_leaf: Broker, name: str) -> None:
    reply = Reply(task=name, run="run-1", node="n1", seconds=0.1, message=MESSAGE)
    await at_leaf.publish(SUBJECTS.reply("eu", "n1", "run-1", name), reply.model_dump_json().encode())


async def _send(link: GridLink, name: str, left_s: float = 60.0) -> queue.SimpleQueue[Arrived]:
    inbox: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    await asyncio.to_thread(link.call, link.send(_task(name, left_s), NODE, inbox))
    return inbox


async def _close(link: GridLink) -> None:
    await asyncio.to_thread(link.close)


async def test_a_reply_of_a_round_that_lasts_is_still_there_for_a_successor(
    topology: Topology, at_leaf: Broker, at_hub: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "_ACK_WAIT_S", 1)
    link = await asyncio.to_thread(_link, topology, tmp_path, 1)
    inbox = await _send(link, "t1-n1")
    await _answer(at_leaf, "t1-n1")
    assert (await asyncio.to_thread(inbox.get, timeout=20)).reply is not None
    info = f"$JS.API.CONSUMER.INFO.{up_stream('eu')}.{reply_consumer('run-1')}"
    consumer_sequence = 0
    while consumer_sequence < 4:  # delivered, and delivered again three times
        consumer_sequence = json.loads(await at_hub.ask(info))["delivered"]["consumer_seq"]
        await asyncio.sleep(0.1)
    await _close(link)
    successor = await asyncio.to_thread(_link, topology, tmp_path, 2)
    again = await _send(successor, "t1-n1")
    assert (await asyncio.to_thread(again.get, timeout=20)).reply is not None
    await asyncio.to_thread(successor.call, successor.close_round({"t1-n1"}, carries=False))
    await _close(successor)
    third = await asyncio.to_thread(_link, topology, tmp_path, 2)
    nothing = await _send(third, "t1-n1", left_s=1.5)
    arrived = await asyncio.to_thread(nothing.get, timeout=20)
    assert (arrived.reply, arrived.category) == (None, "timeout")
    await _close(third)


async def test_a_task_that_was_given_up_before_a_crash_is_not_waited_for(
    topology: Topology, at_hub: Broker, tmp_path: Path
) -> None:
    cancel = Cancel(task="t1-n1", run="run-1").model_dump_json().encode()
    await at_hub.publish(SUBJECTS.task("eu", "n1", "run-1", "t1-n1"), cancel)
    link = await asyncio.to_thread(_link, topology, tmp_path, 2)
    inbox = await _send(link, "t1-n1")
    arrived = await asyncio.to_thread(inbox.get, timeout=20)
    assert arrived.reply is None
    assert "given up" in arrived.lost
    await _close(link)

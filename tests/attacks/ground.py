"""Real servers with the accounts of an installation, what they hold, and what an attacker of each role sends."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports
from fedtide.coordinator.adapters.topology import Topology
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.accounts import CORE, NODES, RUNS, hub_of, region_account, streams_of
from fedtide.fabric.nats.authority import TRUST, Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials
from fedtide.fabric.nats.permissions import (
    AGGREGATOR,
    COLLECTS,
    FOLDS,
    JOINER,
    NODE,
    RENEWS,
    SIGNS,
    Permissions,
)
from fedtide.fabric.nats.streams import mirror_consumer
from fedtide.fabric.nats.subjects import (
    AUDIT,
    CACHE,
    CHECKPOINTS,
    CONTROL,
    DOWN,
    EVENTS,
    ORDERS,
    PARKED,
    RELEASES,
    STAY,
    UP,
    Subjects,
    reply_consumer,
    up_stream,
)
from tests.conftest import NatsServer

SUBJECTS = Subjects()
ROOT = SUBJECTS.root
REGIONS = ("eu", "us")
AT_HUB = (
    EVENTS,
    PARKED,
    AUDIT,
    DOWN,
    ORDERS,
    RELEASES,
    CHECKPOINTS,
    CONTROL,
    UP,
    *(up_stream(region) for region in REGIONS),
)
IN_REGION = (DOWN, ORDERS, UP, CACHE, STAY)


@dataclass(frozen=True)
class Role:
    """Somebody with the credentials of `name`, who connects to `server` (the hub or a region)."""

    name: str
    account: str
    user: str
    server: str
    region: str = ""

    def allowed(self) -> Permissions:
        return permissions.of_account(SUBJECTS, self.account)[self.name]

    def spelled(self, pattern: str) -> str:
        """A pattern of the role with this user's name and region in it."""
        return pattern.replace(permissions.NAME, self.user).replace(permissions.REGION, self.region)


ROLES = (
    Role(NODE, NODES, "eu-1", "eu", "eu"),
    Role(JOINER, NODES, "t1", "eu"),
    Role(COLLECTS, NODES, "collector-eu", "eu", "eu"),
    Role(RENEWS, NODES, "renewal-eu", "eu", "eu"),
    Role(FOLDS, NODES, "regional-eu", "eu", "eu"),
    Role(AGGREGATOR, RUNS, "run-1", "hub"),
    Role(SIGNS, RUNS, "release-authority", "hub"),
    Role("leaf", region_account("eu"), "leaf-eu", "hub"),
)

REPLIES = (
    *(f"$JS.API.STREAM.{verb}.{s}" for verb in ("DELETE", "PURGE", "UPDATE") for s in (EVENTS, DOWN, ORDERS, UP, STAY)),
    *(f"$JS.{domain}.API.STREAM.DELETE.{s}" for domain in ("hub", "eu", "us") for s in (EVENTS, DOWN, UP)),
    *(f"$JS.{domain}.API.STREAM.DELETE.{DOWN}" for domain in (hub_of("eu"), streams_of("eu"))),
    f"$JS.API.CONSUMER.CREATE.{UP}.evil",
    f"$JS.API.CONSUMER.DELETE.{DOWN}.{mirror_consumer('us')}",
    f"$JS.ACK.UP_eu.{reply_consumer('run-2')}.1.1.1.1.0",
    f"{ROOT}.evt.identity.node_revoked",
    f"{ROOT}.ctl.lease",
    f"{ROOT}.parked.x",
    f"{ROOT}.ckpt.run-2.head",
    f"{ROOT}.up.eu.eu-2.rpt.node-joined",
    f"{ROOT}.up.us.us-1.rpt.node-joined",
    f"{ROOT}.up.hub.run-2.rpt.run-completed",
    f"{ROOT}.up.eu.eu-2.reply.run-2.task-1",
    f"{ROOT}.stay.eu.collector.reference.m.x",
    f"{ROOT}.down.node.eu.eu-2.desired.m",
    f"{ROOT}.down.node.us.us-1.task.run-2.t",
    f"{ROOT}.cache.eu.blob.x.0",
    f"{ROOT}.rel.blob.x.0",
    f"{ROOT}.tel.eu.eu-2",
    f"{ROOT}.rpc.enrol.eu.t2",
    f"{ROOT}.rpc.renew.eu.eu-2",
    f"{ROOT}.rpc.run.run-2.purge",
    f"{ROOT}.infer.eu.eu-2.m",
    "DELIVER.us.UP.S.x",
    "DELIVER.us.DOWN",
    "DELIVER.us.ORDERS",
    "$SYS.REQ.CLAIMS.UPDATE",
    "_INBOX.coordinator.coordinator.x",
    "_INBOX.node.eu-2.x",
    "_R_.x",
)
EVERYTHING = json.dumps({"filter": ROOT, "keep": 0, "seq": 1}).encode()
PUSH = {"durable_name": "evil", "deliver_subject": f"{ROOT}.evt.x", "ack_policy": "none"}
BODIES = (
    b"",
    EVERYTHING,
    json.dumps({"stream_name": DOWN, "config": PUSH}).encode(),
    json.dumps({"name": EVENTS, "subjects": [f"{ROOT}.>"], "storage": "memory", "max_msgs": 1}).encode(),
    json.dumps({"multi_last": [">"], "batch": 1000}).encode(),
    json.dumps({"batch": 10, "no_wait": True}).encode(),
    b"\xff\x00{",
)
LARGE = b"x" * 1_000_000
HEADERS: tuple[dict[str, str], ...] = (
    {},
    {"Nats-Msg-Id": "honest", "Nats-TTL": "1s"},
    {"Nats-Rollup": "all"},
    {"Nats-Expected-Last-Sequence": "1"},
    {"Nats-Batch-Id": "evil", "Nats-Batch-Sequence": "1"},
    {"Nats-Subject": f"{ROOT}.down.node.eu.eu-2.desired.m", "Nats-Stream": EVENTS, "Status": "503"},
    {"Nats-Trace-Dest": f"{ROOT}.evt.x"},
    {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": f"{ROOT}.evt.x"},
    {"Nats-Stream-Source": "UP 1 > >", "Nats-Marker-Reason": "Purge"},
)
TOKENS = ("x", "run-2", "eu-2", "hub", "*", ">", "n" * 20_000, "\u00e9")
"""What may stand for a wildcard of a right."""


def shots(role: Role) -> Iterator[tuple[str, bytes, str, dict[str, str]]]:
    """Subject, body, reply and headers: each right of the role with each of everything."""
    for pattern in role.allowed().publish:
        wide = role.spelled(pattern)
        for name in TOKENS:
            subject = wide.replace("*", name).replace(">", name)
            yield from ((subject, body, REPLIES[0], {}) for body in BODIES[:2])
        subject = wide.replace("*", "x").replace(">", "x.y.0")
        yield from ((subject, body, reply, {}) for reply in REPLIES for body in BODIES[:2])
        yield from ((subject, body, REPLIES[0], headers) for body in BODIES for headers in HEADERS)
        yield subject, LARGE, REPLIES[0], {}


Stored = dict[tuple[str, str], dict[str, tuple[int, bytes]]]
"""By server and stream: by subject, sequence and data of its newest message."""


class Attacker:
    """Says what it wants to a server, in the server's own words, and hears only how often it is `refused`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.refused = 0

    @classmethod
    async def at(cls, port: int, credentials: Credentials) -> Attacker:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        info = json.loads((await reader.readline()).split(b" ", 1)[1])
        signed = base64.urlsafe_b64encode(credentials.key.sign(info["nonce"].encode())).rstrip(b"=").decode()
        hello = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "lang": "evil"}
        hello |= {"jwt": credentials.jwt, "sig": signed, "protocol": 1}
        writer.write(f"CONNECT {json.dumps(hello)}\r\n".encode())
        attacker = cls(reader, writer)
        if not await attacker.flush():
            attacker.close()
            raise AssertionError("it is not let in")
        return attacker

    def fire(self, subject: str, body: bytes, reply: str, headers: dict[str, str]) -> None:
        to = f"{subject} {reply}".encode()
        if headers:
            head = ("NATS/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode()
            self._writer.write(b"HPUB %s %d %d\r\n%s%s\r\n" % (to, len(head), len(head) + len(body), head, body))
        else:
            self._writer.write(b"PUB %s %d\r\n%s\r\n" % (to, len(body), body))

    def listen(self, subject: str) -> None:
        self._writer.write(b"SUB %s 1\r\nUNSUB 1\r\n" % subject.encode())

    async def flush(self) -> bool:
        """Whether the server is still there, and has read everything."""
        try:
            self._writer.write(b"PING\r\n")
            await self._writer.drain()
            while (line := await self._reader.readline()) != b"PONG\r\n":
                if not line:
                    return False
                self.refused += line.startswith(b"-ERR")
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._writer.close()


@dataclass
class Ground:
    """A hub and two regions."""

    folder: Path
    authority: Authority = field(default_factory=lambda: Authority.create("default")[0])
    servers: dict[str, NatsServer] = field(default_factory=dict)

    async def begin(self) -> None:
        (self.folder / TRUST).write_text(self.authority.trust(REGIONS))
        port, leaf_port, *ports = free_ports(2 + len(REGIONS))
        self._serve("hub", nats_config.hub(port, leaf_port, self.folder / "hub", nats_config.Trust()), port)
        for region, own in zip(REGIONS, ports, strict=True):
            store = self.folder / region
            for name, credentials in self.authority.region_credentials(region).items():
                credentials.save(nats_config.identity_of(store) / name)
            linked = self.authority.leaf_accounts(region)
            trust = nats_config.Trust(linked["region"], linked["system"])
            self._serve(region, nats_config.leaf(region, own, leaf_port, store, trust), own)
        self.coordinator = await self.broker("hub", self.authority.credentials(CORE, permissions.COORDINATOR, "c"))
        topology = Topology(self.coordinator, SUBJECTS, REGIONS)
        await topology.ensure_hub()
        await topology.create_missing()
        async with asyncio.timeout(60):
            for region in REGIONS:
                await topology.ensure_region(region)

    def _serve(self, name: str, config: str, port: int) -> None:
        file = self.folder / f"{name}.conf"
        file.write_text(config)
        self.servers[name] = NatsServer(file, port)
        self.servers[name].start()

    async def end(self) -> None:
        await self.coordinator.close()
        for server in self.servers.values():
            server.kill()

    async def broker(self, server: str, credentials: Credentials) -> Broker:
        file = self.folder / "shown" / f"{credentials.key.public}.creds"
        credentials.save(file)
        return await Broker.connect(self.servers[server].url, "test", Access(file))

    async def member(self, role: Role) -> Broker:
        """An honest one of a role."""
        return await self.broker(role.server, self.credentials(role))

    def credentials(self, role: Role) -> Credentials:
        return self.authority.credentials(role.account, role.name, role.user, region=role.region)

    async def attacker(self, role: Role) -> Attacker:
        """The same, with a client that sends anything."""
        return await Attacker.at(self.servers[role.server].port, self.credentials(role))

    async def seed(self) -> None:
        """Something in every stream, so that there is something to lose."""
        told = self.coordinator.publish
        await told(SUBJECTS.event("run", "requested"), b"logged")
        await told(SUBJECTS.lease, b"lease")
        await told(SUBJECTS.parked("a"), b"parked")
        for run in ("run-1", "run-2"):
            await told(SUBJECTS.checkpoint(run, "head"), f"checkpoint of {run}".encode())
            await told(SUBJECTS.report("hub", run, "run-started"), f"report of {run}".encode())
            await told(f"{SUBJECTS.round_blob(run, 'd' * 64)}.0", b"model")
            await told(f"{SUBJECTS.release_upload(run, 'd' * 64)}.0", b"upload")
        await told(f"{SUBJECTS.release_blob('d' * 64)}.0", b"release")
        await told(f"{SUBJECTS.blob('d' * 64)}.0", b"app")
        for region in REGIONS:
            await told(f"{SUBJECTS.cache_blob(region, 'd' * 64)}.0", b"release")
            for number in (1, 2):
                node = f"{region}-{number}"
                await told(SUBJECTS.desired(region, node, "m"), f"desired of {node}".encode())
                await told(SUBJECTS.task(region, node, "run-2", "t"), f"task of {node}".encode())
                honest = await self.member(Role(NODE, NODES, node, region, region))
                for subject in (
                    SUBJECTS.report(region, node, "node-joined"),
                    SUBJECTS.reply(region, node, "run-2", "t"),
                    f"{SUBJECTS.update_blob(region, node, 'run-2', 'd' * 64)}.0",
                    f"{SUBJECTS.stay_blob(region, node, 'run-2', 'd' * 64)}.0",
                ):
                    await honest.publish(subject, f"said by {node}".encode())
                await honest.close()
            await self.coordinator.take_over(
                up_stream(region), reply_consumer("run-2"), SUBJECTS.replies(region, "run-2")
            )

        # What is sourced and mirrored comes a little later: nothing tells when.
        async with asyncio.timeout(30):
            for region in REGIONS:
                up, down = SUBJECTS.all_up(region), SUBJECTS.down_node(region, f"{region}-2")
                while len(await self.coordinator.subjects_of(up_stream(region), up)) < 6:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                for stream in (DOWN, ORDERS):
                    while not await self.coordinator.subjects_of(stream, down, domain=region):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)

    async def configs(self) -> dict[str, object]:
        """Streams and consumers of every server, as they are set up."""
        found: dict[str, object] = {}
        for domain in (None, *REGIONS):
            for stream in AT_HUB if domain is None else IN_REGION:
                about = await self.coordinator._call(f"STREAM.INFO.{stream}", b"", domain)
                consumers = await self.coordinator._call(f"CONSUMER.NAMES.{stream}", b"", domain)
                named = [n for n in consumers["consumers"] or [] if not n.startswith("JS_SRC_")]
                found[f"{domain}/{stream}"] = about["config"], about["created"], sorted(named)
            names = await self.coordinator._call("STREAM.NAMES", b"", domain)
            found[f"{domain}"] = sorted(names["streams"])
        return found

    async def stored(self) -> Stored:
        """The newest message of every subject in every stream."""
        found: Stored = {}
        for domain in (None, *REGIONS):
            for stream in AT_HUB if domain is None else IN_REGION:
                held = await self.coordinator.last_of_each(stream, ">", domain=domain)
                found[domain or "hub", stream] = {m.subject: (m.sequence, m.data) for m in held}
        return found

"""Identities in a running installation: what one node's credentials allow, and how they come and go."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client as Raw

from fedtide.console import endpoints
from fedtide.coordinator.identity import certificates
from fedtide.edge_agent.identity import region_renewal
from fedtide.edge_agent.identity.enrolment import Enrolment, EnrolmentRefused, Renewals
from fedtide.edge_agent.identity.node_trust import trust_store
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, CredentialsRefused
from fedtide.fabric.events.identity import CredentialsAnswer, RegionRenewalAnswer, RenewalRequest, proof_of
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.accounts import accounts, hub_of, streams_of
from fedtide.fabric.nats.authority import REGION_FILES
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials
from fedtide.fabric.nats.jwt import USER, Key
from fedtide.fabric.nats.permissions import NODE, inbox
from fedtide.fabric.nats.subjects import DOWN, ORDERS, REGIONS_OWN, STAY, UP, Subjects
from tests.cluster.api_server import ApiServer
from tests.integration.installation import Installation, until
from tests.served import config as agent_config

ROOT = Subjects().root
INBOX = inbox(NODE, "eu-1")
HERE, HUB = f"$JS.{streams_of('eu')}.API", f"$JS.{hub_of('eu')}.API"


class Stranger:
    """A bare NATS client with the credentials of one node; `refused` is what the server said no to."""

    def __init__(self, raw: Raw, refused: list[str]) -> None:
        self.raw = raw
        self.refused = refused

    async def allowed(self, published: list[str], heard: list[str]) -> list[str]:
        """What the server let pass."""
        for subject in published:
            await self.raw.publish(subject, b"{}", reply=f"{INBOX}.x")
        for subject in heard:
            await self.raw.subscribe(subject)
        for _ in range(2):
            await self.raw.flush()
        said = [text.lower() for text in self.refused]
        return [s for s in [*published, *heard] if not any(f'"{s.lower()}"' in text for text in said)]


@pytest.fixture
async def stranger(installation: Installation) -> AsyncIterator[Stranger]:
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    raw = await nats.connect(
        installation.leaf("eu"),
        user_credentials=str(installation.home / "nodes" / "eu-1" / "identity.creds"),
        error_cb=note,
        inbox_prefix=INBOX.encode(),
    )
    yield Stranger(raw, refused)
    await raw.close()


FOREIGN_SUBJECTS = [
    f"{ROOT}.up.eu.eu-2.rpt.node-joined",
    f"{ROOT}.up.us.us-1.reply.run-1.task-1",
    f"{ROOT}.up.hub.run-1.rpt.run-completed",
    f"{ROOT}.tel.eu.eu-2",
    f"{ROOT}.stay.eu.eu-2.drift.m.1",
    f"{ROOT}.stay.eu.collector.reference.m.d",
    f"{ROOT}.down.node.eu.eu-2.task.run-1.t",
    f"{ROOT}.down.node.eu.eu-1.desired.m",
    f"{ROOT}.live.node.eu.eu-2.desired.m",
    f"{ROOT}.cache.eu.blob.d.0",
    f"{ROOT}.rel.blob.d.0",
    f"{ROOT}.evt.run.requested.run-1",
    f"{ROOT}.ctl.lease",
    f"{ROOT}.ckpt.run-1.x",
    f"{ROOT}.rpc.enrol.eu.t1",
    f"{ROOT}.rpc.renew.eu.eu-2",
    f"{ROOT}.rpc.renew.eu.region",
    "_INBOX.coordinator.x",
    "$SYS.REQ.CLAIMS.UPDATE",
    *(f"$JS.API.STREAM.{verb}.{DOWN}" for verb in ("INFO", "PURGE", "DELETE", "UPDATE", "MSG.GET", "MSG.DELETE")),
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.CREATE.MINE",
    "$JS.hub.API.STREAM.INFO.EVENTS",
    *(f"{api}.DIRECT.GET.{stream}" for stream in (DOWN, ORDERS, UP, STAY) for api in ("$JS.API", HERE, HUB)),
    f"{HERE}.DIRECT.GET.{ORDERS}.{ROOT}.down.node.eu.eu-2.desired.m",
    f"{HUB}.DIRECT.GET.{ORDERS}.{ROOT}.down.node.eu.eu-1.desired.m",
    f"{HERE}.DIRECT.GET.{UP}.{ROOT}.up.eu.eu-1.rpt.node-joined",
    f"{HERE}.DIRECT.GET.{STAY}.{ROOT}.stay.eu.eu-1.drift.m.1",
    f"{HUB}.CONSUMER.RESET.{DOWN}.mirror-eu",
    f"{HERE}.CONSUMER.CREATE.{DOWN}.mine.{ROOT}.down.node.eu.eu-1.>",
    f"$JS.API.CONSUMER.CREATE.{DOWN}",
    f"$JS.API.CONSUMER.DURABLE.CREATE.{DOWN}.mine",
    f"{ROOT}.rpc.orders.eu.eu-2",
    f"{ROOT}.rpc.run.run-1.cohort",
]
HEARD = [
    ">",
    "_INBOX.>",
    "_INBOX.node.eu-2.>",
    f"{ROOT}.>",
    f"{ROOT}.live.node.eu.>",
    f"{ROOT}.live.node.eu.eu-2.>",
    f"{ROOT}.down.>",
    f"{ROOT}.up.eu.>",
    f"{ROOT}.stay.eu.>",
    f"{ROOT}.infer.eu.eu-2.*",
    f"{ROOT}.rpc.>",
    f"{ROOT}.tel.>",
    "$SYS.>",
]
OWN = [
    f"{ROOT}.tel.eu.eu-1",
    f"{HERE}.DIRECT.GET.{DOWN}.{ROOT}.down.node.eu.eu-1.task.run-1.t",
    f"{HERE}.DIRECT.GET.{ORDERS}.{ROOT}.down.node.eu.eu-1.desired.m",
    f"{ROOT}.rpc.orders.eu.eu-1",
]


async def test_the_credentials_of_a_node_allow_what_is_its_own_and_nothing_else(stranger: Stranger) -> None:
    assert await stranger.allowed(FOREIGN_SUBJECTS, HEARD) == []
    own = f"{ROOT}.live.node.eu.eu-1.>"
    assert await stranger.allowed(OWN, [own]) == [*OWN, own]


def test_the_servers_know_the_rights_that_the_code_lists(installation: Installation) -> None:
    found = {each.account: each for each in installation.client.send(endpoints.rights()).accounts}
    wanted = accounts(Subjects(), installation.state["regions"])
    assert found.keys() == wanted.keys()
    for name, about in wanted.items():
        assert found[name].exports == sorted(each.subject for each in about.exports)
        assert found[name].imports == sorted(each.subject for each in about.imports)
        assert found[name].jetstream == about.jetstream
        roles = permissions.of_account(Subjects(), name)
        assert found[name].roles.keys() == roles.keys()
        for role, allowed in roles.items():
            said = found[name].roles[role]
            assert (tuple(said.publish), tuple(said.subscribe), said.answers) == (
                allowed.publish,
                allowed.subscribe,
                allowed.answers,
            )
            assert (said.subscriptions, said.payload_bytes) == (allowed.subscriptions, allowed.payload_bytes)
    shown = installation.run("identity", "audit").stdout
    assert "joiner" in shown and "65536 bytes a message" in " ".join(shown.split())


async def test_without_credentials_nobody_gets_in(installation: Installation) -> None:
    for url in (installation.leaf("eu"), installation.state["hub_url"]):
        with pytest.raises(CredentialsRefused, match="enrol with a new join token"):
            await Broker.connect(url, "nobody")


def _enrolment(there: Installation, folder: Path, token: str, node: str, region: str = "eu") -> Enrolment:
    url = there.leaf(region)
    config = agent_config(folder / node, node=node, region=region, nats_url=url, join_token=token)
    return Enrolment(config, trust_store(config))


def _token(there: Installation, *options: str) -> str:
    done = there.run("fleet", "token", "create", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_a_token_is_good_for_its_uses_and_its_region(installation: Installation, tmp_path: Path) -> None:
    token = await asyncio.to_thread(_token, installation, "--region", "eu", "--uses", "1")
    with pytest.raises(EnrolmentRefused, match="for region 'eu', not 'us'"):
        await _enrolment(installation, tmp_path, token, "new-1", "us").access()
    with pytest.raises(EnrolmentRefused, match="has credentials already"):
        await _enrolment(installation, tmp_path, token, "eu-1").access()
    first = await _enrolment(installation, tmp_path, token, "new-1").access()
    assert first.credentials is not None
    assert first.credentials.stat().st_mode & 0o077 == 0
    with pytest.raises(EnrolmentRefused, match="all 1 uses"):
        await _enrolment(installation, tmp_path, token, "new-2").access()
    name = next(t["token"] for t in installation.json("fleet", "token", "ls") if t["state"] == "spent")
    assert installation.run("fleet", "token", "revoke", name).returncode == 0
    # The coordinator says so at once; the region's server, as soon as it has heard of it.
    with pytest.raises((CredentialsRefused, EnrolmentRefused)):
        await _enrolment(installation, tmp_path, token, "new-3").access()
    assert "is no duration" in installation.run("fleet", "token", "create", "--ttl", "1 hour").stderr
    with pytest.raises(ConfigError, match="is not a join token"):
        await _enrolment(installation, tmp_path, "ft1.nonsense", "new-4").access()


async def test_renewed_credentials_are_good_beside_those_before(installation: Installation, tmp_path: Path) -> None:
    token = await asyncio.to_thread(_token, installation)
    enrolment = _enrolment(installation, tmp_path, token, "fresh-1")
    access = await enrolment.access()
    assert access.credentials is not None
    first = access.credentials.with_name("first.creds")
    Credentials.load(access.credentials).save(first)
    url = installation.leaf("eu")
    broker = await Broker.connect(url, "fresh", access)
    renewals = Renewals(enrolment.config, broker, access)
    await renewals.renew()
    assert Credentials.load(access.credentials).key != Credentials.load(first).key
    for each in (Access(first), access):
        await (await Broker.connect(url, "either", each)).close()
    with pytest.raises(EnrolmentRefused, match="renewed its credentials today"):
        await renewals.renew()
    await broker.close()


async def test_credentials_are_given_to_who_holds_the_keys_only(installation: Installation, tmp_path: Path) -> None:
    token = await asyncio.to_thread(_token, installation, "--uses", "5")
    access = await _enrolment(installation, tmp_path, token, "holder-1").access()
    assert access.credentials is not None
    mine, others = Credentials.load(access.credentials).key, Key.new(USER)
    text = proof_of("eu", "holder-1", others.public)
    signed = base64.b64encode(mine.sign(text)).decode()
    broker = await Broker.connect(installation.leaf("eu"), "holder", access)
    for asked in (
        RenewalRequest(key=others.public, renews=mine.public, present=signed),
        RenewalRequest(key=others.public, renews=mine.public, present=signed, proof=signed),
        RenewalRequest(key=others.public, proof=base64.b64encode(others.sign(text)).decode(), renews=others.public),
    ):
        raw = await broker.ask(Subjects().renewal("eu", "holder-1"), to_json(asked))
        assert "does not hold both keys" in from_json(CredentialsAnswer, raw, "answer").error
    await broker.close()


def _renewal(there: Installation, server: ApiServer, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the edge chart's Job runs before it restarts pods."""
    environment = {**os.environ, "KUBECONFIG": str(server.kubeconfig_in(folder))}
    module = [sys.executable, "-m", "fedtide.edge_agent.identity.region_renewal"]
    options = ["--namespace", "fl", "--secret", "fedtide-region", "--url", there.leaf("eu"), "--region", "eu"]
    return subprocess.run([*module, *options], env=environment, capture_output=True, text=True, check=False)


def _put_secret(server: ApiServer, files: region_renewal.Files) -> None:
    data = {name: base64.b64encode(text.encode()).decode() for name, text in files.items()}
    server.put("secrets", {"metadata": {"name": "fedtide-region", "namespace": "fl"}, "data": data})


def _secret(server: ApiServer) -> dict[str, str]:
    found = server.one("secrets", "fedtide-region")["data"]
    return {name: base64.b64decode(text).decode() for name, text in found.items() if text is not None}


async def test_a_region_renews_its_credentials(installation: Installation, tmp_path: Path) -> None:
    made = await asyncio.to_thread(installation.client.send, endpoints.region_credentials("eu", []))
    first = {**made.files, "ca.crt": certificates.authority("fedtide")[0]}
    with ApiServer() as server:
        _put_secret(server, first)
        nothing = await asyncio.to_thread(_renewal, installation, server, tmp_path)
        assert (nothing.returncode, nothing.stdout) == (0, "nothing to do: the credentials are of today\n")
        # As a Job leaves it that was ended before it had an answer.
        _put_secret(server, region_renewal.prepared(first))
        done = await asyncio.to_thread(_renewal, installation, server, tmp_path)
        assert done.stdout == "renewed\n", done.stderr
        second = _secret(server)
        assert set(second) == set(first)
        assert {name for name in second if second[name] != first[name]} == {*REGION_FILES}
        for number, files in enumerate((first, second)):
            file = tmp_path / f"{number}.creds"
            Credentials.parse(files["renewal.creds"]).save(file)
            await (await Broker.connect(installation.leaf("eu"), "either", Access(file))).close()

        _put_secret(server, region_renewal.prepared(second))
        refused = await asyncio.to_thread(_renewal, installation, server, tmp_path)
        assert refused.returncode == ConfigError.exit_code
        assert "region eu got credentials today" in refused.stderr
        assert _secret(server) == second


async def test_a_leafs_certificate_that_is_from_elsewhere_stays_and_the_credentials_are_renewed(
    installation: Installation, tmp_path: Path
) -> None:
    made = await asyncio.to_thread(installation.client.send, endpoints.region_credentials("eu", []))
    cert, key = certificates.server(*certificates.authority("of the company"), ["leaf.example.com"])
    files = {**made.files, "ca.crt": cert, "tls.crt": cert, "tls.key": key}
    with ApiServer() as server:
        # Whatever was asked for in this installation today: it is the answer of before.
        first = region_renewal.prepared(files)
        _put_secret(server, first)
        done = await asyncio.to_thread(_renewal, installation, server, tmp_path)
        if done.returncode:
            assert "got credentials today" in done.stderr
            return
        assert done.stdout.startswith("renewed, but not the certificate: there is no authority here"), done.stdout
        assert (_secret(server)["tls.crt"], _secret(server)["tls.key"]) == (cert, key)


async def test_a_region_renews_with_its_own_present_key_only(installation: Installation, tmp_path: Path) -> None:
    made = await asyncio.to_thread(installation.client.send, endpoints.region_credentials("us", []))
    honest = region_renewal.question("us", region_renewal.prepared(made.files))
    file = tmp_path / "renewal.creds"
    Credentials.parse(made.files["renewal.creds"]).save(file)
    broker = await Broker.connect(installation.leaf("us"), "region", Access(file))
    for asked, why in (
        (honest.model_copy(update={"keys": {**honest.keys, "leaf.creds": Key.new(USER).public}}), "does not hold"),
        (honest.model_copy(update={"renews": "U", "present": ""}), "does not hold a present key"),
        (honest.model_copy(update={"keys": {"leaf.creds": honest.renews}}), "public nkeys of users"),
    ):
        raw = await broker.ask(Subjects().renewal("us", REGIONS_OWN), to_json(asked))
        assert why in from_json(RegionRenewalAnswer, raw, "answer").error
    await broker.close()


async def test_a_disk_with_the_credentials_of_another_name_gets_its_own_or_says_so(
    installation: Installation, tmp_path: Path
) -> None:
    token = await asyncio.to_thread(_token, installation, "--uses", "5")
    await _enrolment(installation, tmp_path, token, "golden-1").access()
    shutil.copytree(tmp_path / "golden-1", tmp_path / "shop-7")
    without = _enrolment(installation, tmp_path, "", "shop-7")
    with pytest.raises(EnrolmentRefused, match="is that of node 'golden-1' of region 'eu'; this is 'shop-7'"):
        await without.access()
    access = await _enrolment(installation, tmp_path, token, "shop-7").access()
    await (await Broker.connect(installation.leaf("eu"), "shop-7", access)).close()
    assert access.credentials is not None
    assert Credentials.load(access.credentials).inbox == inbox(NODE, "shop-7")


async def test_a_revoked_node_is_thrown_out_wherever_it_is(installation: Installation, tmp_path: Path) -> None:
    token = await asyncio.to_thread(_token, installation, "--uses", "2")
    url = installation.leaf("us")
    here = await _enrolment(installation, tmp_path, token, "bad-1", "us").access()
    away = await _enrolment(installation, tmp_path, token, "bad-2", "us").access()
    broker = await Broker.connect(url, "bad", here)
    assert installation.run("fleet", "revoke", "bad-1", "--reason", "stolen").returncode == 0
    async with asyncio.timeout(60):
        with pytest.raises(CredentialsRefused):
            await broker.until_closed()

    # The server of its region is away: it hears of it as soon as it is back.
    os.kill(installation.child("leaf-us"), signal.SIGKILL)
    assert installation.run("fleet", "revoke", "bad-2").returncode == 0
    assert away.credentials is not None
    file = away.credentials
    await asyncio.to_thread(until, lambda: _is_refused(url, file), "the key to be withdrawn at the leaf")
    gone = installation.run("fleet", "revoke", "nobody")
    assert gone.returncode == 4, gone.stderr
    online: Any = lambda: all(n.state == "online" for n in installation.nodes())  # noqa: E731
    await asyncio.to_thread(until, online, "the nodes of us to be back")


def _is_refused(url: str, file: Path) -> bool:
    async def ask() -> bool:
        try:
            await (await Broker.connect(url, "old", Access(file), wait_s=2)).close()
        except CredentialsRefused:
            return True
        except BrokerUnavailable:
            return False
        return False

    return asyncio.run(ask())


async def test_a_token_from_before_does_not_undo_a_revocation(installation: Installation, tmp_path: Path) -> None:
    token = await asyncio.to_thread(_token, installation, "--uses", "5")
    enrolment = _enrolment(installation, tmp_path, token, "lost-1")
    await enrolment.access()
    assert installation.run("fleet", "revoke", "lost-1").returncode == 0
    with pytest.raises(EnrolmentRefused, match="revoked after this token was made"):
        await enrolment.access(refused=True)
    newer = await asyncio.to_thread(_token, installation)
    access = await _enrolment(installation, tmp_path, newer, "lost-1").access(refused=True)
    await (await Broker.connect(installation.leaf("eu"), "lost", access)).close()
    with pytest.raises(EnrolmentRefused, match="'collector' is taken"):
        await _named(installation, tmp_path, newer, "collector").access()


def _named(there: Installation, folder: Path, token: str, node: str) -> Enrolment:
    """As somebody would who does not use our configuration."""
    enrolment = _enrolment(there, folder, token, "harmless")
    enrolment.config = enrolment.config.model_copy(update={"node": node})
    return enrolment

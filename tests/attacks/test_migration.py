"""An installation of a version before 0.2: its log stays, and nobody's credentials from before count."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtide.console.embedded import migration, nats_config
from fedtide.console.embedded.plan import free_ports
from fedtide.console.home import Home
from fedtide.coordinator.identity.installation_secrets import complete
from fedtide.fabric.errors import ConfigError, CredentialsRefused
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.accounts import leaf_account
from fedtide.fabric.nats.authority import COORDINATOR, FILE, OPERATOR, TRUST, Authority
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.nats.streams import hub_streams
from fedtide.fabric.nats.subjects import EVENTS, Subjects
from tests.conftest import NatsServer

SUBJECTS = Subjects()
ANYTHING: dict[str, dict[str, object]] = {"pub": {}, "sub": {}}
NUMBERS = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
STORAGE = ("mem_storage", "disk_storage", "streams", "consumer")


class Before:
    """The authority as it was: one account for all, whose own key signs its users."""

    def __init__(self) -> None:
        self.operator, self.signing = Key.new(nats_jwt.OPERATOR), Key.new(nats_jwt.OPERATOR)
        self.account, self.system = Key.new(nats_jwt.ACCOUNT), Key.new(nats_jwt.ACCOUNT)
        about = {"system_account": self.system.public, "signing_keys": [self.signing.public]}
        self.jwt = nats_jwt.sign("operator", self.operator.public, "fedtide", about, self.operator)

    @property
    def text(self) -> bytes:
        seeds = {"signing_seed": self.signing.seed, "account_seed": self.account.seed, "system_seed": self.system.seed}
        return json.dumps({"tenant": "default", "operator_jwt": self.jwt, **seeds}).encode()

    def trust(self) -> str:
        known = {}
        for key, numbers in ((self.account, (*NUMBERS, *STORAGE)), (self.system, NUMBERS)):
            limits = {"limits": {**dict.fromkeys(numbers, -1), "wildcards": True}, "default_permissions": ANYTHING}
            known[key.public] = nats_jwt.sign("account", key.public, "x", limits, self.signing)
        lines = "".join(f"  {public}: {jwt}\n" for public, jwt in known.items())
        return f"operator: {self.jwt}\nsystem_account: {self.system.public}\nresolver_preload: {{\n{lines}}}\n"

    def node(self, file: Path) -> None:
        key = Key.new(nats_jwt.USER)
        about = {"subs": -1, "data": -1, "payload": -1, **ANYTHING}
        last_year = time.time() - 3e7
        Credentials(nats_jwt.sign("user", key.public, "n", about, self.account, issued=last_year), key).save(file)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[NatsServer]:
    port, leaf_port = free_ports(2)
    (tmp_path / "hub.conf").write_text(nats_config.hub(port, leaf_port, tmp_path / "hub", nats_config.Trust()))
    server = NatsServer(tmp_path / "hub.conf", port)
    yield server
    server.kill()


async def test_the_log_stays_and_old_credentials_are_void(hub: NatsServer, tmp_path: Path) -> None:
    old = Before()
    (tmp_path / TRUST).write_text(old.trust())
    old.node(tmp_path / "node.creds")
    hub.start()
    broker = await Broker.connect(hub.url, "before", Access(tmp_path / "node.creds"))
    for config in hub_streams(SUBJECTS):
        await broker.ensure_stream(config)
    await broker.publish(SUBJECTS.event("run", "requested"), b"of last year")
    await broker.close()
    hub.kill()

    own, _ = complete({FILE: old.text.decode(), OPERATOR: "kept"}, {}, "default", ["localhost"], ["eu"])
    assert own[OPERATOR] == "kept" and old.account.seed not in own[FILE]
    (tmp_path / TRUST).write_text(own[TRUST])
    (tmp_path / COORDINATOR).write_text(own[COORDINATOR])
    hub.start()
    broker = await Broker.connect(hub.url, "after", Access(tmp_path / COORDINATOR))
    assert [m.data for m in await broker.read_from(EVENTS, 1)] == [b"of last year"]
    await broker.close()
    with pytest.raises(CredentialsRefused):
        await Broker.connect(hub.url, "before", Access(tmp_path / "node.creds"))


def test_up_moves_what_regions_hold_and_can_be_interrupted(tmp_path: Path) -> None:
    old, home = Before(), Home(tmp_path)
    streams = home.store("eu") / "jetstream" / old.account.public / "streams"
    for name in ("UP", "DOWN"):
        (streams / name).mkdir(parents=True)
    (home.root / "nodes" / "n").mkdir(parents=True)
    old.node(home.root / "nodes" / "n" / "identity.creds")
    home.identity.mkdir(parents=True)
    (home.identity / FILE).write_bytes(old.text)
    with pytest.raises(ConfigError, match=r"before 0\.2.*docs/upgrading"):
        Authority.load(home.identity)
    authority = Authority.migrated(old.text)
    assert authority is not None
    migration.begin(home, authority, ["eu"])
    moved = home.store("eu") / "jetstream" / authority.public(leaf_account("eu")) / "streams"
    assert [folder.name for folder in moved.iterdir()] == ["UP"], "a mirror is read from the hub again"
    assert not list(home.root.glob("nodes/*/identity.creds"))
    assert Authority.migrated((home.identity / FILE).read_bytes()) is None, "it is done"
    assert Authority.load(home.identity).public(leaf_account("eu")) == authority.public(leaf_account("eu"))

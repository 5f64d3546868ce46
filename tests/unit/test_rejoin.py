"""Who may come back to a log that does not know them: whoever shows credentials of before, and holds their key."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest

from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.authority import Authority
from fedtide.fabric.nats.jwt import Key

OURS, ANOTHER = (Authority.create("default")[0] for _ in range(2))
KEY = Key.new(nats_jwt.USER)
LATER = datetime.now(UTC) + timedelta(days=1)


def is_of_node(
    jwt: str, *, node: str = "n1", region: str = "eu", key: str = KEY.public, until: datetime = LATER
) -> bool:
    return OURS.is_of_node(jwt, region, node, key, until=until)


def test_credentials_of_before_are_believed_for_their_node_and_key_only() -> None:
    shown = OURS.node_jwt("eu", "n1", KEY.public)
    assert is_of_node(shown)
    assert not is_of_node(shown, node="n2")
    assert not is_of_node(shown, region="us")
    assert not is_of_node(shown, key=Key.new(nats_jwt.USER).public)
    assert not is_of_node(shown, until=datetime.now(UTC) - timedelta(hours=1)), "they are of after the restore"


def test_nobody_else_makes_them() -> None:
    region = OURS.region_credentials("eu")
    forged = nats_jwt.sign("user", KEY.public, "n1", {"tags": ["region:eu"]}, Key.new(nats_jwt.ACCOUNT))
    shown = OURS.node_jwt("eu", "n1", KEY.public)
    head, body, signature = shown.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    claims["name"] = "n2"
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    for jwt in (
        "",
        "x",
        "a.b.c",
        forged,
        ANOTHER.node_jwt("eu", "n1", KEY.public),
        region["leaf.creds"].jwt,
        region["collector.creds"].jwt,
        OURS.joiner("t", 60).jwt,
        f"{head}.{changed}.{signature}",
        f"{head}.{body}.!",
    ):
        assert not is_of_node(jwt), jwt[:40]
    assert not is_of_node(f"{head}.{changed}.{signature}", node="n2")


def test_expired_ones_are_none() -> None:
    expired = OURS.user_jwt("nodes", "node", "n1", KEY.public, region="eu", lifetime_s=-1)
    assert not is_of_node(expired)


def test_a_jwt_says_who_signed_it() -> None:
    by = Key.new(nats_jwt.ACCOUNT)
    signed = nats_jwt.sign("user", KEY.public, "n", {}, by)
    assert nats_jwt.signed_by(signed, by.public)["name"] == "n"
    with pytest.raises(MalformedMessage, match="somebody else"):
        nats_jwt.signed_by(signed, KEY.public)

"""ID tokens: those of the provider, for this installation, of people with a role; and no others."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fedtide.coordinator.adapters.oidc import NotLetIn, OidcLogin
from fedtide.coordinator.config import Oidc
from fedtide.fabric.errors import TransientError


class Provider:
    """Serves what a provider publishes: its document and its keys."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.add("one")
        self.asked = 0

    def add(self, kid: str) -> None:
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1())

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._document)
        app.router.add_get("/keys", self._keys)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def _document(self, _: web.Request) -> web.Response:
        return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/keys"})

    async def _keys(self, _: web.Request) -> web.Response:
        self.asked += 1
        public = [
            {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}
            for kid, key in self.keys.items()
        ]
        return web.json_response({"keys": [*public, {"kty": "unheard-of", "kid": "x"}]})

    def token(self, kid: str = "one", key: Any = None, algorithm: str = "ES256", **changes: Any) -> str:
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "fedtide",
            "sub": "42",
            "email": "al@example.com",
            "groups": ["ml-ops", "others"],
            "iat": now,
            "exp": now + 600,
            **changes,
        }
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, key if key is not None else self.keys[kid], algorithm=algorithm, headers={"kid": kid})


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    await made.start()
    yield made
    await made.runner.cleanup()


def login(provider: Provider, **more: Any) -> OidcLogin:
    return OidcLogin(Oidc(issuer=provider.url, roles={"ml-ops": "operator", "owners": "admin"}, **more))


async def test_a_person_has_the_highest_role_of_the_groups(provider: Provider) -> None:
    there = login(provider)
    who = await there.principal(provider.token())
    assert (who.name, who.role, who.via) == ("al@example.com", "operator", "oidc")
    assert (await there.principal(provider.token(groups=["ml-ops", "owners"]))).role == "admin"
    assert (await there.principal(provider.token(groups="owners"))).role == "admin"
    assert provider.asked == 1, "keys are kept"
    with pytest.raises(NotLetIn, match="no role"):
        await there.principal(provider.token(groups=["others"]))
    assert (await login(provider, default_role="viewer").principal(provider.token(groups=None))).role == "viewer"


STRANGER = ec.generate_private_key(ec.SECP256R1())
BAD: dict[str, dict[str, Any]] = {
    "of another installation": {"aud": "another"},
    "of another provider": {"iss": "http://127.0.0.1:1"},
    "expired": {"exp": int(time.time()) - 3600},
    "from the future": {"iat": int(time.time()) + 3600, "nbf": int(time.time()) + 3600},
    "without an end": {"exp": None},
    "without a holder": {"sub": None},
    "signed by a stranger": {"key": STRANGER},
    "of a key that nobody has": {"kid": "two", "key": STRANGER},
    "without a signature": {"key": "", "algorithm": "none"},
    "with a secret": {"key": "s" * 64, "algorithm": "HS256"},
}


@pytest.mark.parametrize("name", BAD)
async def test_another_token_lets_nobody_in(name: str, provider: Provider) -> None:
    with pytest.raises(NotLetIn):
        await login(provider).principal(provider.token(**BAD[name]))


@pytest.mark.parametrize("token", ["", "a.b.c", "..", "\ud800.b.c", "a" * 10_000])
async def test_what_is_no_token_lets_nobody_in(token: str, provider: Provider) -> None:
    with pytest.raises((NotLetIn, TransientError)):
        await login(provider).principal(token)


async def test_a_new_key_of_the_provider_is_found_and_an_old_one_forgotten(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = login(provider)
    old = provider.token()
    await there.principal(old)
    provider.add("two")
    monkeypatch.setattr("fedtide.coordinator.adapters.oidc.AGAIN_AFTER_S", 0.0)
    assert (await there.principal(provider.token("two"))).role == "operator"
    del provider.keys["one"]
    there._fetched = float("-inf")
    with pytest.raises(NotLetIn):
        await there.principal(old)


async def test_a_provider_that_is_away_locks_nobody_out_whose_key_is_known(provider: Provider) -> None:
    there = login(provider)
    token = provider.token()
    await there.principal(token)
    await provider.runner.cleanup()
    there._fetched = float("-inf")
    assert (await there.principal(token)).role == "operator"
    with pytest.raises(TransientError):
        await login(provider).principal(token)


async def test_a_login_is_the_answer_to_its_own_question(provider: Provider) -> None:
    there = login(provider)
    await there.principal(provider.token(nonce="n"), nonce="n")
    with pytest.raises(NotLetIn):
        await there.principal(provider.token(nonce="m"), nonce="n")


def test_a_provider_is_reached_safely() -> None:
    with pytest.raises(ValueError, match="must be https"):
        Oidc(issuer="http://idp.example.com")

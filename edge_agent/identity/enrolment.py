"""How a node gets its credentials: first with a join token, later by renewing those it has."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import tempfile
from pathlib import Path

from pydantic import BaseModel

from fedtide.edge_agent.config import AgentConfig
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, FedtideError, MalformedMessage, TransientError
from fedtide.fabric.events.identity import CredentialsAnswer, EnrolmentRequest, RenewalRequest, proof_of
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials, write_secret
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.process.retry import until_done
from fedtide.fabric.trust.store import TrustStore

log = logging.getLogger(__name__)

PREFIX = "ft1."
ANSWER_WITHIN_S = 10.0
RENEW_AT = 1 / 3
"""Credentials are renewed when this share of their lifetime is left."""
LOOK_EVERY_S = 3600.0


class EnrolmentRefused(FedtideError):
    """The coordinator gives this node no credentials; it says why."""

    exit_code = 77


class JoinToken:
    """`ft1.` and base64 of a name and credentials that allow nothing but to enrol; `pin`: of the root to follow."""

    def __init__(self, text: str) -> None:
        try:
            body = json.loads(base64.urlsafe_b64decode(text.strip().removeprefix(PREFIX)))
            self.name = str(body["t"])
            self.credentials = Credentials(str(body["j"]), Key.of(str(body["s"])))
            self.pin = str(body.get("r", ""))
        except (ValueError, KeyError, TypeError, MalformedMessage) as exc:
            remedy = "Copy it whole, as `fedtide fleet token create` printed it"
            raise ConfigError("join_token", "is not a join token", remedy) from exc


class Enrolment:
    """Finds this node's credentials, or asks for them."""

    def __init__(self, config: AgentConfig, store: TrustStore) -> None:
        """`store`: learns which root the join token names."""
        self.config = config
        self._store = store
        self._file = config.credentials or config.data_dir / "identity.creds"

    async def access(self, *, refused: bool = False) -> Access:
        """The credentials to connect with; waits for the broker and the coordinator as long as needed.

        Args:
            refused: the stored credentials were refused: try the token. They are kept until it has brought new ones.

        Raises:
            EnrolmentRefused: the token does not admit this node, or no longer does.
            ConfigError: the configured join token is malformed.
        """
        self._pin_first()
        holder = self._holder()
        own = holder == (self.config.node, self.config.region)
        # Whether they have expired is for the server to say: this machine's clock may be wrong by years.
        token = self._token() if refused or not own else None
        if own and token is None:
            return Access(self._file, self.config.ca_file)
        if token is None:
            if holder is not None:
                raise EnrolmentRefused(
                    f"{self._file.name} is that of node {holder[0]!r} of region {holder[1]!r}; this is"
                    f" {self.config.node!r} of {self.config.region!r}",
                    "A cloned disk or a renamed host: give it a join token, and it gets credentials of its own",
                )
            return Access(None, self.config.ca_file)
        await self._enrol(token)
        return Access(self._file, self.config.ca_file)

    def _pin_first(self) -> None:
        """A node that follows no root yet follows that of its token, also if it needs no credentials."""
        if not self._store.is_pinned and (token := self._token()) is not None and token.pin:
            self._store.set_pin(token.pin)

    def _holder(self) -> tuple[str, str] | None:
        """Name and region of the node whose credentials are stored here; None if there are none."""
        if not self._file.exists():
            return None
        claims = nats_jwt.read(Credentials.load(self._file).jwt)
        tags = dict(tag.partition(":")[::2] for tag in claims["nats"].get("tags", []))
        return str(claims.get("name")), tags.get("region", "")

    def _token(self) -> JoinToken | None:
        text, file = self.config.join_token, self.config.join_token_file
        if not text and file is not None:
            try:
                text = file.read_text(encoding="utf-8").strip()
            except OSError as exc:
                log.info("enrolment.no_token", extra={"file": str(file), "reason": str(exc)})
        return JoinToken(text) if text else None

    async def _enrol(self, token: JoinToken) -> None:
        config = self.config
        key = self._kept_key()
        proof = _signed(key, proof_of(config.region, config.node, key.public))
        asked = EnrolmentRequest(node=config.node, region=config.region, key=key.public, proof=proof)
        with tempfile.TemporaryDirectory() as folder:
            show = Path(folder) / "join.creds"
            token.credentials.save(show)
            access = Access(show, config.ca_file)
            broker = await Broker.connect(config.nats_url, f"join-{config.node}", access, wait_s=None)
            try:
                jwt = await _ask(broker, Subjects(config.tenant).enrolment(config.region, token.name), asked)
            except EnrolmentRefused:
                self._key_file.unlink(missing_ok=True)  # it may have been withdrawn: the next try has another
                raise
            finally:
                await broker.close()
        if token.pin:
            self._store.set_pin(token.pin)
        Credentials(jwt, key).save(self._file)
        self._key_file.unlink(missing_ok=True)
        log.info("agent.enrolled", extra={"node": config.node, "region": config.region})

    @property
    def _key_file(self) -> Path:
        return self._file.with_suffix(".seed")

    def _kept_key(self) -> Key:
        """The key to enrol with, kept on disk: after a lost answer the retry must not use the token a second time."""
        try:
            return Key.of(self._key_file.read_text(encoding="utf-8").strip())
        except (OSError, ValueError, MalformedMessage):
            key = Key.new(nats_jwt.USER)
            write_secret(self._key_file, key.seed)
            return key


class Renewals:
    """Renews a node's key and credentials before they expire."""

    def __init__(self, config: AgentConfig, broker: Broker, access: Access) -> None:
        self._config = config
        self._broker = broker
        self._file = access.credentials

    async def run(self) -> None:
        """Check the credentials periodically, for ever."""
        while True:
            if self._file is not None and Credentials.load(self._file).lifetime_left < RENEW_AT:
                await self.renew()
            await asyncio.sleep(LOOK_EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311  # so that a fleet does not ask at once

    async def renew(self) -> None:
        """Ask for credentials with a new key, and connect with them. The old ones stay good until the next time.

        Raises:
            EnrolmentRefused: this node was revoked.
        """
        assert self._file is not None
        config, key, shown = self._config, Key.new(nats_jwt.USER), Credentials.load(self._file)
        present = shown.key
        subject = Subjects(config.tenant).renewal(config.region, config.node)
        text = proof_of(config.region, config.node, key.public)
        asked = RenewalRequest(
            key=key.public,
            proof=_signed(key, text),
            renews=present.public,
            present=_signed(present, text),
            jwt=shown.jwt,
        )
        Credentials(await _ask(self._broker, subject, asked), key).save(self._file)
        await self._broker.reconnect()
        log.info("agent.renewed", extra={"node": config.node})


def _signed(key: Key, text: bytes) -> str:
    return base64.b64encode(key.sign(text)).decode()


async def _ask(broker: Broker, subject: str, question: BaseModel) -> str:
    """Request a JWT; retried until the coordinator answers."""

    async def once() -> CredentialsAnswer:
        raw = await broker.ask(subject, to_json(question), timeout_s=ANSWER_WITHIN_S)
        return from_json(CredentialsAnswer, raw, "answer")

    asking = asyncio.create_task(until_done(log, "enrolment.waits", once, on=(TransientError, MalformedMessage)))
    closed = asyncio.create_task(broker.until_closed())
    try:
        # A connection that the server has closed for good answers nothing any more, however long one asks.
        await asyncio.wait({asking, closed}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            closed.result()
            raise BrokerUnavailable("the connection to the broker was closed")
        answer = asking.result()
    finally:
        asking.cancel()
        closed.cancel()
    if answer.error:
        raise EnrolmentRefused(answer.error, answer.remedy)
    return answer.jwt

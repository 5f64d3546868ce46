"""Issues join tokens, answers enrolments and renewals, and tells every server which keys are withdrawn."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.identity import certificates, identities
from fedtide.coordinator.identity.installation_secrets import CA_CERT, CA_KEY, CERT, KEY
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import CapabilityMissing, ConfigError, InvalidTransition, MalformedMessage, NotFound
from fedtide.fabric.events.identity import (
    CredentialsAnswer,
    EnrolmentRequest,
    JoinTokenCreated,
    JoinTokenRevoked,
    NodeEnrolled,
    NodeRevoked,
    RegionIssued,
    RegionRemoved,
    RegionRenewalAnswer,
    RegionRenewalRequest,
    RenewalRequest,
    proof_of,
    proof_of_region,
)
from fedtide.fabric.ids import check_token
from fedtide.fabric.messages.views import AccountRights, Rights, RoleRights
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.accounts import RUNS, accounts
from fedtide.fabric.nats.authority import (
    AT_REST,
    NODE_LIFETIME_S,
    REGION_FILES,
    REGION_LIFETIME_S,
    REGION_SYSTEM,
    TRUST,
    Authority,
    Void,
)
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Credentials
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.permissions import CLAIMS, LIMITS_OF, SYSTEM, claims_of
from fedtide.fabric.nats.subjects import REGIONS_OWN, EnrolmentAsked, RenewalAsked, parse_as

log = logging.getLogger(__name__)

_CONNECTS = "$SYS.ACCOUNT.{}.CONNECT"


AGAIN_AFTER_S = (0.0, 1.0, 5.0)
RUNS_WAIT_S = 900.0
"""So long the key of an ended run may be let in, while others are active; nobody does what it asks for."""


@dataclass(frozen=True, slots=True)
class Told:
    """Which servers are told of accounts.

    Args:
        hub: a connection to the hub's own account.
        on_hub: signs what the hub is told.
        edges: a connection to the account of a tenant's servers; None: they are linked to the hub's own.
    """

    hub: Broker
    on_hub: Authority
    edges: Broker | None = None


class Enroller:
    """Answers while this coordinator leads."""

    def __init__(
        self,
        broker: Broker,
        told: Told,
        engine: Engine,
        authority: Authority,
        config: CoordinatorConfig,
        director: Director,
    ) -> None:
        self._director = director
        self._broker = broker
        self._told = told
        self._system = told.hub
        self._engine = engine
        self._authority = authority
        self._regions = config.regions
        self._folder = config.identity_dir or Path()
        self._hub_ca = config.ca_file
        self._subjects = authority.subjects
        self._stale = asyncio.Event()
        self._withheld = False

    async def listen(self) -> None:
        # One subscription per region: the permissions of a region's server do not let a wider one through.
        for region in self._regions:
            await self._broker.answer(self._subjects.enrolment(region, "*"), self._on_enrolment)
            await self._broker.answer(self._subjects.renewal(region, "*"), self._on_renewal)
        # A server that was away has missed what was withdrawn meanwhile.
        await self._system.subscribe(_CONNECTS.format(self._authority.public(SYSTEM)), self._on_server)

    async def _on_server(self, _: Received) -> None:
        """Tell a server that has come what is withdrawn: again later, because its subscriptions come after itself."""
        loop = asyncio.get_running_loop()
        for delay in AGAIN_AFTER_S:
            loop.call_later(delay, self.accounts_changed)

    def accounts_changed(self) -> None:
        """Tell every server, soon, which accounts there are and which keys are withdrawn."""
        self._stale.set()

    async def keep_accounts(self) -> None:
        """Publish the accounts now, and whenever they changed, for ever."""
        while True:
            self._stale.clear()
            await self._publish(self._told.hub, self._told.on_hub)
            if self._told.edges is not None:
                await self._publish(self._told.edges, self._authority)
            wait_s = RUNS_WAIT_S if self._withheld else None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stale.wait()

    async def _publish(self, servers: Broker, authority: Authority) -> None:
        found = authority.account_jwts(self._regions, self._void)
        for jwt in reversed(found.values()):  # a server takes no account that imports from one it has not heard of
            alone = servers is self._told.hub and self._told.edges is not None
            await servers.tell(claims_of(nats_jwt.read(jwt)["sub"]) if alone else CLAIMS, jwt.encode())
        log.info("accounts.published", extra={"accounts": len(found)})

    def _void(self, account: str) -> Void:
        void = identities.void_in(self._engine.world.identities, account)
        return self._told_of_runs(void) if account == RUNS else void

    def _told_of_runs(self, ended: Void) -> Void:
        """The ended runs whose keys servers are told of. That disturbs other runs, so it waits for them a while."""
        now = datetime.now(UTC)
        latest = now - timedelta(seconds=RUNS_WAIT_S)
        active = [run.facts.requested_at for _, run in self._engine.world.active_runs()]
        told = {key: when for key, when in ended.items() if not active or when[0] <= latest}
        self._withheld = len(told) < len(ended)
        return identities.in_fewer(told, min(active, default=now))

    async def create_token(self, region: str, uses: int, ttl: timedelta, *, replaces: bool, by: str) -> str:
        """Create a join token: credentials that only allow to ask for a node's credentials.

        Raises:
            ConfigError: no such region.
        """
        if region and region not in self._regions:
            raise ConfigError("region", f"there is no region {region!r}", f"There are {', '.join(self._regions)}")
        name = f"t{secrets.token_hex(5)}"
        made = self._authority.joiner(name, ttl.total_seconds())
        created = JoinTokenCreated(
            token=name,
            key=made.key.public,
            region=region,
            uses=uses,
            expires_at=datetime.now(UTC) + ttl,
            replaces=replaces,
            by=by,
        )
        await self._engine.submit(created)
        # Whom the node believes from its first moment on: the token comes from its owner, what it hears does not.
        pin = {"r": self._director.pin} if self._director.pin else {}
        body = json.dumps({"t": name, "j": made.jwt, "s": made.key.seed, **pin}).encode()
        return f"ft1.{base64.urlsafe_b64encode(body).decode()}"

    async def revoke_token(self, name: str) -> None:
        if name not in self._engine.world.identities.tokens:
            raise NotFound(f"there is no join token {name!r}", "See `fedtide fleet token ls`")
        await self._engine.submit(JoinTokenRevoked(token=name))

    async def revoke(self, node: str, reason: str) -> None:
        """Withdraw a node's credentials: its connections end at once, wherever they are."""
        if node not in self._engine.world.identities.nodes:
            raise NotFound(f"node {node!r} has no credentials", "See `fedtide fleet ls`")
        await self._engine.submit(NodeRevoked(node=node, reason=reason))

    async def region_files(self, region: str, hosts: Sequence[str], *, rotates: bool) -> dict[str, str]:
        """What a region's servers need, by file name. Credentials of the time before stay good until the next time.

        Args:
            rotates: they are withdrawn at once.
            hosts: names under which its nodes reach the leaf, for its certificate; none: no certificate.
        """
        check_token("region", region)
        if region not in self._regions:
            raise ConfigError("region", f"there is no region {region!r}", f"There are {', '.join(self._regions)}")
        made = self._authority.region_credentials(region)
        keys = revocable({name: c.key.public for name, c in made.items()})
        certificate = self._certificate(hosts) if hosts else {}
        expires_at = datetime.fromtimestamp(min(c.expires for c in made.values()), UTC)
        await self._engine.submit(RegionIssued(region=region, keys=keys, rotates=rotates, expires_at=expires_at))
        return {
            TRUST: self._authority.trust(self._regions, self._void),
            AT_REST: self._authority.at_rest(region),
            **self._director.root_file(),
            **{name: c.text for name, c in made.items()},
            **certificate,
        }

    async def remove_region(self, region: str) -> None:
        """Forget a region, its nodes and its credentials.

        Raises:
            NotFound: nobody has heard of it.
            InvalidTransition: nodes of it are online.
        """
        world = self._engine.world
        if region not in {*world.identities.regions, *(node.region for node in world.nodes.values()), *self._regions}:
            raise NotFound(f"there is no region {region!r}", "See `fedtide region ls`")
        await self._engine.submit(RegionRemoved(region=region))

    def _certificate(self, hosts: Sequence[str]) -> dict[str, str]:
        ca_cert, ca_key = self._ca()
        cert, key = certificates.server(ca_cert, ca_key, hosts)
        return {CA_CERT: self._trusted(ca_cert), CERT: cert, KEY: key}

    def _ca(self) -> tuple[str, str]:
        """Certificate and key; raises CapabilityMissing."""
        ca = [self._folder / name for name in (CA_CERT, CA_KEY)]
        if not all(file.exists() for file in ca):
            raise CapabilityMissing("there is no authority here that signs certificates", "Use your own for the leaf")
        cert, key = (file.read_text(encoding="utf-8") for file in ca)
        return cert, key

    def _trusted(self, ca_cert: str) -> str:
        """The hub's certificate may be signed by another authority: nodes trust that one and ours."""
        hub = self._hub_ca.read_text(encoding="utf-8") if self._hub_ca is not None else ca_cert
        return hub if hub == ca_cert else f"{hub.rstrip()}\n{ca_cert}"

    async def rights(self) -> Rights:
        """Every account as the hub's servers know it now, with the rights of each role.

        Raises:
            BrokerUnavailable: no server answers.
        """
        found = []
        for name in accounts(self._subjects, self._regions):
            key = self._authority.public(name)
            raw = await self._system.ask(LIMITS_OF.format(key))
            found.append(rights_in(name, nats_jwt.read(raw.decode())))
        return Rights(accounts=found)

    def accounts(self, region: str) -> dict[str, str]:
        """Public keys of the accounts that a region's server links to the hub."""
        return self._authority.leaf_accounts(region)

    async def _on_enrolment(self, message: Received) -> tuple[bytes, dict[str, str]]:
        asker = parse_as(EnrolmentAsked, message.subject)
        try:
            asked = from_json(EnrolmentRequest, message.data, "enrolment")
        except MalformedMessage as exc:
            return _refusal(exc.what, "")
        if asked.region != asker.region:
            return _refusal(f"this is region {asker.region!r}, not {asked.region!r}", "Set the agent's region")
        if not nats_jwt.is_signed(asked.key, proof_of(asked.region, asked.node, asked.key), asked.proof):
            return _refusal("whoever asks does not hold the key that it names", "Upgrade the agent")
        return await self._issue(asked.node, asked.region, asked.key, token=asker.token)

    async def _on_renewal(self, message: Received) -> tuple[bytes, dict[str, str]]:
        asker = parse_as(RenewalAsked, message.subject)
        region, node = asker.region, asker.node
        if node == REGIONS_OWN:
            return to_json(await self._of_region(region, message.data)), {}
        try:
            asked = from_json(RenewalRequest, message.data, "renewal")
        except MalformedMessage as exc:
            return _refusal(exc.what, "")
        text, known = proof_of(region, node, asked.key), self._engine.world.identities.nodes.get(node)
        proven = nats_jwt.is_signed(asked.key, text, asked.proof) and nats_jwt.is_signed(
            asked.renews, text, asked.present
        )
        is_known = known is not None and asked.renews in [key for key, _ in known.keys]
        rejoins = not is_known and self._may_rejoin(region, node, asked)
        if not proven or not (is_known or rejoins):
            return _refusal("whoever asks does not hold both keys, the present one and the new one", "")
        return await self._issue(node, region, asked.key, renews=asked.renews, rejoins=rejoins)

    async def _of_region(self, region: str, data: bytes) -> RegionRenewalAnswer:
        """New credentials of a region's servers, asked for with those that they have."""
        try:
            asked = from_json(RegionRenewalRequest, data, "renewal")
        except MalformedMessage as exc:
            return RegionRenewalAnswer(error=exc.what)
        text = proof_of_region(region, asked.keys, asked.csr)
        if set(asked.keys) != set(REGION_FILES) or not all(map(nats_jwt.is_user_key, asked.keys.values())):
            return RegionRenewalAnswer(error=f"public nkeys of users are asked for, for {', '.join(REGION_FILES)}")
        if not nats_jwt.is_signed(asked.renews, text, asked.present):
            return RegionRenewalAnswer(error="whoever asks does not hold a present key of the region")
        keys, identities_now = revocable(asked.keys), self._engine.world.identities
        try:
            if identities_now.regions.get(region) != tuple(keys):  # else the answer was lost
                expires_at = datetime.now(UTC) + timedelta(seconds=REGION_LIFETIME_S)
                issued = RegionIssued(
                    region=region, keys=keys, rotates=False, expires_at=expires_at, renews=asked.renews
                )
                await self._engine.submit(issued)
        except InvalidTransition as exc:
            log.warning("region.refused", extra={"region": region, "reason": str(exc)})
            return RegionRenewalAnswer(error=exc.what, remedy=exc.remedy)
        certificate, note = {}, ""
        try:
            certificate = self._renewed_certificate(asked, text) if asked.csr else {}
        except (InvalidTransition, CapabilityMissing) as exc:
            note = exc.what  # it is from elsewhere, and whoever made it renews it
        log.info("region.renewed", extra={"region": region, "certificate": note or bool(certificate)})
        trust = {TRUST: self._authority.trust(self._regions, self._void)}
        jwts = self._authority.region_jwts(region, asked.keys)
        return RegionRenewalAnswer(jwts=jwts, files={**trust, **certificate}, note=note)

    def _renewed_certificate(self, asked: RegionRenewalRequest, text: bytes) -> dict[str, str]:
        """Raises InvalidTransition: the present one is not ours, or not of whoever asks; CapabilityMissing."""
        ca_cert, ca_key = self._ca()
        try:
            shown = base64.b64decode(asked.shown, validate=True)
        except binascii.Error as exc:
            raise InvalidTransition("`shown` is not base64") from exc
        made = certificates.renewed(ca_cert, ca_key, asked.csr, asked.certificate, text, shown)
        return {CA_CERT: self._trusted(ca_cert), CERT: made}

    def _may_rejoin(self, region: str, node: str, asked: RenewalRequest) -> bool:
        """Whether the node shows credentials that it got before the log was put back, and that it need not know of."""
        restored_at = self._engine.world.epoch.restored_at
        return restored_at is not None and self._authority.is_of_node(
            asked.jwt, region, node, asked.renews, until=restored_at
        )

    async def _issue(
        self, node: str, region: str, key: str, *, token: str = "", renews: str = "", rejoins: bool = False
    ) -> tuple[bytes, dict[str, str]]:
        if not nats_jwt.is_user_key(key):
            return _refusal("that is not the public nkey of a user", "")
        expires_at = datetime.now(UTC) + timedelta(seconds=NODE_LIFETIME_S)
        enrolled = NodeEnrolled(
            node=node,
            region=region,
            key=key,
            expires_at=expires_at,
            token=token,
            renews=renews,
            rejoins=rejoins,
        )
        try:
            await self._engine.submit(enrolled)
        except InvalidTransition as exc:
            log.warning("enrolment.refused", extra={"node": node, "region": region, "reason": str(exc)})
            return _refusal(exc.what, exc.remedy)
        log.info("enrolment.granted", extra={"node": node, "region": region})
        return _answer(CredentialsAnswer(jwt=self._authority.node_jwt(region, node, key)))

    def aggregator_credentials(self, run: str, life: int) -> Credentials:
        """For the aggregator of one run."""
        return self._authority.aggregator(run, life)

    def run_key(self, run: str, life: int) -> str:
        """The public key of the run's aggregators: it is withdrawn when the run has ended."""
        return self._authority.run_key(run, life).public


def revocable(keys: Mapping[str, str]) -> list[str]:
    """Of the keys of a region's processes, by file, those that can be withdrawn: not in the servers' own account."""
    return [key for file, key in keys.items() if file != REGION_SYSTEM]


def rights_in(name: str, claims: Mapping[str, Any]) -> AccountRights:
    """What the JWT of an account gives to whom."""
    about = claims["nats"]
    roles = {scope["role"]: scope["template"] for scope in about.get("signing_keys", []) if isinstance(scope, dict)}
    return AccountRights(
        account=name,
        key=claims["sub"],
        jetstream="disk_storage" in about["limits"],
        exports=sorted(each["subject"] for each in about.get("exports", [])),
        imports=sorted(each["subject"] for each in about.get("imports", [])),
        withdrawn=len(about.get("revocations", {})),
        roles={
            role: RoleRights(
                publish=template.get("pub", {}).get("allow", []),
                subscribe=template.get("sub", {}).get("allow", []),
                answers="resp" in template,
                subscriptions=template["subs"],
                payload_bytes=template["payload"],
            )
            for role, template in roles.items()
        },
    )


def _refusal(error: str, remedy: str) -> tuple[bytes, dict[str, str]]:
    return _answer(CredentialsAnswer(error=error, remedy=remedy))


def _answer(issued: CredentialsAnswer) -> tuple[bytes, dict[str, str]]:
    return to_json(issued), {}

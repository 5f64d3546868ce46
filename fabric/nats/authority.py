"""The authority of an installation: what it signs, and with which key. Pure but for `load` and `save`.

The operator's own key signs once and is handed out, to be kept offline: it can replace the others. Accounts are signed
by the operator's signing key. Nobody holds the key of an account; each role has a signing key of its own, whose scope
(in the account's JWT) gives its users exactly the role's rights. These keys are derived from one secret, so that a new
region needs nothing to be stored. Accounts have no default permissions: when an account changes, nats-server 2.15 puts
them in the place of its users' rights.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.accounts import CORE, NODES, RUNS, Account, accounts, leaf_account, region_account
from fedtide.fabric.nats.credentials import Credentials, write_secret
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.nats.permissions import AGGREGATOR, COLLECTS, FOLDS, JOINER, NODE, RENEWS, SYSTEM, SYSTEM_LEAF
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.strict import Strict

FILE = "authority.json"
TRUST = "trust.conf"
"""A part of nats-server's configuration: whom a server trusts. It holds no secret."""
AT_REST = "at-rest.conf"
"""A part of `jetstream { }`: with which key a server encrypts what it stores."""
COORDINATOR = "coordinator.creds"
SYSTEM_CREDENTIALS = "system.creds"
SIGNER = "signer.creds"
OPERATOR = "operator.seed"
LEAF, REGION_SYSTEM, COLLECTOR, REGIONAL, RENEWAL = REGION_FILES = (
    "leaf.creds",
    "system.creds",
    "collector.creds",
    "regional.creds",
    "renewal.creds",
)
"""Credentials of a region's processes."""

NODE_LIFETIME_S = 90 * 86_400.0
RUN_LIFETIME_S = 30 * 86_400.0
REGION_LIFETIME_S = 400 * 86_400.0

_UNLIMITED: dict[str, object] = dict.fromkeys(("subs", "data", "payload", "imports", "exports"), -1)
_STORAGE: dict[str, object] = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


Void = Mapping[str, tuple[datetime, datetime]]
"""Keys that are withdrawn: since when, and when they would have expired."""
ALL_ISSUED = "*"
"""In the place of a key: all that was issued until then is withdrawn."""


class _Kept(Strict):
    """`account` and `system` are public keys. `revoked_before`: no credentials of these accounts from before count.

    `storage_bytes`: that the streams of the account may have in all (-1: as much as there is).
    """

    tenant: str
    operator_jwt: str
    signing_seed: str
    account: str
    system: str
    secret: str
    revoked_before: int = 0
    storage_bytes: int = -1


class _KeptBefore(Strict):
    """As versions before 0.2 kept it: one account for all, whose own key signed every user."""

    tenant: str
    operator_jwt: str
    signing_seed: str
    account_seed: str
    system_seed: str


class Authority:
    """Signs for one installation. `load` reads what `create` has left in a folder."""

    def __init__(self, kept: _Kept) -> None:
        self._kept = kept
        self._signing = Key.of(kept.signing_seed)
        self.subjects = Subjects(kept.tenant)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Raises ConfigError if the folder holds no authority."""
        try:
            return cls.parse((folder / FILE).read_bytes(), str(folder / FILE))
        except OSError as exc:
            raise ConfigError(
                str(folder / FILE), f"cannot be read: {exc.strerror}", "`fedtide up` and the Helm chart's hook make one"
            ) from exc

    @classmethod
    def parse(cls, text: bytes, path: str = FILE) -> Authority:
        """Raises ConfigError if it is no authority of this version."""
        try:
            return cls(_Kept.model_validate_json(text))
        except ValidationError as exc:
            if _of_before(text) is not None:
                raise ConfigError(path, "is of a version before 0.2", "See docs/upgrading.md, `Accounts`") from exc
            raise ConfigError(path, f"is no authority: {exc.errors()[0]['msg']}") from exc

    @classmethod
    def create(cls, tenant: str) -> tuple[Authority, str]:
        """The authority of a new installation, and the seed of its operator, which must be kept elsewhere."""
        operator, signing = Key.new(nats_jwt.OPERATOR), Key.new(nats_jwt.OPERATOR)
        secret = secrets.token_hex(32)
        account, system = _nobodys_key(secret, CORE), _nobodys_key(secret, SYSTEM)
        about = {"system_account": system, "signing_keys": [signing.public]}
        jwt = nats_jwt.sign("operator", operator.public, "fedtide", about, operator)
        kept = _Kept(
            tenant=tenant, operator_jwt=jwt, signing_seed=signing.seed, account=account, system=system, secret=secret
        )
        return cls(kept), operator.seed

    @classmethod
    def migrated(cls, text: bytes) -> Authority | None:
        """The authority of an installation of a version before 0.2, which keeps its streams; None if it is not one.

        All credentials that were made before are void: they were of the account that holds the streams.
        """
        old = _of_before(text)
        if old is None:
            return None
        kept = _Kept(
            tenant=old.tenant,
            operator_jwt=old.operator_jwt,
            signing_seed=old.signing_seed,
            account=Key.of(old.account_seed).public,
            system=Key.of(old.system_seed).public,
            secret=secrets.token_hex(32),
            revoked_before=int(time.time()) - 1,
        )
        return cls(kept)

    def of_tenant(self, tenant: str, nonce: str, storage_bytes: int | None) -> Authority:
        """The authority of a tenant, as its own regions know it: nothing in it names this installation.

        It is the same for the same nonce. Its accounts live on this installation's hub (`on_hub`).
        """
        secret = self.derived(f"tenant/{tenant}/{nonce}").hex()
        operator, signing = (_derived(secret, label, nats_jwt.OPERATOR) for label in ("operator", "signing"))
        account, system = _nobodys_key(secret, CORE), _nobodys_key(secret, SYSTEM)
        about = {"system_account": system, "signing_keys": [signing.public]}
        return Authority(
            _Kept(
                tenant=tenant,
                operator_jwt=nats_jwt.sign("operator", operator.public, "fedtide", about, operator, issued=1.0),
                signing_seed=signing.seed,
                account=account,
                system=system,
                secret=secret,
                storage_bytes=-1 if storage_bytes is None else storage_bytes,
            )
        )

    def on_hub(self, tenant: Authority) -> Authority:
        """The same accounts of a tenant, signed so that this installation's hub takes them."""
        return Authority(tenant._kept.model_copy(update={"signing_seed": self._kept.signing_seed}))

    def with_room(self, storage_bytes: int) -> Authority:
        """The same, but for what the streams of the account may have in all."""
        return Authority(self._kept.model_copy(update={"storage_bytes": storage_bytes}))

    def derived(self, label: str) -> bytes:
        """32 bytes that only coordinators know, the same whenever they are asked for."""
        return _digest(self._kept.secret, label)

    def save(self, folder: Path, regions: Sequence[str]) -> None:
        """Write everything that the coordinator and its servers need into a folder."""
        files = self.files(regions)
        for name in sorted(files, key=lambda name: name == FILE):  # the last: it says that the others are there
            write_secret(folder / name, files[name])

    def files(self, regions: Sequence[str]) -> dict[str, str]:
        return {FILE: self._kept.model_dump_json(), TRUST: self.trust(regions), **self.of_coordinators()}

    def of_coordinators(self, lifetime_s: float | None = None) -> dict[str, str]:
        """New credentials of coordinators, by file; those before stay good until they expire."""
        return {
            COORDINATOR: self.credentials(CORE, permissions.COORDINATOR, "coordinator", lifetime_s=lifetime_s).text,
            SYSTEM_CREDENTIALS: self.credentials(SYSTEM, SYSTEM, "coordinator", lifetime_s=lifetime_s).text,
        }

    def of_release_authority(self) -> Credentials:
        """New credentials of the release authority."""
        return self.credentials(RUNS, permissions.SIGNS, "release-authority")

    def public(self, account: str) -> str:
        """The public key of an account."""
        if account == CORE:
            return self._kept.account
        return self._kept.system if account == SYSTEM else _nobodys_key(self._kept.secret, account)

    def account_jwts(self, regions: Sequence[str], void: Callable[[str], Void] = lambda _: {}) -> dict[str, str]:
        """Every account but the servers' own, by name. The same arguments give the same text.

        A server that gets an account anew lets go of what is under way in it, unless the text is the same. It keeps
        what was issued last: so a leader that was frozen does not cover what its successor has withdrawn.

        Args:
            void: keys of an account that are not let in, whatever date their credentials have.
        """
        return {
            name: self._account(name, about, void(name)) for name, about in accounts(self.subjects, regions).items()
        }

    def _account(self, name: str, about: Account, void: Void) -> str:
        limits = {**_UNLIMITED, "wildcards": True, "conn": about.clients, "leaf": about.links}
        storage = {**_STORAGE, "disk_storage": self._kept.storage_bytes} if name == CORE else _STORAGE
        # Until the key's own end: credentials may have been dated by a clock that was ahead.
        revoked = {key: int(ends.timestamp()) for key, (_, ends) in void.items()}
        if name == CORE and self._kept.revoked_before:
            revoked[ALL_ISSUED] = self._kept.revoked_before
        claims: dict[str, object] = {
            "limits": {**limits, **(storage if about.jetstream else {})},
            "signing_keys": self._scopes(name),
            "exports": [each.claims() for each in about.exports],
            "imports": [each.claims(self.public(each.account)) for each in about.imports],
        }
        if revoked:
            claims["revocations"] = revoked
        title = self.subjects.tenant if name == CORE else f"{self.subjects.tenant} {name}"
        issued = max([self._issued, *(at.timestamp() for at, _ in void.values())])
        return nats_jwt.sign("account", self.public(name), title, claims, self._signing, issued=issued)

    @property
    def _issued(self) -> float:
        """When accounts were issued of which nothing was withdrawn: after those of versions before 0.2."""
        return float(self._kept.revoked_before + 1)

    def _scopes(self, account: str) -> list[dict[str, object]]:
        return [
            {"kind": "user_scope", "key": self._key(account, role).public, "role": role, "template": allowed.claims()}
            for role, allowed in permissions.of_account(self.subjects, account).items()
        ]

    def _key(self, account: str, role: str) -> Key:
        """The key that signs the users of a role."""
        return _derived(self._kept.secret, f"{account}/{role}", nats_jwt.ACCOUNT)

    def system_jwt(self) -> str:
        """The servers' own account. On the hub, that of a tenant is an account like others."""
        limits = {**_UNLIMITED, "wildcards": True, "conn": -1, "leaf": -1}
        claims: dict[str, object] = {"limits": limits, "signing_keys": self._scopes(SYSTEM)}
        if self._kept.revoked_before:
            claims["revocations"] = {ALL_ISSUED: self._kept.revoked_before}
        return nats_jwt.sign("account", self.public(SYSTEM), "SYS", claims, self._signing, issued=self._issued)

    def trust(self, regions: Sequence[str], void: Callable[[str], Void] = lambda _: {}) -> str:
        """What a nats-server has to know (https://docs.nats.io, "JWT resolver")."""
        known = [self.system_jwt(), *self.account_jwts(regions, void).values()]
        lines = "".join(f"  {nats_jwt.read(jwt)['sub']}: {jwt}\n" for jwt in known)
        return (
            f"operator: {self._kept.operator_jwt}\n"
            f"system_account: {self.public(SYSTEM)}\n"
            f"resolver_preload: {{\n{lines}}}\n"
        )

    def at_rest(self, server: str) -> str:
        """The key of the hub, or of a region's server: always the same, so that a backup of this opens old volumes."""
        return f'cipher: chachapoly\nkey: "k{_digest(self._kept.secret, f"at-rest/{server}").hex()}"\n'

    def user_jwt(
        self, account: str, role: str, name: str, key: str, *, region: str = "", lifetime_s: float | None = None
    ) -> str:
        """Lets the holder of `key` in as `name`; its rights are those of the role."""
        tags = [f"role:{role}", *([f"region:{region}"] if region else [])]
        about = {"issuer_account": self.public(account), "tags": tags}
        expires = None if lifetime_s is None else time.time() + lifetime_s
        return nats_jwt.sign("user", key, name, about, self._key(account, role), expires=expires)

    def credentials(
        self, account: str, role: str, name: str, *, region: str = "", lifetime_s: float | None = None
    ) -> Credentials:
        """Credentials with a key of their own."""
        key = Key.new(nats_jwt.USER)
        jwt = self.user_jwt(account, role, name, key.public, region=region, lifetime_s=lifetime_s)
        return Credentials(jwt, key)

    def node_jwt(self, region: str, node: str, key: str) -> str:
        return self.user_jwt(NODES, NODE, node, key, region=region, lifetime_s=NODE_LIFETIME_S)

    def is_of_node(self, jwt: str, region: str, node: str, key: str, *, until: datetime) -> bool:
        """Whether this authority gave a node these credentials for this key, until then; they are not expired."""
        try:
            claims = nats_jwt.signed_by(jwt, self._key(NODES, NODE).public)
            tags, issued, ends = claims["nats"]["tags"], float(claims["iat"]), float(claims.get("exp", 0))
        except (MalformedMessage, KeyError, TypeError, ValueError):
            return False
        about = claims.get("name"), claims.get("sub"), f"region:{region}" in tags
        return about == (node, key, True) and issued <= until.timestamp() and ends > time.time()

    def joiner(self, token: str, lifetime_s: float) -> Credentials:
        return self.credentials(NODES, JOINER, token, lifetime_s=lifetime_s)

    def aggregator(self, run: str, life: int = 1) -> Credentials:
        """Of all attempts of a run until it ends; the same whenever it is asked for, but for its dates.

        Args:
            life: 1, and one more each time that the run goes on after its end.
        """
        key = self.run_key(run, life)
        return Credentials(self.user_jwt(RUNS, AGGREGATOR, run, key.public, lifetime_s=RUN_LIFETIME_S), key)

    def run_key(self, run: str, life: int = 1) -> Key:
        label = f"run/{run}" if life == 1 else f"run/{run}/{life}"
        return _derived(self._kept.secret, label, nats_jwt.USER)

    def region_credentials(self, region: str) -> dict[str, Credentials]:
        """What the processes of a region need, by file name."""

        keys = {file: Key.new(nats_jwt.USER) for file in REGION_FILES}
        jwts = self.region_jwts(region, {file: key.public for file, key in keys.items()})
        return {file: Credentials(jwt, keys[file]) for file, jwt in jwts.items()}

    def region_jwts(self, region: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Lets the holders of `keys` in as the processes of a region; both by the names in `REGION_FILES`."""
        users = {
            LEAF: (region_account(region), "leaf", f"leaf-{region}", ""),
            REGION_SYSTEM: (SYSTEM, SYSTEM_LEAF, f"leaf-{region}", ""),
            COLLECTOR: (NODES, COLLECTS, f"collector-{region}", region),
            REGIONAL: (NODES, FOLDS, f"regional-{region}", region),
            RENEWAL: (NODES, RENEWS, f"renewal-{region}", region),
        }
        return {
            file: self.user_jwt(account, role, name, keys[file], region=of, lifetime_s=REGION_LIFETIME_S)
            for file, (account, role, name, of) in users.items()
        }

    def leaf_accounts(self, region: str) -> dict[str, str]:
        """Public keys of the accounts that a region's server links to the hub, and of the hub's own."""
        return {"region": self.public(leaf_account(region)), "system": self.public(SYSTEM), "hub": self.public(CORE)}


def _of_before(text: bytes) -> _KeptBefore | None:
    try:
        return _KeptBefore.model_validate_json(text)
    except ValidationError:
        return None


def _digest(secret: str, label: str) -> bytes:
    return hmac.new(bytes.fromhex(secret), label.encode(), hashlib.sha256).digest()


def _derived(secret: str, label: str, kind: int) -> Key:
    return Key.from_bytes(_digest(secret, label), kind)


def _nobodys_key(secret: str, account: str) -> str:
    """A public key whose private one nobody knows: all that it signs is signed by others."""
    return nats_jwt.public_key(_digest(secret, f"account/{account}"), nats_jwt.ACCOUNT)

"""The authority of an installation: the operator's signing key, the tenant's account, and what they sign.

The operator's own key is created, signs once and is handed out, to be kept offline: it can replace the other keys.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats import permissions
from fedtide.fabric.nats.credentials import Credentials, write_secret
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.nats.permissions import Permissions
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.strict import Strict

FILE = "authority.json"
TRUST = "trust.conf"
"""A part of nats-server's configuration: whom a server trusts. It holds no secret."""
COORDINATOR = "coordinator.creds"
SYSTEM = "system.creds"
OPERATOR = "operator.seed"

NODE_LIFETIME_S = 90 * 86_400.0
RUN_LIFETIME_S = 30 * 86_400.0

_UNLIMITED: dict[str, object] = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
_STORAGE: dict[str, object] = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
_ANYTHING: dict[str, object] = {"pub": {}, "sub": {}}


class _Kept(Strict):
    tenant: str
    operator_jwt: str
    signing_seed: str
    account_seed: str
    system_seed: str


class Authority:
    """Signs for one installation. `load` reads what `create` has left in a folder."""

    def __init__(self, kept: _Kept) -> None:
        self._operator_jwt = kept.operator_jwt
        self._signing = Key.of(kept.signing_seed)
        self._account = Key.of(kept.account_seed)
        self._system = Key.of(kept.system_seed)
        self._kept = kept
        self.subjects = Subjects(kept.tenant)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Raises ConfigError if the folder holds no authority."""
        try:
            return cls(_Kept.model_validate_json((folder / FILE).read_bytes()))
        except OSError as exc:
            raise ConfigError(
                str(folder / FILE), f"cannot be read: {exc.strerror}", "`fedtide up` and the Helm chart's hook make one"
            ) from exc
        except ValidationError as exc:
            raise ConfigError(str(folder / FILE), f"is no authority: {exc.errors()[0]['msg']}") from exc

    @classmethod
    def create(cls, tenant: str) -> tuple[Authority, str]:
        """The authority of a new installation, and the seed of its operator, which must be kept elsewhere."""
        operator, signing = Key.new(nats_jwt.OPERATOR), Key.new(nats_jwt.OPERATOR)
        account, system = Key.new(nats_jwt.ACCOUNT), Key.new(nats_jwt.ACCOUNT)
        about = {"system_account": system.public, "signing_keys": [signing.public]}
        jwt = nats_jwt.sign("operator", operator.public, "fedtide", about, operator)
        kept = _Kept(
            tenant=tenant,
            operator_jwt=jwt,
            signing_seed=signing.seed,
            account_seed=account.seed,
            system_seed=system.seed,
        )
        return cls(kept), operator.seed

    def save(self, folder: Path) -> None:
        """Write everything that the coordinator and its servers need into a folder."""
        for name, text in self.files().items():
            write_secret(folder / name, text)

    def files(self) -> dict[str, str]:
        coordinator = self.credentials("coordinator", permissions.everything("coordinator"))
        return {
            FILE: self._kept.model_dump_json(),
            TRUST: self.trust(),
            COORDINATOR: coordinator.text,
            SYSTEM: self.system_credentials("coordinator", permissions.system()).text,
        }

    @property
    def account(self) -> str:
        """The public key of the tenant's account."""
        return self._account.public

    @property
    def system_account(self) -> str:
        return self._system.public

    def account_jwt(self, withdrawn: Mapping[str, datetime] | None = None) -> str:
        """The tenant's account; keys in `withdrawn` are let in only with credentials made after that time."""
        about: dict[str, object] = {"limits": {**_UNLIMITED, "wildcards": True, **_STORAGE}}
        issued: float | None = None
        if withdrawn:
            issued = max(withdrawn.values()).timestamp()
            about["revocations"] = {key: int(at.timestamp()) for key, at in withdrawn.items()}
        return nats_jwt.sign(
            "account",
            self._account.public,
            self.subjects.tenant,
            {**about, "default_permissions": _ANYTHING},
            self._signing,
            issued=issued,
        )

    def trust(self, withdrawn: Mapping[str, datetime] | None = None) -> str:
        """What a nats-server has to know (https://docs.nats.io, "JWT resolver")."""
        system = nats_jwt.sign(
            "account",
            self._system.public,
            "SYS",
            {"limits": {**_UNLIMITED, "wildcards": True}, "default_permissions": _ANYTHING},
            self._signing,
        )
        return (
            f"operator: {self._operator_jwt}\n"
            f"system_account: {self._system.public}\n"
            "resolver_preload: {\n"
            f"  {self._system.public}: {system}\n"
            f"  {self._account.public}: {self.account_jwt(withdrawn)}\n"
            "}\n"
        )

    def user_jwt(self, name: str, key: str, allowed: Permissions, lifetime_s: float | None = None) -> str:
        return _user(self._account, name, key, allowed, lifetime_s)

    def credentials(self, name: str, allowed: Permissions, lifetime_s: float | None = None) -> Credentials:
        """Credentials with a key of their own."""
        return _credentials(self._account, name, allowed, lifetime_s)

    def system_credentials(self, name: str, allowed: Permissions) -> Credentials:
        return _credentials(self._system, name, allowed, None)

    def region_credentials(self, region: str) -> dict[str, Credentials]:
        """What the processes of a region need, by file name. Only `system` is not of the tenant's account."""
        subjects = self.subjects
        return {
            "leaf.creds": self.credentials(f"leaf-{region}", permissions.leaf(subjects, region)),
            "system.creds": self.system_credentials(f"leaf-{region}", permissions.leaf_system()),
            "collector.creds": self.credentials(f"collector-{region}", permissions.collector(subjects, region)),
            "regional.creds": self.credentials(f"regional-{region}", permissions.folder(subjects, region)),
        }


def _credentials(account: Key, name: str, allowed: Permissions, lifetime_s: float | None) -> Credentials:
    key = Key.new(nats_jwt.USER)
    return Credentials(_user(account, name, key.public, allowed, lifetime_s), key)


def _user(account: Key, name: str, key: str, allowed: Permissions, lifetime_s: float | None) -> str:
    about = {"subs": -1, "data": -1, "payload": -1, **allowed.claims()}
    expires = None if lifetime_s is None else time.time() + lifetime_s
    return nats_jwt.sign("user", key, name, about, account, expires=expires)

"""What serving a tenant takes: accounts derived from the installation's secret, and a folder of keys that it seals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from fedtide.coordinator.config import CoordinatorConfig, TrackingRules
from fedtide.coordinator.identity.installation_secrets import API_TOKEN
from fedtide.coordinator.identity.tenants import Tenant
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.tenants import Files
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.authority import Authority, Void
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.nats.permissions import STORES, claims_of

FOLDER = "tenants"


class TenantKeys:
    """Of one installation. `config`: of its coordinator."""

    def __init__(self, config: CoordinatorConfig, authority: Authority) -> None:
        self._config = config
        self._authority = authority
        self._fernet = Fernet(base64.urlsafe_b64encode(authority.derived("sealed")))

    def authority_of(self, tenant: Tenant) -> Authority:
        """As the tenant's own regions know it."""
        return self._authority.of_tenant(tenant.name, tenant.added.nonce, tenant.quota.bytes)

    def on_hub(self, tenant: Tenant) -> Authority:
        """The same, as the hub knows it."""
        return self._authority.on_hub(self.authority_of(tenant))

    def sealed(self, files: Files) -> str:
        return self._fernet.encrypt(json.dumps(files).encode()).decode()

    def files_of(self, tenant: Tenant) -> Files:
        """Raises ConfigError: another installation has sealed them."""
        try:
            files: Files = json.loads(self._fernet.decrypt(tenant.sealed.encode()))
        except InvalidToken as exc:
            raise ConfigError(
                f"tenant {tenant.name}",
                "its keys were sealed by another authority than the one in the folder of identities",
                "Put that back, or remove the tenant and add it anew",
            ) from exc
        return files

    def folder_of(self, tenant: Tenant) -> Path:
        """A later tenant of the same name has another one: what is remembered of this one's log is not about it."""
        return (self._config.data_dir / FOLDER / f"{tenant.name}-{tenant.added.nonce[:8]}").resolve()

    def written(self, tenant: Tenant) -> CoordinatorConfig:
        """The configuration of the tenant's coordinator; what it reads is written down. Raises ConfigError."""
        config = config_of(self._config, tenant, self.folder_of(tenant))
        assert config.identity_dir is not None
        for name, text in {**self.files_of(tenant), **self.authority_of(tenant).of_coordinators()}.items():
            write_secret(config.identity_dir / name, text)
        return config


async def publish(
    system: Broker, on_hub: Authority, regions: Sequence[str], void: Callable[[str], Void] = lambda _: {}
) -> None:
    """Let the hub know a tenant's accounts. What has been withdrawn since stays so: that is issued later."""
    for jwt in (on_hub.system_jwt(), *reversed(on_hub.account_jwts(regions, void).values())):
        await system.tell(claims_of(nats_jwt.read(jwt)["sub"]), jwt.encode())
    await system.ask(STORES, b"{}")  # the hub answers in the order in which it is asked


def config_of(host: CoordinatorConfig, tenant: Tenant, folder: Path) -> CoordinatorConfig:
    """The configuration of a tenant's coordinator. Channels and servers that the installation may use are its own."""
    identity = folder / "identity"
    change: dict[str, object] = {
        "tenant": tenant.name,
        "regions": list(tenant.regions),
        "identity_dir": identity,
        "data_dir": folder,
        "http_token_file": identity / API_TOKEN,
        "endpoint_file": None,
        "notify": {},
        "prometheus": {},
        "tracking": TrackingRules(allowed=False),  # it would be this process that calls whatever a tenant names
        "warm_aggregator": False,  # 140 MB for each
        "releases_signed_by": tenant.added.releases_signed_by,
    }
    if host.oidc is not None:
        roles = host.oidc.tenants.get(tenant.name)
        of_tenant = roles.model_dump() if roles is not None else {"roles": {}, "default_role": None}
        change["oidc"] = host.oidc.model_copy(update=of_tenant)
    if host.kubernetes is not None:
        namespace = tenant.added.namespace or host.kubernetes.namespace
        change["kubernetes"] = host.kubernetes.model_copy(update={"tenant": tenant.name, "namespace": namespace})
    return host.model_copy(update=change)

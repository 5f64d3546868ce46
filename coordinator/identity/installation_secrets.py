"""The secrets of one installation: an authority, certificates, and the API's token. Pure.

Two sets: what only coordinators may know, and what every server of the installation needs.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fedtide.coordinator.identity import certificates
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.nats.authority import AT_REST, COORDINATOR, FILE, OPERATOR, TRUST, Authority
from fedtide.fabric.nats.credentials import Credentials
from fedtide.fabric.nats.subjects import HUB_REGION

API_TOKEN = "api-token"  # noqa: S105  # the name of a file
CA_CERT, CA_KEY = "ca.crt", "ca.key"
CERT, KEY = "tls.crt", "tls.key"

RENEWED_AT = 0.5
"""Of the lifetime of the coordinators' credentials, if they have one."""

Files = dict[str, str]


@dataclass(frozen=True, slots=True)
class Wants:
    """`lifetime_s`: of the coordinators' credentials; None: they do not end. `renew`: all that may be, in any case."""

    lifetime_s: float | None = None
    renew: bool = False


UNLIMITED = Wants()


def complete(
    own: Mapping[str, str],
    shared: Mapping[str, str],
    tenant: str,
    hosts: Sequence[str],
    regions: Sequence[str],
    wants: Wants = UNLIMITED,
) -> tuple[Files, Files]:
    """The existing files, completed and with what expires soon renewed; an authority is never replaced.

    One of a version before 0.2 is brought to this one: the streams stay, all credentials become void.

    Args:
        own: what coordinators know.
        shared: what servers know.
        hosts: names and addresses under which servers are reached; the first names the certificate.
        regions: those that take part; servers learn their accounts.
        wants: how long the coordinators' credentials are good for; those that are good for another time are replaced.

    Raises:
        ConfigError: a certificate cannot be renewed, because the key of its authority is not here.
    """
    own, shared = dict(own), dict(shared)
    if FILE not in own:
        authority, operator_seed = Authority.create(tenant)
        own |= {**authority.files(regions), OPERATOR: operator_seed}
    elif (migrated := Authority.migrated(own[FILE].encode())) is not None:
        own |= migrated.files(regions)
    authority = Authority.parse(own[FILE].encode())
    own[TRUST] = authority.trust(regions)
    if wants.renew or _is_to_be_replaced(own, wants.lifetime_s):
        own |= authority.of_coordinators(wants.lifetime_s)
    own.setdefault(API_TOKEN, secrets.token_urlsafe(32))
    if CA_KEY not in own and wants.renew:
        raise ConfigError(CA_KEY, "is not in the Secret of the identity", "Renew the certificates where their key is")
    if CA_KEY not in own:
        own[CA_CERT], own[CA_KEY] = certificates.authority("fedtide")
        shared.pop(CERT, None)
    own.setdefault(CA_CERT, shared.get(CA_CERT, ""))
    shared[CA_CERT] = own[CA_CERT]
    shared[TRUST] = own[TRUST]
    shared[AT_REST] = authority.at_rest(HUB_REGION)
    if wants.renew or CERT not in shared or not certificates.is_good(shared[CERT], hosts):
        shared[CERT], shared[KEY] = certificates.server(shared[CA_CERT], own[CA_KEY], hosts, connects=True)
    return own, shared


def warnings(held: Credentials) -> list[str]:
    """What to say of the coordinators' credentials: nobody has renewed them when they should have been."""
    if held.lifetime_left >= RENEWED_AT:
        return []
    ends = datetime.fromtimestamp(held.expires, UTC)
    return [f"the coordinators' credentials end on {ends:%Y-%m-%d}: see the rotation's Jobs, or upgrade the release"]


def _is_to_be_replaced(own: Mapping[str, str], lifetime_s: float | None) -> bool:
    if COORDINATOR not in own:
        return True
    held = Credentials.parse(own[COORDINATOR])
    if (held.lifetime_s is None) != (lifetime_s is None):
        return True
    differs = lifetime_s is not None and abs(lifetime_s - (held.lifetime_s or 0)) > 1
    return differs or held.lifetime_left < RENEWED_AT

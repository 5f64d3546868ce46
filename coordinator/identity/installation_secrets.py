"""The secrets of one installation: an authority, certificates, and the API's token. Pure.

Two sets: what only coordinators may know, and what every server of the installation needs.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedtide.coordinator.identity import certificates
from fedtide.fabric.nats.authority import AT_REST, FILE, OPERATOR, TRUST, Authority
from fedtide.fabric.nats.subjects import HUB_REGION

API_TOKEN = "api-token"  # noqa: S105  # the name of a file
CA_CERT, CA_KEY = "ca.crt", "ca.key"
CERT, KEY = "tls.crt", "tls.key"

Files = dict[str, str]


def complete(
    own: Mapping[str, str], shared: Mapping[str, str], tenant: str, hosts: Sequence[str], regions: Sequence[str]
) -> tuple[Files, Files]:
    """The existing files, completed and with soon expiring certificates renewed; an authority is never replaced.

    One of a version before 0.2 is brought to this one: the streams stay, all credentials become void.

    Args:
        own: what coordinators know.
        shared: what servers know.
        hosts: names and addresses under which servers are reached; the first names the certificate.
        regions: those that take part; servers learn their accounts.
    """
    own, shared = dict(own), dict(shared)
    if FILE not in own:
        authority, operator_seed = Authority.create(tenant)
        own |= {**authority.files(regions), OPERATOR: operator_seed}
    elif (migrated := Authority.migrated(own[FILE].encode())) is not None:
        own |= migrated.files(regions)
    authority = Authority.parse(own[FILE].encode())
    own[TRUST] = authority.trust(regions)
    own.setdefault(API_TOKEN, secrets.token_urlsafe(32))
    if CA_KEY not in own:
        own[CA_CERT], own[CA_KEY] = certificates.authority("fedtide")
        shared.pop(CERT, None)
    own.setdefault(CA_CERT, shared.get(CA_CERT, ""))
    shared[CA_CERT] = own[CA_CERT]
    shared[TRUST] = own[TRUST]
    shared[AT_REST] = authority.at_rest(HUB_REGION)
    if CERT not in shared or not certificates.is_good(shared[CERT], hosts):
        shared[CERT], shared[KEY] = certificates.server(shared[CA_CERT], own[CA_KEY], hosts, connects=True)
    return own, shared

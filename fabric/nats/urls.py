"""Which addresses of a broker are taken: TLS everywhere but on the machine itself. Pure."""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from fedtide.fabric.errors import ConfigError

TLS = "tls"


def check_url(path: str, url: str) -> str:
    """Return `url` if it is an address of a NATS server that one may connect to.

    Raises:
        ConfigError: it is none, or leads over a network without TLS.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname or "", parts.port
    except ValueError as exc:
        raise ConfigError(path, f"{url!r} is no address: {exc}", "For example tls://leaf.example.com:4222") from exc
    if parts.scheme not in (TLS, "nats") or not host:
        raise ConfigError(path, f"{url!r} is no address of a NATS server", "For example tls://leaf.example.com:4222")
    if parts.scheme != TLS and not _is_here(host):
        remedy = f"Write tls://{parts.netloc}, and give its authority as ca_file; nats:// is for this machine only"
        raise ConfigError(path, f"{url!r} would send credentials and models unencrypted", remedy)
    return url


def _checked(url: str) -> str:
    try:
        return check_url("nats_url", url)
    except ConfigError as exc:
        raise ValueError(str(exc).removeprefix("nats_url: ")) from exc


NatsUrl = Annotated[str, AfterValidator(_checked)]
"""A field that holds the address of a NATS server."""


def is_tls(url: str) -> bool:
    return urlsplit(url).scheme == TLS


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

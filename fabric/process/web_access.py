"""Who may call a small HTTP API: whoever shows its token; and never a page of another site."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fedtide.fabric.errors import ConfigError

log = logging.getLogger(__name__)

COOKIE = "fedtide"
"""Holds the token of a browser that has shown it to the page. Other sites' requests carry no such cookie. A tenant's
has the tenant's name behind it: a browser may be logged in to both."""
SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
"""What a page of any site may send without asking first (https://fetch.spec.whatwg.org, "simple header")."""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: an address of the loopback network, or `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class TokenFile:
    """The token in a file, read again when the file has changed; one that cannot be read then leaves the old one."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError if it cannot be read, or is empty."""
        self._file = file
        self._token = _read(file)
        self._seen = self._changed()

    def _changed(self) -> tuple[int, int]:
        found = self._file.stat()
        return found.st_mtime_ns, found.st_ino

    def shown_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has `Authorization: Bearer TOKEN`."""
        try:
            if (changed := self._changed()) != self._seen:
                self._token, self._seen = _read(self._file), changed
        except (OSError, ConfigError) as exc:
            log.warning("access.token_not_read", extra={"reason": str(exc)})
        scheme, _, shown = headers.get("Authorization", "").partition(" ")
        found = shown.strip().encode("utf-8", "surrogateescape")
        return scheme.lower() == "bearer" and hmac.compare_digest(found, self._token)


def _read(file: Path) -> bytes:
    try:
        token = file.read_text(encoding="utf-8").strip().encode()
    except OSError as exc:
        raise ConfigError("http_token_file", f"{file} cannot be read: {exc.strerror}") from exc
    if not token:
        raise ConfigError("http_token_file", f"{file} is empty")
    return token


def why_foreign(headers: Mapping[str, str], *, listens_on: str) -> str | None:
    """Why a request comes from a page of another site, or through a name that somebody else has made up; None if not.

    Args:
        listens_on: the address that the server is bound to.
    """
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"a page of {origin[:100]} may not call this"
    if is_loopback(listens_on) and not is_loopback(_name(host)):
        return f"{host[:100]!r} is not a name of this machine"
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return f"a body of {kind} is not taken" if kind in SIMPLE_TYPES else None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""

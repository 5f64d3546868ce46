"""The servers that a client may call, and its credentials. Credentials are sent to the API's own servers only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fedtide.console.home import TENANT, Home
from fedtide.console.stored_logins import token_for
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.tenants import TENANT_NAME

SERVER = "FEDTIDE_SERVER"
CA = "FEDTIDE_CA"
"""Environment variable: CA file for https servers; default: the CAs that the machine trusts."""
TOKEN = "FEDTIDE_TOKEN"  # noqa: S105  # the name of a variable


@dataclass(frozen=True, slots=True)
class Servers:
    """The coordinators of one installation: any of `urls` knows which one leads."""

    urls: tuple[str, ...]
    token: str = ""
    ca: Path | None = None

    def __post_init__(self) -> None:
        for url in self.urls:
            _check(url)
        if not self.urls:
            raise ConfigError(SERVER, "names no server", "For example http://127.0.0.1:8080")
        if not self.token.isascii() or not self.token.isprintable():
            raise ConfigError(TOKEN, "holds a line break or another character that no header can", "Copy it anew")

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None) -> Servers:
        """`$FEDTIDE_SERVER` (one or more, by commas), or the installation that is up in the present home.

        Raises:
            ConfigError: a variable that cannot be used.
            NotFound: none is up.
        """
        env = os.environ if environment is None else environment
        named = [url.strip().rstrip("/") for url in env.get(SERVER, "").split(",") if url.strip()]
        ca, home = env.get(CA), Home.of_caller()
        if not named and not env.get(TOKEN):
            return cls.of(home, home.state().apis)
        urls = [_of_tenant(url, env.get(TENANT, "")) for url in named or home.state().apis]
        token = env.get(TOKEN, "").strip() or next(filter(None, map(token_for, urls)), "")
        if not token and home.tenant:
            token = cls.of(home, urls).token  # whoever names a tenant means its folder in this home
        return cls(tuple(urls), token, Path(ca) if ca else None)

    @classmethod
    def of(cls, home: Home, urls: Iterable[str]) -> Servers:
        """The servers of the installation of a home, with its token."""
        try:
            token = home.api_token_file.read_text(encoding="utf-8").strip()
        except OSError:
            token = ""
        return cls(tuple(_of_tenant(url, home.tenant) for url in urls), token)

    def may_follow(self, came_from: str, location: str) -> bool:
        """Whether a redirect to the leader may be followed: never from https to plain http."""
        there = urlsplit(location)
        return there.scheme in ("http", "https") and not (
            urlsplit(came_from).scheme == "https" and there.scheme == "http"
        )


def _of_tenant(url: str, tenant: str) -> str:
    """Where a tenant's API begins; a URL may name the tenant by itself."""
    if not tenant or urlsplit(url).path.strip("/"):
        return url
    if re.fullmatch(TENANT_NAME, tenant) is None:
        raise ConfigError(TENANT, f"{tenant!r} is no name of a tenant", "See `fedtide tenant ls`")
    return f"{url}/tenants/{tenant}"


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        where = parts.path.strip("/")
        is_api = not where or re.fullmatch(rf"tenants/{TENANT_NAME.strip('^$')}", where) is not None
        usable = named and parts.username is None and is_api and not (parts.query or parts.fragment)
        url.encode("ascii")
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            SERVER, "is no http or https address of a host and a port", "For example http://127.0.0.1:8080"
        )

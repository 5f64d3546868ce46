"""Where a server listens, and how that is written: one port for both families of addresses."""

from __future__ import annotations

import errno
import socket

EVERYWHERE = frozenset({"0.0.0.0", "::", "*"})  # noqa: S104
_BACKLOG = 128
_NO_IPV6 = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`; on every address of every family that the machine has, if it names all of one.

    Raises:
        OSError: the port is taken, or the machine has no such address.
    """
    if host not in EVERYWHERE:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        except OSError as exc:
            if exc.errno not in _NO_IPV6:
                raise
    return socket.create_server(("", port), backlog=_BACKLOG)


def in_url(host: str) -> str:
    """A host as it is written in URLs (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host

"""Loaded by every Python process that has this folder in PYTHONPATH: notes whatever leads off the machine."""

import ipaddress
import os
import sys


def _is_here(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost", "0.0.0.0"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


def _guard(event: str, args: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host: object = args[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if not _is_here(host):
        with open(os.environ["QUIET_LOG"], "a") as log:
            log.write(f"{event} {host!r} by {sys.argv}\n")


if "QUIET_LOG" in os.environ:
    sys.addaudithook(_guard)

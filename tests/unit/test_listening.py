"""Servers that listen everywhere answer on both families of addresses."""

from __future__ import annotations

import socket

import pytest

from fedtide.fabric.process.listening import in_url, listening_socket

LOOPBACKS = ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*"])
@pytest.mark.parametrize("loopback", LOOPBACKS)
def test_everywhere_is_both_families(host: str, loopback: str) -> None:
    with listening_socket(host, 0) as there:
        socket.create_connection((loopback, there.getsockname()[1]), timeout=5).close()


def test_one_address_is_that_address() -> None:
    with listening_socket("127.0.0.1", 0) as there:
        assert there.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            listening_socket("127.0.0.1", there.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "written"),
    [("fd00::5", "[fd00::5]"), ("[fd00::5]", "[fd00::5]"), ("10.0.0.1", "10.0.0.1"), ("a.example", "a.example")],
)
def test_an_ipv6_address_has_brackets_in_a_url(host: str, written: str) -> None:
    assert in_url(host) == written

"""Identifiers: how they are made and checked, and how Flower's integers come from them."""

from __future__ import annotations

import hashlib
import re
import secrets

from fedtide.fabric.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
"""What can stand as one token of a subject, and as one name in a folder."""
_TOKEN = re.compile(NAME)


def is_token(value: str) -> bool:
    """Whether it can stand as one token of a subject."""
    return _TOKEN.fullmatch(value) is not None


def check_token(path: str, value: str) -> str:
    """Return `value` if it can stand as one token of a subject.

    Raises:
        ConfigError: anything but 1 to 63 letters, digits, `-` and `_`.
    """
    if not is_token(value):
        raise ConfigError(path, f"{value!r} is not a valid name", "Use 1 to 63 letters, digits, '-' or '_'")
    return value


def unguessable() -> str:
    """For what a stranger must not name first, such as the id by which a stream knows a copy of a message."""
    return secrets.token_hex(16)


def new_id(prefix: str) -> str:
    """A fresh identifier such as `run-3f9a1c20`, for what people name: a few thousand of a kind."""
    return f"{prefix}-{secrets.token_hex(4)}"


def new_event_id() -> str:
    """A fresh identifier of one of many millions: two that are equal would be taken for one."""
    return f"evt-{secrets.token_hex(10)}"


def flower_int(name: str) -> int:
    """The 63-bit integer by which Flower knows a node or run; equal names give equal numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

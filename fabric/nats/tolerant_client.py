"""nats-py's client, for messages that others write: no bytes in them end the connection's reading."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

log = logging.getLogger(__name__)

CLOSED_WITHIN_S = 1.0


class _Transport(TcpTransport):
    """Whose end is not waited for for ever: a failed TLS handshake leaves a writer that nobody tells of it.

    nats-py's transport has no types.
    """

    def __bool__(self) -> bool:
        return True  # else the client would take one of its own

    async def connect(self, *arguments: Any, **options: Any) -> None:
        self.close()  # type: ignore[no-untyped-call]  # that of the try before: nobody else does
        await super().connect(*arguments, **options)

    def write(self, payload: bytes) -> Any:
        self._check()
        return super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: list[bytes]) -> Any:
        self._check()
        return super().writelines(payload)  # type: ignore[no-untyped-call]

    async def drain(self) -> None:
        self._check()
        await super().drain()  # type: ignore[no-untyped-call]

    def _check(self) -> None:
        """A client that closes while it has no connection yet flushes all the same: that is no AttributeError."""
        if self._io_writer is None:
            raise ConnectionResetError("there is no connection yet")

    async def wait_closed(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSED_WITHIN_S):
                await super().wait_closed()  # type: ignore[no-untyped-call]


class TolerantClient(Client):
    """Whoever may publish chooses subjects, reply subjects and headers, and a server passes any bytes on.

    nats-py decodes them in its read loop, which ends at an error and leaves a connection that hears nothing (2.16).
    """

    def __init__(self) -> None:
        super().__init__()
        self._transport = _Transport()  # type: ignore[no-untyped-call]

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
            return found
        except (ValueError, IndexError) as exc:
            log.warning("broker.headers_unreadable", extra={"reason": str(exc)})
            return {}

    def _build_message(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> Msg:
        message: Msg = super()._build_message(sid, _readable(subject), _readable(reply), data, headers)
        return message


def _readable(text: bytes) -> bytes:
    r"""The same if it is UTF-8; else with `\x..` for what is not, which no subject of ours has."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "backslashreplace").encode()
    return text

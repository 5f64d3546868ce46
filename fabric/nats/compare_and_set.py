"""Replacing what a subject holds, only over what was read: a process that was frozen covers nothing newer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from fedtide.fabric.errors import StaleWriter
from fedtide.fabric.nats.broker import Broker

log = logging.getLogger(__name__)


async def replace_stored(
    broker: Broker,
    stream: str,
    subject: str,
    data: bytes,
    replaces: Callable[[bytes], bool],
    headers: Mapping[str, str] | None = None,
) -> bool:
    """Store `data` as the last message of `subject`, unless what is there says otherwise.

    Args:
        replaces: whether `data` goes over what is stored now; asked again if that changed meanwhile.

    Returns:
        Whether it was stored.

    Raises:
        BrokerUnavailable: the broker went away; call again.
    """
    while True:
        last = await broker.last(stream, subject)
        if last is not None and not replaces(last.data):
            return False
        expected = last.sequence if last is not None else 0
        try:
            await broker.publish(subject, data, expected_last_of_subject=expected, headers=headers)
            return True
        except StaleWriter:
            log.info("stored.changed_meanwhile", extra={"subject": subject, "read": expected})

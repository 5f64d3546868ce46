"""Creates the streams of hub and regions, and keeps trying for regions that are not there yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from fabric.broker import Broker
from fabric.errors import FedtideError, TransientError
from fabric.streams import hub_streams, leaf_streams
from fabric.subjects import Subjects

log = logging.getLogger(__name__)

RETRY_S = 0.5


async def ensure_hub(broker: Broker, subjects: Subjects, regions: Iterable[str]) -> None:
    """The hub's streams, as they should be."""
    for config in hub_streams(subjects, regions):
        await _until_ensured(broker, config, None)


async def ensure_region(broker: Broker, subjects: Subjects, region: str) -> None:
    """A region's streams. Asked through the hub, so the leaf link is up when the mirror is made:
    a mirror made before its link sits out half a minute of back-off."""
    for config in leaf_streams(subjects, region):
        await _until_ensured(broker, config, region)
    log.info("region.ready", extra={"region": region})


async def _until_ensured(broker: Broker, config: dict[str, object], domain: str | None) -> None:
    while True:
        try:
            await broker.ensure_stream(config, domain=domain)
            return
        except TransientError as exc:
            log.info("topology.waits", extra={"stream": config["name"], "domain": domain, "reason": str(exc)})
            await asyncio.sleep(RETRY_S)
        except FedtideError as exc:
            log.error("topology.refused", extra={"stream": config["name"], "domain": domain, "reason": str(exc)})
            raise

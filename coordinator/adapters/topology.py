"""Creates the streams of hub and regions, and keeps trying for regions that are not there yet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fedtide.fabric.errors import FedtideError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.streams import (
    Config,
    hub_streams,
    leaf_streams,
    mirror_consumer,
    mirror_consumer_config,
    region_stream,
)
from fedtide.fabric.nats.subjects import DOWN, Subjects
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

REFUSED_AGAIN_S = 60.0


class Topology:
    """The streams of one tenant. Regions may come at any time and in any order.

    If a mirror or source is made before its link is up, nats-server tries again only after half a
    minute. So a region's streams are made through the hub, which shows that the link is up,
    and only then does the hub collect from the region.
    """

    def __init__(self, broker: Broker, subjects: Subjects, regions: Sequence[str], replicas: int = 1) -> None:
        self._replicas = replicas
        self._regions = regions
        self._broker = broker
        self._subjects = subjects

    def _of_hub(self) -> list[Config]:
        of_regions = [region_stream(self._subjects, r, sourced=False, replicas=self._replicas) for r in self._regions]
        return [*hub_streams(self._subjects, self._replicas), *of_regions]

    async def create_missing(self) -> None:
        """Create the hub's streams if they are missing; a standby may do no more than that."""
        for config in self._of_hub():
            await self._broker.ensure_stream(config, update=False)

    async def ensure_hub(self) -> None:
        """Create or update the hub's streams; what is collected from regions goes on."""
        for config in hub_streams(self._subjects, self._replicas):
            await _until_ensured(self._broker, config, None)

    async def keep_region(self, region: str, look_again: asyncio.Event) -> None:
        """As `ensure_region`, now and whenever `look_again` is set, for ever.

        A region whose streams are refused is tried again, and holds up no other.
        """
        backoff = Backoff(cap_s=REFUSED_AGAIN_S)
        while True:
            look_again.clear()
            try:
                await self.ensure_region(region)
            except FedtideError as exc:
                log.error("region.refused", extra={"region": region, "reason": str(exc)})
                await backoff.wait()
            else:
                backoff.reset()
                await look_again.wait()

    async def ensure_region(self, region: str) -> None:
        """Create a region's streams as soon as it can be reached, and collect from it.

        A source that the hub has already is removed and added again: a hub that was away would wait for
        its next try otherwise. The messages from a source carry its position: none is lost or doubled.
        """
        for config in leaf_streams(self._subjects, region):
            if "mirror" in config:
                await until_done(log, "topology.waits", lambda: self._prepare_mirror(region), domain=region)
            await _until_ensured(self._broker, config, region)
        for sourced in (False, True):
            config = region_stream(self._subjects, region, sourced=sourced, replicas=self._replicas)
            await _until_ensured(self._broker, config, None)
        log.info("region.ready", extra={"region": region})

    async def _prepare_mirror(self, region: str) -> None:
        """Make the consumer that the region's mirror reads; a mirror that is new reads from the beginning."""
        wanted = mirror_consumer_config(self._subjects, region)
        if not await self._broker.has_stream(DOWN, domain=region):
            await self._broker.delete_consumer(DOWN, mirror_consumer(region))
        await self._broker.ensure_consumer(DOWN, wanted)


async def _until_ensured(broker: Broker, config: Config, domain: str | None) -> None:
    stream = config["name"]
    try:
        await until_done(
            log,
            "topology.waits",
            lambda: broker.ensure_stream(config, domain=domain),
            stream=stream,
            domain=domain,
        )
    except FedtideError as exc:
        log.error("topology.refused", extra={"stream": stream, "domain": domain, "reason": str(exc)})
        raise

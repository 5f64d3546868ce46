"""Creates the streams of hub and regions, and keeps trying for regions that are not there yet."""

from __future__ import annotations

import asyncio
import logging

from fedtide.fabric.errors import FedtideError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.streams import hub_streams, leaf_streams
from fedtide.fabric.nats.subjects import UP, Subjects
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

REFUSED_AGAIN_S = 60.0


class Topology:
    """The streams of one tenant. Regions may come at any time and in any order.

    If a mirror or source is made before its link is up, nats-server tries again only after half a
    minute. So a region's streams are made through the hub, which shows that the link is up,
    and only then does the hub collect from the region.
    """

    def __init__(self, broker: Broker, subjects: Subjects, replicas: int = 1) -> None:
        self._replicas = replicas
        self._broker = broker
        self._subjects = subjects
        self._one_at_a_time = asyncio.Lock()

    async def create_missing(self) -> None:
        """Create the hub's streams if they are missing; a standby may do no more than that."""
        for config in hub_streams(self._subjects, (), self._replicas):
            await self._broker.ensure_stream(config, update=False)

    async def ensure_hub(self) -> None:
        """Create or update the hub's streams; the sources that it has already are kept."""
        async with self._one_at_a_time:
            known = await self._broker.sourced_domains(UP)
            for config in hub_streams(self._subjects, known, self._replicas):
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
        """Create a region's streams as soon as it can be reached, and make them a source of the hub.

        A source that the hub has already is removed and added again: a hub that was away would wait for
        its next try otherwise. The messages from a source carry its position: none is lost or doubled.
        """
        for config in leaf_streams(self._subjects, region):
            await _until_ensured(self._broker, config, region)
        async with self._one_at_a_time:
            known = await self._broker.sourced_domains(UP)
            for regions in [known - {region}, known | {region}] if region in known else [known | {region}]:
                for config in hub_streams(self._subjects, regions, self._replicas):
                    if config["name"] == UP:
                        await _until_ensured(self._broker, config, None)
        log.info("region.ready", extra={"region": region})


async def _until_ensured(broker: Broker, config: dict[str, object], domain: str | None) -> None:
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

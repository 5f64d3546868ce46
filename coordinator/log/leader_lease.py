"""Who leads: a lease in the broker, taken and renewed by compare-and-set.

The lease only decides *when* a standby may take over. The log ensures that an old leader does no
harm: its next append and its next renewal are refused (fedtide.fabric.errors.StaleWriter).
"""

from __future__ import annotations

import asyncio
import logging

from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import MalformedMessage, StaleWriter, TransientError
from fedtide.fabric.ids import new_id
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import CONTROL, Subjects
from fedtide.fabric.strict import Strict

log = logging.getLogger(__name__)

BEAT_S = 1.0
LEASE_S = 3.0
"""A lease that was not renewed for so long may be taken."""


class Lease(Strict):
    """`holder`: a name that only one process has at a time; empty: released. `url`: where the holder's API answers."""

    holder: str
    boot: str
    url: str = ""


class Leadership:
    """One coordinator's side of the leader election. `leader` is who leads, as far as this process knows."""

    def __init__(self, broker: Broker, subjects: Subjects, name: str, url: str) -> None:
        self._broker = broker
        self._subject = subjects.lease
        self._mine = Lease(holder=name, boot=new_id("boot"), url=url)
        self._sequence = 0
        self._heard = asyncio.Event()
        self._renewed = asyncio.Event()
        self._renewed_at = 0.0
        self.leader: Lease | None = None
        self.acquired = asyncio.Event()

    @property
    def is_mine(self) -> bool:
        return self.leader == self._mine

    async def hold(self) -> None:
        """Wait until this process leads, set `acquired`, and renew the lease for ever, also while it still catches up.

        Raises:
            StaleWriter: another process has taken it.
        """
        await self.acquire()
        self.acquired.set()
        await self.keep()

    async def acquire(self) -> None:
        """Wait until this process leads. A lease under its own name is left by a dead predecessor: take it."""
        unsubscribe = await self._broker.subscribe(self._subject, self._on_lease)
        try:
            while not await self._try():
                self._heard.clear()
                try:
                    async with asyncio.timeout(LEASE_S):
                        await self._heard.wait()
                except TimeoutError:
                    if await self._try(expired=self._sequence):
                        return
        finally:
            await unsubscribe()

    async def _on_lease(self, message: Received) -> None:
        self._heard.set()

    async def _try(self, *, expired: int = -1) -> bool:
        """Take the lease if it is free, ours, or still the one at sequence `expired`."""
        try:
            self._sequence, self.leader = await self._read()
            free = self.leader is None or self.leader.holder in ("", self._mine.holder) or self._sequence == expired
            if free:
                await self._write(self._mine)
                self.leader = self._mine
                log.info("lease.taken", extra={"holder": self._mine.holder, "sequence": self._sequence})
            return free
        except (TransientError, StaleWriter) as exc:
            log.info("lease.not_taken", extra={"reason": str(exc)})
            return False

    async def keep(self) -> None:
        """Renew the lease for ever.

        Raises:
            StaleWriter: another process has taken it.
        """
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._write(self._mine)
            except TransientError as exc:
                log.warning("lease.renewal_waits", extra={"reason": str(exc)})
            except StaleWriter:
                self.leader = None
                raise

    async def wait_until_fresh(self) -> None:
        """Wait until the lease is fresh. If another process has taken it, this never returns: `keep` raises."""
        if asyncio.get_running_loop().time() - self._renewed_at > 2 * BEAT_S:
            self._renewed.clear()
            await self._renewed.wait()

    async def release(self) -> None:
        """Let a standby take over at once."""
        try:
            await self._write(Lease(holder="", boot=self._mine.boot))
        except (TransientError, StaleWriter) as exc:
            log.info("lease.not_released", extra={"reason": str(exc)})

    async def _read(self) -> tuple[int, Lease | None]:
        found = await self._broker.last(CONTROL, self._subject)
        if found is None:
            return 0, None
        try:
            return found.sequence, from_json(Lease, found.data, "lease")
        except MalformedMessage:
            return found.sequence, None

    async def _write(self, lease: Lease) -> None:
        data = to_json(lease)
        try:
            ack = await self._broker.publish(
                self._subject, data, expected_last_of_subject=self._sequence, timeout_s=LEASE_S
            )
        except StaleWriter:
            # The newer lease may be our own renewal, whose confirmation was lost.
            sequence, found = await self._read()
            if found is None or found.boot != self._mine.boot:
                raise
            self._sequence = sequence
            return
        self._sequence = ack.sequence
        self._renewed_at = asyncio.get_running_loop().time()
        self._renewed.set()

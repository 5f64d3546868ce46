"""Reports on a run's rounds to the coordinator: nodes asked, updates counted, replies refused."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.link.phase_id import PhaseId
from fedtide.fabric import merkle
from fedtide.fabric.events.runs import (
    RoundAbandoned,
    RoundClosed,
    RoundCollected,
    RoundOpened,
    RoundsRestarted,
    RoundWaits,
    UpdateReceived,
    UpdateRefused,
)
from fedtide.fabric.messages.tasks import Arrays, Reply
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.round_policy import Cause


def _leaf(round_: int, node: str, reply: Reply) -> str:
    """Of one update: its node, and the bytes of its tensors (blobs by their digests, small ones by their own)."""
    content = reply.message.content or {}
    arrays = [each for _, each in sorted(content.items()) if isinstance(each, Arrays)]
    digests = [a.blob.digest if a.blob is not None else hashlib.sha256(a.inline or b"").hexdigest() for a in arrays]
    return merkle.leaf(f"{round_}\n{node}\n{','.join(digests)}".encode())


class Accounts:
    """`bytes_moved`: bytes sent and received over the life of this process."""

    def __init__(self, config: WorkerConfig, link: GridLink) -> None:
        self._link = link
        self._run: dict[str, Any] = {"run": config.run, "attempt": config.attempt}
        self.bytes_moved = 0
        self._leaves: dict[int, dict[str, str]] = {}
        """By round and node: a leaf of the tree of updates that count."""
        self._times: dict[int, tuple[float, float]] = {}
        """By round: when it opened, and when its last answer came."""

    def _note(self, round_: int) -> None:
        now = time.monotonic()
        self._times[round_] = self._times.get(round_, (now, now))[0], now

    def seconds(self, round_: int) -> float:
        """From the first task of a round to its last answer; 0 if this process has sent none."""
        first, last = self._times.get(round_, (0.0, 0.0))
        return last - first

    def close_open(self) -> None:
        """Report the rounds of an app that closes none itself as closed, without metrics."""
        for round_ in sorted(self._times):
            self.closed(round_, {}, self.seconds(round_))

    def opened(
        self, place: PhaseId, nodes: list[str], size: int, wan: int, quorum: int | None, *, resumable: bool
    ) -> None:
        """Report that a phase sends its tasks (`size` bytes in all, `wan` of them to the regions); replies of `nodes`
        may count in it.
        """
        self.bytes_moved += size
        self._note(place.round)
        event = RoundOpened(
            **self._at(place),
            nodes=nodes,
            bytes_down=size,
            wan_bytes=wan,
            quorum=quorum,
            resumable=resumable,
            timed=place.driven,
        )
        self._link.call(self._link.report(event))

    def waits(self, place: PhaseId, needed: int, there: int, held: str) -> RoundWaits:
        """The report that a phase waits for nodes, or why it is held."""
        return RoundWaits(**self._at(place), needed=needed, there=there, held=held[:1000])

    def received(self, place: PhaseId, node: str, reply: Reply, *, size: int, staleness: int) -> None:
        self.bytes_moved += size
        self._note(place.round)
        if place.phase == "train":
            self._leaves.setdefault(place.round, {})[node] = _leaf(place.round, node, reply)
        event = UpdateReceived(
            **self._at(place),
            node=node,
            bytes_up=size,
            seconds=reply.seconds,
            staleness=staleness,
            usage=reply.usage,
            stays=reply.stays,
        )
        self._link.call(self._link.report(event))

    def refused(self, place: PhaseId, node: str, category: str, reason: str, arrived: Arrived | None = None) -> None:
        """Report that there is no answer of `node` that counts; `arrived`: the one that does not."""
        if place.phase == "train":
            self._leaves.get(place.round, {}).pop(node, None)  # one that was received first
        reply, size = (arrived.reply, arrived.size_bytes) if arrived is not None else (None, 0)
        usage = reply.usage if reply is not None else Usage()
        told = {"category": category, "reason": reason[:2000], "usage": usage, "bytes_up": size}
        body = {**self._at(place), "node": node, **told}
        self._link.call(self._link.report(UpdateRefused.model_validate(body)))

    def collected(self, place: PhaseId, received: int, cause: Cause) -> None:
        self._link.call(self._link.report(RoundCollected(**self._at(place), received=received, cause=cause)))

    def abandoned(self, round_: int, trial: int, reason: str) -> None:
        self._link.call(self._link.report(RoundAbandoned(**self._run, round=round_, trial=trial, reason=reason)))

    def closed(self, round_: int, metrics: dict[str, float], seconds: float) -> None:
        leaves = [leaf for _, leaf in sorted(self._leaves.pop(round_, {}).items())]
        event = RoundClosed(
            **self._run,
            updates=merkle.root(leaves) if leaves else "",
            round=round_,
            metrics=metrics,
            seconds=seconds,
            usage=self._link.used(),
            regional=self._link.used_in_regions(),
        )
        self._link.call(self._link.report(event))

    def restarted(self) -> None:
        """Report that an app without a round driver started over after a crash."""
        self._link.call(self._link.report(RoundsRestarted(**self._run)))

    def _at(self, place: PhaseId) -> dict[str, Any]:
        return {**self._run, "round": place.round, "trial": place.trial, "phase": place.phase}

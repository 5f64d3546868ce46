"""The releases that a node serves, by model and version, independent of the protocol.

A swap is one assignment: requests that wait in the old release's lane finish there, later ones get
the new one. Nothing is dropped and no batch mixes releases.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.serving.batching import BatchLimits, Lane
from fedtide.edge_agent.serving.sessions import Arrays, InferenceFailed, Model
from fedtide.fabric.errors import NotFound

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was answered, or failed on (`outputs` is None). `prepared` is what the graph got."""

    model: Model
    id: str
    inputs: Arrays
    prepared: Arrays
    outputs: Arrays | None
    seconds: float


Observer = Callable[[Served], None]


class Serving:
    """The active release of each model, and older versions that requests may still name."""

    def __init__(self, config: AgentConfig) -> None:
        self._limits = BatchLimits(config.batch_size, config.queue_size, config.batch_wait_ms / 1000)
        self._threads = ThreadPoolExecutor(config.inference_parallel, thread_name_prefix="inference")
        self._active: dict[str, Lane] = {}
        self._kept: dict[str, Lane] = {}
        self.observers: list[Observer] = []
        """Called after every request; they must not take long."""
        self.served = 0
        self.failed = 0

    def swap(self, model: Model) -> None:
        """From the next request on, `model` answers for its name."""
        self._active[model.name] = Lane(model, self._threads, self._limits)

    def keep(self, model: Model | None, name: str) -> None:
        """Also answer requests that name this older version, until the next call."""
        self._kept.pop(name, None)
        if model is not None:
            self._kept[name] = Lane(model, self._threads, self._limits)

    def remove(self, name: str) -> None:
        self._active.pop(name, None)
        self._kept.pop(name, None)

    def active(self, name: str) -> Model | None:
        lane = self._active.get(name)
        return lane.model if lane is not None else None

    def versions(self, name: str) -> list[Model]:
        return [lanes[name].model for lanes in (self._active, self._kept) if name in lanes]

    def serving(self) -> dict[str, str]:
        """Model name to release digest."""
        return {name: lane.model.release.digest for name, lane in self._active.items()}

    def model(self, name: str, version: str | None) -> Model:
        """Raises NotFound unless this model is served (in this version)."""
        return self._lane(name, version).model

    async def infer(self, name: str, version: str | None, inputs: Arrays, id_: str = "") -> tuple[Model, Arrays]:
        """The outputs, and the release that gave them.

        Raises:
            NotFound: no such model or version.
            RemoteError: inputs that the model does not take.
            Overloaded: too many requests wait.
            InferenceFailed: the model failed.
        """
        lane = self._lane(name, version)
        prepared = lane.model.prepare(inputs)
        began = time.perf_counter()
        try:
            outputs = await lane.infer(prepared)
        except InferenceFailed:
            self.failed += 1
            self._tell(Served(lane.model, id_, inputs, prepared, None, time.perf_counter() - began))
            raise
        self.served += 1
        self._tell(Served(lane.model, id_, inputs, prepared, outputs, time.perf_counter() - began))
        return lane.model, outputs

    def _tell(self, served: Served) -> None:
        for observer in self.observers:
            try:
                observer(served)
            except Exception:  # an observer must not fail a request
                log.exception("inference.observer_failed")

    def _lane(self, name: str, version: str | None) -> Lane:
        active = self._active.get(name)
        if active is None:
            raise NotFound(f"no model {name!r} is served here", f"Served are: {', '.join(self._active) or 'none'}")
        lanes = [lane for lane in (active, self._kept.get(name)) if lane is not None]
        found = next((lane for lane in lanes if version in (None, lane.model.version)), None)
        if found is None:
            there = ", ".join(lane.model.version for lane in lanes)
            raise NotFound(f"model {name!r} is served in version {there}, not {version}")
        return found

    def stop(self) -> None:
        self._threads.shutdown(wait=False)

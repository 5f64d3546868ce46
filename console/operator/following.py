"""Keeps a resource's status in step with what it stands for: looks when the coordinator's log says something of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import kopf
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.console.client import ApiError, AsyncClient
from fedtide.console.endpoints import Call
from fedtide.console.operator import resources
from fedtide.console.operator.calls import RETRY_S, changed
from fedtide.console.operator.news import News
from fedtide.console.operator.resources import GROUP, VERSION, Object
from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.errors import ConfigError, TransientError

LOOK_AGAIN_S = 30.0
"""News may be lost with a connection."""
SETTLE_S = 0.5
"""Events come in bursts: one look for all of them."""

T = TypeVar("T")
Seen = tuple[Object, frozenset[str]]
"""A status, and the names of what it is about."""


class Following:
    """Over one client and one stream of news for all resources. Made in the loop that it works in."""

    def __init__(self, api: AsyncClient, news: News) -> None:
        self._api = api
        self._news = news
        self._loop = asyncio.get_running_loop()

    def look_again(self, name: str) -> None:
        """From any thread: what is about `name` is looked at soon."""
        self._loop.call_soon_threadsafe(self._news.tell, frozenset({name}))

    async def ask(self, call: Call[T]) -> T:
        """Raises ApiError, ConfigError, TransientError as the client does."""
        return await self._api.send(call)

    async def ask_of(self, name: str, call: Callable[[str], Call[T]]) -> T | None:
        """As `ask`; None if there is no name."""
        if not name:
            return None
        found: T = await self.ask(call(name))
        return found

    async def follow(self, plural: str, body: kopf.Body, look: Callable[[], Awaitable[Seen]]) -> None:
        """Write what `look` sees into the status, until that has ended.

        Args:
            body: live: its status is what the API server has.

        Raises:
            kopf.PermanentError: the coordinator does not know it (any more).
        """
        with self._news.topic() as topic:
            while True:
                topic.changed.clear()
                pause = RETRY_S
                try:
                    status, topic.names = await look()
                    await _write(plural, body, status)
                    if resources.has_ended(status):
                        return
                    pause = LOOK_AGAIN_S
                except TransientError:
                    pass
                except (ApiError, ConfigError) as exc:
                    raise kopf.PermanentError(str(exc)) from exc
                try:
                    async with asyncio.timeout(pause):
                        await topic.changed.wait()
                    await asyncio.sleep(SETTLE_S)
                except TimeoutError:
                    pass


async def _write(plural: str, body: kopf.Body, status: Object) -> None:
    new = changed(status, body.status)
    if new is not None:
        await asyncio.to_thread(_patch, plural, body.metadata, new)


def _patch(plural: str, meta: Mapping[str, Any], status: Object) -> None:
    """Raises TransientError: the API server does not take it now."""
    api = client.CustomObjectsApi(api_client())
    where = (GROUP, VERSION, meta["namespace"], plural, meta["name"])
    try:
        api.patch_namespaced_custom_object_status(*where, {"status": status})
    except ApiException as exc:
        if exc.status != HTTPStatus.NOT_FOUND:
            raise TransientError(f"the status of {meta['name']} cannot be written: {exc.reason}") from exc
    except OSError as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}") from exc

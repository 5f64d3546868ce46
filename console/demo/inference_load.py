"""A client that keeps asking one node, and counts what it gets: before, during and after a swap."""

from __future__ import annotations

import http.client
import json
import threading
from urllib.parse import urlsplit


class InferenceLoad:
    """One request after the other on one connection, from `start` to `stop`."""

    def __init__(self, url: str, model: str, body: bytes) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = f"/v2/models/{model}/infer"
        self._body = body
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="inference-load", daemon=True)
        self.versions: list[str] = []
        """The version that answered each request, in order; empty text: dropped."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def wait_for(self, version: str, count: int, timeout_s: float) -> bool:
        """Whether `version` has answered `count` requests before the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self.versions.count(version) >= count, timeout_s)

    @property
    def dropped(self) -> int:
        return self.versions.count("")

    def first_of(self, version: str) -> int | None:
        return self.versions.index(version) if version in self.versions else None

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        while not self._stop.is_set():
            version = self._ask(connection)
            with self._changed:
                self.versions.append(version)
                self._changed.notify_all()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> str:
        try:
            connection.request("POST", self._path, self._body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            return str(answer["model_version"]) if response.status == 200 else ""
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            connection.close()
            return ""

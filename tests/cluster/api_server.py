"""A Kubernetes API server in a thread, small and stateful: enough of it that real clients cannot tell.

Objects of any kind; create, read, list by labels, merge-patch (of a version), delete; watches that resume and
expire (410).
`fault` makes the next matching requests fail as a real server does, or cuts the connection.
"""

from __future__ import annotations

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonpatch

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Plural, namespace, name."""


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        self.code, self.reason, self.message, self.headers = code, reason, message or reason, headers or {}


DROP = "drop"


class ApiServer:
    """Started by `with`; `url` is where it answers, `requests` what it was asked (method, path, query, body)."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self._faults: list[tuple[Callable[[str, str], bool], Any]] = []
        self._log: list[tuple[int, str, Key, Object]] = []
        self._version = 100
        self._compacted = 0
        self._changed = threading.Condition(threading.RLock())
        self._stopping = False
        self.custom: list[tuple[str, str, str, str]] = []
        """Group, version, plural and kind of custom resources."""
        self.answers: dict[str, Object] = {}
        """By path: what has no object behind it."""

    def kubeconfig(self) -> str:
        """By what clients outside a cluster find it: the text of a file."""
        cluster = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        users = [{"name": "u", "user": {"token": "t"}}]
        named = {"clusters": [cluster], "users": users, "contexts": [context], "current-context": "c"}
        return json.dumps({"apiVersion": "v1", "kind": "Config", **named})

    def kubeconfig_in(self, folder: Path) -> Path:
        """The same as a file."""
        file = folder / "kubeconfig"
        file.write_text(self.kubeconfig())
        return file

    def __enter__(self) -> ApiServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, matches: Callable[[str, str], bool], how: Refusal | str) -> None:
        """The next request whose method and path match fails like this."""
        self._faults.append((matches, how))

    def compact(self) -> None:
        """Forget what happened: watches that resume from before are told 410."""
        with self._changed:
            self._log.clear()
            self._version += 1
            self._compacted = self._version

    def cut(self) -> None:
        """End every watch that is open."""
        with self._changed:
            self._cuts = getattr(self, "_cuts", 0) + 1
            self._changed.notify_all()

    def put(self, plural: str, body: Object) -> Object:
        """Create or replace, as a controller would."""
        with self._changed:
            key = (plural, body["metadata"].get("namespace", ""), body["metadata"]["name"])
            kind = "MODIFIED" if key in self.objects else "ADDED"
            body = copy.deepcopy(body)
            body["metadata"].setdefault("uid", str(uuid.uuid4()))
            self._store(key, body, kind)
            return body

    def set_status(self, plural: str, name: str, status: Object) -> None:
        with self._changed:
            (key,) = [k for k in self.objects if k[0] == plural and k[2] == name]
            self._store(key, {**copy.deepcopy(self.objects[key]), "status": status}, "MODIFIED")

    def remove(self, plural: str, name: str) -> None:
        with self._changed:
            (key,) = [k for k in self.objects if k[0] == plural and k[2] == name]
            self._store(key, copy.deepcopy(self.objects[key]), "DELETED")

    def names(self, plural: str) -> list[str]:
        with self._changed:
            return sorted(k[2] for k in self.objects if k[0] == plural)

    def one(self, plural: str, name: str) -> Object:
        with self._changed:
            return next(o for k, o in self.objects.items() if k[0] == plural and k[2] == name)

    def _store(self, key: Key, body: Object, kind: str) -> None:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        if kind == "DELETED":
            del self.objects[key]
        else:
            self.objects[key] = body
        self._log.append((self._version, kind, key, copy.deepcopy(body)))
        self._changed.notify_all()

    def parse(self, raw: bytes) -> Any:
        return json.loads(raw)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """What a request that is no watch gets."""
        found = self.answers.get(path) or self._discovery(path)
        if found is not None:
            return found
        plural, namespace, name, sub = parts(path)
        with self._changed:
            key = (plural, namespace, name)
            if method == "POST":
                key = (plural, namespace, body["metadata"]["name"])
                if key in self.objects:
                    raise Refusal(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
                body["metadata"].update(namespace=namespace, generation=1)
                return self.put(plural, body)
            if not name:
                items = [o for k, o in self.objects.items() if _selected(k, o, plural, namespace, query)]
                return {"items": items, "metadata": {"resourceVersion": str(self._version)}}
            if key not in self.objects:
                raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
            if method == "PATCH":
                of_version = body.get("metadata", {}).get("resourceVersion") if isinstance(body, dict) else None
                if of_version not in (None, self.objects[key]["metadata"]["resourceVersion"]):
                    raise Refusal(409, "Conflict", "the object has been modified")
                merged = _patched(self.objects[key], body, sub)
                gone = merged["metadata"].get("deletionTimestamp") and not merged["metadata"].get("finalizers")
                self._store(key, merged, "DELETED" if gone else "MODIFIED")
                return merged
            if method == "DELETE":
                gone = copy.deepcopy(self.objects[key])
                if gone["metadata"].get("finalizers"):
                    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                    self._store(key, gone, "MODIFIED")
                else:
                    self._store(key, gone, "DELETED")
                return gone
            return self.objects[key]

    def _discovery(self, path: str) -> Object | None:
        """Which kinds there are: those of `custom`."""
        words = [w for w in path.split("/") if w]
        groups = sorted({(group, version) for group, version, _, _ in self.custom})
        if words == ["api"]:
            return {"versions": ["v1"]}
        if words == ["api", "v1"]:
            spaces = {"name": "namespaces", "kind": "Namespace", "namespaced": False, "singularName": ""}
            return {"resources": [{**spaces, "verbs": ["get", "list", "watch"]}]}
        if words[-1] in ("namespaces", "customresourcedefinitions"):
            raise Refusal(403, "Forbidden", "our Role is of one namespace")
        if words == ["apis"]:
            named = [
                {"name": g, "preferredVersion": _version_of(g, v), "versions": [_version_of(g, v)]} for g, v in groups
            ]
            return {"groups": named}
        if words[0] == "apis" and tuple(words[1:]) in groups:
            verbs = ["get", "list", "watch", "patch"]
            kinds = [
                {"name": plural + sub, "kind": kind, "namespaced": True, "verbs": verbs, "singularName": ""}
                for group, version, plural, kind in self.custom
                if (group, version) == tuple(words[1:])
                for sub in ("", "/status")
            ]
            return {"kind": "APIResourceList", "groupVersion": "/".join(words[1:]), "resources": kinds}
        if words[0] == "apis" and len(words) == 3:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        return None

    def watch(self, path: str, query: dict[str, str], write: Callable[[str, Object], None]) -> None:
        plural, namespace, *_ = parts(path)
        last, cuts = int(query.get("resourceVersion") or 0), getattr(self, "_cuts", 0)
        end = time.monotonic() + float(query.get("timeoutSeconds", 60))
        if last < self._compacted:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            write("ERROR", status)
            return
        while not self._stopping and time.monotonic() < end and cuts == getattr(self, "_cuts", 0):
            with self._changed:
                new = [entry for entry in self._log if entry[0] > last]
                if not new:
                    self._changed.wait(0.5)
            for version, kind, key, body in new:
                last = version
                if _selected(key, body, plural, namespace, query):
                    write(kind, body)

    def broken(self, method: str, path: str) -> Any:
        with self._changed:
            for entry in self._faults:
                if entry[0](method, path):
                    self._faults.remove(entry)
                    return entry[1]
        return None


def _version_of(group: str, version: str) -> Object:
    return {"groupVersion": f"{group}/{version}", "version": version}


def _handler(server: ApiServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901  # one class
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _say(self, code: int, body: Any, headers: dict[str, str]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def _go(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = server.parse(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            query = {k: v[-1] for k, v in parse_qs(url.query).items()}
            server.requests.append((self.command, url.path, query, body))
            broken = server.broken(self.command, url.path)
            if broken == DROP:
                self.close_connection = True
                self.connection.close()
                return
            try:
                if broken is not None:
                    raise broken
                if query.get("watch", "").lower() in ("1", "true"):
                    self._watch(url.path, query)
                    return
                self._say(200, server.answer(self.command, url.path, query, body), {})
            except Refusal as exc:
                status = {"kind": "Status", "code": exc.code, "reason": exc.reason, "message": exc.message}
                self._say(exc.code, status, exc.headers)

        def _watch(self, path: str, query: dict[str, str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

            def write(kind: str, body: Object) -> None:
                raw = json.dumps({"type": kind, "object": body}).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
                self.wfile.flush()

            with suppress(OSError):
                server.watch(path, query, write)
                self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _go  # noqa: N815  # http.server's own names

    return Handler


def parts(path: str) -> tuple[str, str, str, str]:
    """Plural, namespace, name and sub-resource of an API path."""
    words = [w for w in path.split("/") if w]
    words = words[2:] if words[0] == "api" else words[3:]
    namespace = ""
    if words[0] == "namespaces" and len(words) > 2:
        namespace, words = words[1], words[2:]
    plural, name, sub = [*words, "", ""][:3]
    return plural, namespace, name, sub


def _selected(key: Key, body: Object, plural: str, namespace: str, query: dict[str, str]) -> bool:
    labels = {**body["metadata"].get("labels", {})}
    if key[0] == "events":
        wanted = query.get("fieldSelector", "").partition("=")[2]
        return key[0] == plural and body.get("involvedObject", {}).get("name") == wanted
    fits = all(_label(labels, term) for term in query.get("labelSelector", "").split(",") if term)
    return key[0] == plural and (not namespace or key[1] == namespace) and fits


def _label(labels: dict[str, str], term: str) -> bool:
    if "!=" in term:
        name, _, value = term.partition("!=")
        return labels.get(name) != value
    name, _, value = term.partition("=")
    return labels.get(name) == value


def _patched(old: Object, body: Any, sub: str) -> Object:
    """By JSON patch or merge patch; only a status patch changes the status, and nothing else."""
    if isinstance(body, list):
        try:
            changed = jsonpatch.apply_patch(old, body)
        except jsonpatch.JsonPatchTestFailed as exc:
            raise Refusal(422, "Invalid", str(exc)) from exc
    else:
        changed = _merged(old, body)
    mine = {"status": changed.get("status", {})} if sub == "status" else {**changed, "status": old.get("status", {})}
    return {**old, **mine}


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = copy.deepcopy(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged

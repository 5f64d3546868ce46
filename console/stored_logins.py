"""Logins of this person, by server: kept in the person's own configuration folder, and refreshed when they end.

RFC 6749 (section 6: refresh), RFC 7636 (PKCE), RFC 8252 (loopback redirect), RFC 8628 (devices).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import secrets
import time
import webbrowser
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx

from fedtide.fabric.errors import ConfigError, FedtideError, TransientError
from fedtide.fabric.messages.people import LoginView
from fedtide.fabric.nats.credentials import write_secret

ENDS_SOON_S = 60.0
LOGIN_WITHIN_S = 300.0
ANSWER_WITHIN_S = 15.0


class LoginFailed(FedtideError):
    """The provider has not let this person in."""

    exit_code = 77


def file_of(environment: Mapping[str, str] | None = None) -> Path:
    env = os.environ if environment is None else environment
    folder = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "~")).expanduser() / ".config")
    return folder / "fedtide" / "logins.json"


def token_for(url: str) -> str:
    """The ID token of whoever is logged in to a server, refreshed if it ends; empty: nobody is."""
    login = _read().get(url)
    if login is None:
        return ""
    if float(login["ends_at"]) - time.time() > ENDS_SOON_S:
        return str(login["id_token"])
    if not login.get("refresh_token"):
        return ""
    try:
        asked = {
            "grant_type": "refresh_token",
            "refresh_token": login["refresh_token"],
            "client_id": login["client_id"],
        }
        keep(url, {**login, **_tokens(_post(login["token_endpoint"], asked))})
    except (LoginFailed, TransientError):
        return ""
    return str(_read()[url]["id_token"])


def keep(url: str, login: Mapping[str, Any] | None) -> None:
    """Store a login; None: forget it."""
    known = {name: each for name, each in _read().items() if name != url}
    write_secret(file_of(), json.dumps({**known, **({url: dict(login)} if login is not None else {})}, indent=2))


def _read() -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(file_of().read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def with_browser(where: LoginView, say: Callable[[str], None]) -> dict[str, Any]:
    """A login in a browser of this machine: the provider sends it back to a port of this process.

    Raises:
        LoginFailed: the provider refuses, or nobody has logged in in time.
        TransientError: it does not answer.
    """
    about = _document(where)
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    with _Listener(state) as listener:
        asked = {
            "response_type": "code",
            "client_id": where.client_id,
            "redirect_uri": listener.url,
            "scope": " ".join(where.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            "prompt": "consent",  # else there is no refresh token (OpenID Connect Core, 11)
        }
        address = f"{about['authorization_endpoint']}?{urlencode(asked)}"
        say(f"log in here: {address}")
        webbrowser.open(address)
        code = listener.wait()
        exchange = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": listener.url,
            "client_id": where.client_id,
        }
        answer = _post(about["token_endpoint"], exchange)
        if _claims(answer).get("nonce") != nonce:
            raise LoginFailed("the provider's answer is to another login", "Try again")
        return _login(where, about, answer)


def with_device(where: LoginView, say: Callable[[str], None]) -> dict[str, Any]:
    """A login in a browser of another machine: with a code that a person types there. Raises as `with_browser`."""
    about = _document(where)
    if "device_authorization_endpoint" not in about:
        raise ConfigError("--device", "the provider has no device flow", "Leave --device out")
    asked = {"client_id": where.client_id, "scope": " ".join(where.scopes)}
    given = _post(about["device_authorization_endpoint"], asked)
    say(f"open {given['verification_uri']} and type {given['user_code']}")
    ends_at, pause = time.monotonic() + float(given.get("expires_in", LOGIN_WITHIN_S)), float(given.get("interval", 5))
    polled = {
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "device_code": given["device_code"],
        "client_id": where.client_id,
    }
    while time.monotonic() < ends_at:
        time.sleep(pause)  # as long as the provider asks for (RFC 8628, 3.5): it tells nobody by itself
        answer = _answer(about["token_endpoint"], polled)
        match answer.get("error"):
            case None:
                return _login(where, about, answer)
            case "authorization_pending":
                continue
            case "slow_down":
                pause += 5
            case other:
                raise LoginFailed(f"the provider says {other}: {answer.get('error_description', '')}", "Try again")
    raise LoginFailed("nobody has logged in in time", "Try again")


def _login(where: LoginView, about: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    return {"client_id": where.client_id, "token_endpoint": about["token_endpoint"], **_tokens(answer)}


def _tokens(answer: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"id_token": answer.get("id_token"), "ends_at": _claims(answer)["exp"]}
    return {**kept, "refresh_token": answer["refresh_token"]} if "refresh_token" in answer else kept


def _claims(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Of an ID token that came from the provider itself, over TLS."""
    try:
        body = str(answer["id_token"]).split(".")[1]
        found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (KeyError, IndexError, ValueError) as exc:
        raise LoginFailed("the provider gives no ID token", "Is `openid` among its scopes?") from exc
    return found


def _document(where: LoginView) -> dict[str, Any]:
    address = f"{where.issuer.rstrip('/')}/.well-known/openid-configuration"
    try:
        found: dict[str, Any] = httpx.get(address, timeout=ANSWER_WITHIN_S).json()
    except (httpx.HTTPError, ValueError) as exc:
        raise TransientError(f"the provider {where.issuer} does not answer: {exc}") from exc
    return found


def _post(address: str, about: Mapping[str, str]) -> dict[str, Any]:
    answer = _answer(address, about)
    if "error" in answer:
        raise LoginFailed(f"the provider says {answer['error']}: {answer.get('error_description', '')}", "Log in again")
    return answer


def _answer(address: str, about: Mapping[str, str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = httpx.post(address, data=dict(about), timeout=ANSWER_WITHIN_S).json()
    except (httpx.HTTPError, ValueError) as exc:
        raise TransientError(f"the provider does not answer: {exc}") from exc
    return found


class _Listener:
    """Waits on the loopback address for the browser that comes back."""

    def __init__(self, state: str) -> None:
        self._answer: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                fits = secrets.compare_digest(query.get("state", ""), state)
                if fits:
                    outer._answer = query
                said = "You are logged in. You may close this page." if fits else "This is not what was asked for."
                self.send_response(200 if fits else 400)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(f"<p>{html.escape(said)}</p>".encode())

            def log_message(self, *_: object) -> None:
                """The code stands in the address: it is written nowhere."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._server.timeout = 1.0

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/callback"

    def wait(self) -> str:
        ends_at = time.monotonic() + LOGIN_WITHIN_S
        while not self._answer and time.monotonic() < ends_at:
            self._server.handle_request()
        if "code" not in self._answer:
            why = self._answer.get("error_description") or self._answer.get("error") or "nobody has logged in in time"
            raise LoginFailed(f"no login: {why}", "Try again")
        return self._answer["code"]

"""Who looks at the page: a browser shows a token, or its holder logs in; then only this page's requests carry a cookie.

The login is OpenID Connect's authorisation code with PKCE (RFC 7636); what has to come back is in a cookie of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from urllib.parse import urlencode

from aiohttp import web

from fedtide.coordinator.adapters.oidc import NotLetIn, OidcLogin
from fedtide.coordinator.api.http import PREFIX, PRINCIPAL, cookie_of
from fedtide.coordinator.api.principals import Principals
from fedtide.fabric.errors import TransientError
from fedtide.fabric.process.web_access import COOKIE

KEEP_S = 12 * 3600
LOGIN_COOKIE, LOGIN_WITHIN_S = "fedtide-login", 600
MOST_COOKIE = 4000
"""Bytes of a value; browsers drop a larger cookie without a word (RFC 6265 asks for 4096 with name and attributes)."""


class Session:
    """Begins with a token or a login."""

    def __init__(self, principals: Principals) -> None:
        self._principals = principals

    @property
    def has_login(self) -> bool:
        return self._principals.oidc is not None

    async def opened(self, request: web.Request, token: str) -> web.HTTPException:
        """Where a browser goes that has shown a token: back to the page, with a cookie."""
        try:
            who = await self._principals.of({"Authorization": f"Bearer {token}"})
        except (NotLetIn, TransientError):
            who = None
        if who is None:
            return web.HTTPSeeOther("login?wrong=1")
        request[PRINCIPAL] = who  # for the audit trail
        return _kept(request, web.HTTPSeeOther("./"), token)

    async def begin(self, request: web.Request) -> web.HTTPException:
        """To the provider."""
        oidc = self._oidc()
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        about = {
            "response_type": "code",
            "client_id": oidc.config.client_id,
            "redirect_uri": _callback(request, oidc),
            "scope": " ".join(scope for scope in oidc.config.scopes if scope != "offline_access"),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        endpoint = (await oidc.document())["authorization_endpoint"]
        found = web.HTTPFound(f"{endpoint}?{urlencode(about)}")
        kept = json.dumps({"state": state, "nonce": nonce, "verifier": verifier})
        # Lax: the provider sends the browser back from its own site.
        found.set_cookie(
            cookie_of(request, LOGIN_COOKIE),
            base64.urlsafe_b64encode(kept.encode()).decode(),
            max_age=LOGIN_WITHIN_S,
            httponly=True,
            samesite="Lax",
            secure=request.secure,
            path=_root(request),
        )
        return found

    async def end(self, request: web.Request) -> web.HTTPException:
        """Back from the provider, with a code."""
        oidc = self._oidc()
        try:
            kept = json.loads(base64.urlsafe_b64decode(request.cookies.get(cookie_of(request, LOGIN_COOKIE), "")))
            if not secrets.compare_digest(str(kept["state"]), request.query.get("state", "")):
                raise NotLetIn("it is the answer to another login", "Log in again")
            code = request.query.get("code", "")
            token = await oidc.exchange(code, str(kept["verifier"]), _callback(request, oidc))
            who = await oidc.principal(token, nonce=str(kept["nonce"]))
        except (NotLetIn, ValueError, KeyError, TypeError):
            return web.HTTPSeeOther("../login?wrong=1")
        if len(token) > MOST_COOKIE:
            return web.HTTPSeeOther("../login?large=1")
        request[PRINCIPAL] = who  # for the audit trail
        found = _kept(request, web.HTTPSeeOther("../"), token)
        found.del_cookie(cookie_of(request, LOGIN_COOKIE), path=_root(request))
        return found

    def _oidc(self) -> OidcLogin:
        if self._principals.oidc is None:
            raise web.HTTPSeeOther("login")
        return self._principals.oidc


def _kept(request: web.Request, found: web.HTTPException, token: str) -> web.HTTPException:
    found.set_cookie(
        cookie_of(request, COOKIE),
        token,
        max_age=KEEP_S,
        httponly=True,
        samesite="Strict",
        secure=request.secure,
        path=_root(request),
    )
    return found


def _root(request: web.Request) -> str:
    """Where the cookies of this page go: a tenant's to nobody else."""
    return f"{request.app.get(PREFIX, '')}/"


def _callback(request: web.Request, oidc: OidcLogin) -> str:
    return f"{oidc.config.page_url.rstrip('/') or f'{request.scheme}://{request.host}'}{_root(request)}ui/oidc/callback"

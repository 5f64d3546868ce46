"""Who looks at the page: a browser shows the API's token once, then a cookie that only this page's requests carry."""

from __future__ import annotations

from aiohttp import web

from fedtide.fabric.process.web_access import COOKIE, TokenFile

KEEP_S = 12 * 3600


def opened(request: web.Request, token: str, shown: TokenFile | None) -> web.HTTPException:
    """Where a browser goes that has shown the token: back to the page, with a cookie."""
    found: web.HTTPException = web.HTTPSeeOther("./")
    if shown is not None:
        if not shown.shown_by({"Authorization": f"Bearer {token}"}):
            return web.HTTPSeeOther("login?wrong=1")
        found.set_cookie(
            COOKIE, token, max_age=KEEP_S, httponly=True, samesite="Strict", secure=request.secure, path="/"
        )
    return found

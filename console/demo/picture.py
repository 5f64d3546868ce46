"""A picture of the page, by a Chromium that is on this machine, over its own protocol
(https://chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

log = logging.getLogger(__name__)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 900
WITHIN_S = 60.0
_LISTENS = re.compile(rb"DevTools listening on (ws://\S+)")


def take(url: str, cookie: tuple[str, str], file: Path) -> bool:
    """Write a PNG of a page to `file`; false if no browser is here, or it cannot.

    Args:
        cookie: name and value, for the page's host.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        return False
    try:
        asyncio.run(_take(browser, url, cookie, file))
    except (OSError, TimeoutError, aiohttp.ClientError, KeyError) as exc:
        log.warning("picture.not_taken", extra={"reason": f"{type(exc).__name__}: {exc}"})
        return False
    return True


async def _take(browser: str, url: str, cookie: tuple[str, str], file: Path) -> None:
    with TemporaryDirectory() as profile:
        # It writes crash reports beside its profile, wherever that is.
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = await asyncio.create_subprocess_exec(
            browser,
            *options,
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            env={**os.environ, "HOME": profile, "XDG_CONFIG_HOME": profile, "XDG_CACHE_HOME": profile},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(WITHIN_S):
                assert process.stderr is not None
                while (found := _LISTENS.search(await process.stderr.readline())) is None:
                    if process.stderr.at_eof():
                        raise OSError(f"{browser} ended")
                async with (
                    aiohttp.ClientSession() as session,
                    session.ws_connect(found[1].decode(), max_msg_size=0) as ws,
                ):
                    image = await _shot(_Protocol(ws), url, cookie)
            file.write_bytes(image)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


class _Protocol:
    """Calls over one socket; answers come in their order, among events."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.session = ""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        await self._socket.send_json({**asked, "sessionId": self.session} if self.session else asked)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                result: dict[str, Any] = answer["result"]
                return result

    async def event(self, method: str) -> None:
        while (await self._socket.receive_json()).get("method") != method:
            pass


async def _shot(browser: _Protocol, url: str, cookie: tuple[str, str]) -> bytes:
    target = await browser.call("Target.createTarget", url="about:blank")
    attached = await browser.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
    browser.session = attached["sessionId"]
    await browser.call("Page.enable")
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    await browser.call("Emulation.setDeviceMetricsOverride", **size)
    await browser.call("Network.setCookie", name=cookie[0], value=cookie[1], url=url)
    await browser.call("Page.navigate", url=url)
    await browser.event("Page.loadEventFired")
    shot = await browser.call("Page.captureScreenshot", format="png")
    return base64.b64decode(shot["data"])

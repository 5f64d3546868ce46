"""First paint of each screen for a fleet of 10,000 nodes, in Chromium on loopback.

The peer is the same page as files of a static server: what the browser takes without a coordinator behind it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

from benchmarks.report import Row, load_now, write
from fedtide.coordinator.page import screens
from fedtide.fabric.events.envelope import NodeOffline
from tests.scenarios.build import joined, produced, published, requested
from tests.shell.served_api import served_api

NODES, AWAY, SAMPLES = 10_000, 500, 7
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
_PAINT = """new Promise(done => new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (entry.name === 'first-contentful-paint') done(entry.startTime);
}).observe({type: 'paint', buffered: true}))"""


def main() -> None:
    load = load_now()
    story = [
        *(joined(f"n{number:05}", f"r{number % 20}") for number in range(NODES)),
        *(NodeOffline(node=f"n{number:05}", reason="no heartbeat for 15 s") for number in range(AWAY)),
        *(requested(model="m"), produced(), published()),
    ]
    rows = []
    with served_api(*story) as api, tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        (root / "ui").mkdir()
        (root / "ui/static").symlink_to(screens.HERE / "static")
        for path, _ in screens.SCREENS:
            text = httpx.get(f"{api.url}/ui/{path}", timeout=30).text.replace("data-live", "")
            (root / "ui" / (f"{path}.html" if path else "index.html")).write_text(text)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with files(root) as static:
            for path, name in screens.SCREENS:
                ours, theirs = [], []
                for _ in range(SAMPLES):
                    ours.append(painted_ms(browser, f"{api.url}/ui/{path}"))
                    theirs.append(painted_ms(browser, f"{static}/ui/{path}.html" if path else f"{static}/ui/"))
                note = f"best {min(ours):.0f}, worst {max(ours):.0f}"
                row = Row(name, "first paint", "ms", statistics.median(ours), statistics.median(theirs), "files", note)
                rows.append(row)
        browser.close()
    write("page", load, rows)


def painted_ms(browser: Browser, url: str) -> float:
    """With nothing in any cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(url)
    found = float(page.evaluate(_PAINT))
    context.close()
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def files(root: Path) -> Iterator[str]:
    """Where a static server shows a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


if __name__ == "__main__":
    main()

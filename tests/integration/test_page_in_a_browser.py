"""The page in a real Chromium: desktop and phone, keyboard alone, light and dark, live, and without scripts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.integration.conftest import bring_up
from tests.integration.installation import Installation

pytestmark = pytest.mark.slow  # a browser, and an installation of its own
APP = Path(__file__).parents[2] / "examples" / "sensors"
SCREENS = (
    "",
    "fleet",
    "fleet/eu-1",
    "runs",
    "rollouts",
    "models",
    "models/sensors",
    "triggers",
    "costs",
    "events",
    "health",
)
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    found = bring_up(tmp_path_factory.mktemp("page"), "eu,us", 1)
    assert found.train(APP, "--rounds", "2").state == "completed"
    assert found.run("rollout", "start", "sensors", "--watch").returncode == 0
    yield found
    found.run("down")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def opened(browser: Browser, there: Installation, size: str, scheme: str) -> Page:
    """A page of someone who has logged in, by keyboard alone."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(there.state["apis"][0])
    expect(page).to_have_url(re.compile("ui/login$"))
    page.focus("#token")
    page.keyboard.type(there.shown["Authorization"].removeprefix("Bearer "))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    return page


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_every_screen_fits_is_clean_for_axe_and_logs_no_error(
    browser: Browser, there: Installation, size: str, scheme: str
) -> None:
    page, errors = opened(browser, there, size, scheme), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    root = page.url
    run, rollout = there.runs()[0].run, there.rollouts()[0].rollout
    for path in (*SCREENS, f"runs/{run}", f"rollouts/{rollout}"):
        page.goto(root + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path}: wider than the window"
        policy = page.context.browser.new_context(
            bypass_csp=True, color_scheme=scheme, storage_state=page.context.storage_state()
        )
        looked_at = policy.new_page()  # the checker is a script that the page's policy would not let in
        looked_at.goto(root + path)
        found = Axe().run(looked_at)
        assert found.violations_count == 0, f"{path}: {found.generate_report()}"
        policy.close()
    assert errors == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, there: Installation) -> None:
    page = opened(browser, there, "desktop", "light")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.goto(page.url.partition("#")[0])
    for _ in range(4):
        page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Fleet")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()


def test_a_page_is_live_and_its_buttons_do_what_they_say(browser: Browser, there: Installation) -> None:
    page = opened(browser, there, "desktop", "dark")
    expect(page.locator("#live")).to_have_text("live")
    page.focus("main a")  # what is looked at stays so when something happens elsewhere
    focused, events = page.evaluate("document.activeElement.textContent"), page.locator(".tiles b").last.text_content()
    (there.home / "prices.yaml").write_text("currency: EUR\nprices: []\n")
    assert there.run("price", "apply", str(there.home / "prices.yaml")).returncode == 0
    expect(page.locator(".tiles b").last).not_to_have_text(events or "", timeout=15_000)
    assert page.evaluate("document.activeElement.textContent") == focused
    page.goto(page.url + "runs")
    expect(page.get_by_role("row")).to_have_count(2)
    expect(page.locator("#live")).to_have_text("live")
    run = there.json("run", "start", "--app", str(APP), "--rounds", "50")["run"]
    expect(page.get_by_role("link", name=run)).to_be_visible(timeout=15_000)
    page.get_by_role("link", name=run).click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click(timeout=30_000)
    expect(page.locator("#said")).to_have_text("Done.")
    expect(page.locator("dd").first).to_contain_text("cancelled", timeout=15_000)
    assert there.finish(run).state == "cancelled"


def test_without_scripts_every_screen_is_there(browser: Browser, there: Installation) -> None:
    logged_in = opened(browser, there, "desktop", "light")
    context = browser.new_context(java_script_enabled=False, storage_state=logged_in.context.storage_state())
    page = context.new_page()
    page.goto(logged_in.url)
    page.get_by_role("link", name="Costs").click()
    page.fill("#by", "region")
    page.click("#filter")
    expect(page.get_by_role("cell", name="eu", exact=True)).to_be_visible()

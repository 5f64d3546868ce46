"""The page without a browser: every screen, what is in it, and who may see it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
from aiohttp import web

from fedtide.coordinator.api.access import access_middleware
from fedtide.coordinator.api.http import application
from fedtide.coordinator.api.principals import Principals
from fedtide.coordinator.identity.people import People
from fedtide.coordinator.page.curves import curve
from fedtide.coordinator.page.lineage import lineage
from fedtide.coordinator.page.screens import NUMBERED_SHOWN, SCREENS, Page
from fedtide.coordinator.page.session import Session
from fedtide.coordinator.state import World
from fedtide.fabric.events.costs import BudgetApplied, PricesApplied, UsageReported, UsedFor
from fedtide.fabric.events.envelope import NodeOffline, TriggerApplied
from fedtide.fabric.events.runs import AggregatorStarted, RoundClosed, RunCompleted, RunFailed
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import Budget
from fedtide.fabric.process.web_access import TokenFile
from tests.scenarios.build import (
    cached,
    closed,
    joined,
    opened,
    phase,
    produced,
    published,
    received,
    refused,
    requested,
    rollout,
    wave,
)
from tests.scenarios.test_ledger import BOOK
from tests.shell.served_api import Served, served_api
from tests.shell.test_takes_anything import RULE

NODES = 1200
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    gates = {"gates": [{"kind": "errors", "most": 0.01}], "on_failure": "pause"}
    used = UsageReported(source="c", items=[UsedFor(region="eu", phase="serve", usage=Usage(cpu_us=36 * 10**9))])
    story = [
        *(joined(f"n{number}", "eu" if number % 2 else "us") for number in range(NODES)),
        *(NodeOffline(node="n7", reason=HOSTILE), PricesApplied(book=BOOK), used, TriggerApplied(rule=RULE)),
        BudgetApplied(budget=Budget(name="b", amount=1)),
        *(requested(model="m"), AggregatorStarted(run="run-1", attempt=1)),
        *(opened(1, "n1", "n2"), received(1, "n1"), refused(1, "n2", "app_error"), closed(1, accuracy=0.5)),
        *(opened(2, "n1"), received(2, "n1"), closed(2, accuracy=0.75), produced()),
        *(RunCompleted(run="run-1", attempt=1), published(), rollout(wave("eu", "n1", "n3"), max_error=0.0, **gates)),
        *(cached("eu"), phase("n1", "failed", reason="no space left")),
        *(TriggerApplied(rule=RULE.model_copy(update={"name": f"rule-{number:03}"})) for number in range(104)),
        *(requested("run-2"), AggregatorStarted(run="run-2", attempt=1)),
        *(requested("run-3"), AggregatorStarted(run="run-3", attempt=1)),
        RunFailed(run="run-3", attempt=1, reason="KeyError: pixels"),
        *(RoundClosed(run="run-2", attempt=1, round=n, metrics={}, seconds=1.0) for n in range(1, 61)),
    ]
    with served_api(*story) as served:
        yield served


def page(served: Served, path: str, status: int = 200) -> str:
    answer = httpx.get(f"{served.url}/ui/{path}", follow_redirects=True, timeout=20)
    assert answer.status_code == status, answer.text[:500]
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert HOSTILE not in answer.text, "what nodes say is text"
    return answer.text


@pytest.mark.parametrize("path", [path for path, _ in SCREENS])
def test_every_screen_shows_something_and_names_the_command_that_prints_it(api: Served, path: str) -> None:
    text = page(api, path)
    assert re.search(r"command line: <code>fedtide \w+", text)
    assert 'aria-current="page"' in text
    assert len(text) < 150_000, "no list without pages"
    assert " style=" not in text and "<script>" not in text, "the policy allows none"


def test_a_fleet_has_pages_and_filters(api: Served) -> None:
    first = page(api, "fleet")
    assert f"100 of {NODES:,} nodes" in first
    more = re.search(r'href="\?(after=[^"]+)" rel="next"', first)
    assert more is not None
    assert page(api, f"fleet?{more[1]}") != first
    assert "1 of 1 nodes" in page(api, "fleet?state=offline")
    assert "600 nodes" in page(api, "fleet?region=eu")


def test_a_run_shows_its_curves_who_was_refused_and_what_it_cost(api: Served) -> None:
    text = page(api, "runs/run-1")
    assert "accuracy: 0.5 to <strong>0.75</strong>" in text
    assert "<polyline" in text
    assert "1 refused" in text and "app_error: because" in text
    assert "fedtide cost explain run-1" in text


def test_a_roll_out_says_first_why_it_stopped_and_which_node_is_sick(api: Served) -> None:
    text = page(api, "rollouts/ro-1")
    reason = text.index("notice bad")
    assert "no space left" in text
    assert reason < text.index("<h2>Regions")
    assert "n1" in text
    overview = page(api, "")
    assert "rollouts/ro-1" in overview
    assert "fleet/n7" in overview
    assert "failed: KeyError: pixels" in overview, "what went wrong is told first"
    assert overview.index("KeyError: pixels") < overview.index('class="tiles"')


def test_nodes_that_need_a_look_are_told_with_all_that_is_wrong_with_them(api: Served) -> None:
    health = page(api, "health")
    assert "3 of 3: away, warned of" in health
    told = re.findall(r'fleet/(n\d+)">n\d+</a> \(\w+\): (.*)</li>', health)
    assert [name for name, _ in told] == ["n1", "n2", "n7"]
    why = dict(told)
    assert "failed in a roll-out: no space left" in why["n1"] and 'href="./rollouts/ro-1"' in why["n1"]
    assert "answers refused: app error" in why["n2"] and 'href="./runs/run-1"' in why["n2"]
    assert "offline: &lt;script&gt;" in why["n7"]


def test_what_is_numbered_is_shown_newest_first_a_page_at_a_time(api: Served) -> None:
    first = page(api, "runs/run-2")
    assert f"{NUMBERED_SHOWN} of 60, newest first" in first
    assert 'href="?before=11"' in first
    rest = page(api, "runs/run-2?before=11")
    assert "10 of 60" in rest and 'rel="next"' not in rest
    assert 'href="?after=rule-' in page(api, "triggers")
    assert "4 of 105 rules" in page(api, "triggers?after=rule-099")


def test_a_lineage_is_drawn_with_a_line_for_each_base() -> None:
    drawn = lineage([5, 4, 3, 2], {5: 3, 4: 3, 3: 2, 2: 1})
    xs = {dot.version: dot.x for dot in drawn.dots}
    assert xs[5] == xs[3] == xs[2] != xs[4], "two releases of one base are beside each other, and meet in it"
    assert len(drawn.lines) == 4
    assert drawn.lines[1].count("C") == 1 and "C" not in drawn.lines[0]
    assert drawn.lines[3].endswith(f"V{drawn.height:g}"), "to what is on the next page"
    assert drawn.text_x > max(xs.values())
    wide = lineage(list(range(40, 0, -1)), dict.fromkeys(range(2, 41), 1))
    assert wide.text_x < 400 and wide.width > wide.text_x + 300, "there is room for the text, however many branches"
    alone = lineage([2, 1], {})
    assert alone.lines == [] and len({dot.x for dot in alone.dots}) == 1


def test_costs_models_and_nodes_tell_theirs(api: Served) -> None:
    costs = page(api, "costs?by=region&days=36500")
    assert "<td>eu</td>" in costs
    assert "0.70" in costs or "0.700 EUR" in costs
    assert "Share of b that is spent" in costs
    assert "v1" in page(api, "models/m")
    assert "&lt;script&gt;" in page(api, "fleet/n7")


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("runs/none", 404, "there is no run"),
        ("costs?by=planet", 400, "Known:"),
        ("fleet?state=lost", 400, "state"),
        ("costs?days=many", 400, "days"),
        ("fleet?after=nobody", 400, "after"),
    ],
)
def test_what_is_not_there_is_said_on_the_page(api: Served, path: str, status: int, says: str) -> None:
    assert says in page(api, path, status)


def test_links_are_relative_so_the_page_works_behind_a_path_prefix(api: Served) -> None:
    for path in ("", "fleet", "fleet/n1", "runs/run-1"):
        for link in re.findall(r'(?:href|src|data-api)="([^"]*)"', page(api, path)):
            assert not link.startswith(("/", "http")), link


def test_a_curve_needs_two_numbers() -> None:
    assert curve("a", [(1, 0.5)]) is None
    assert curve("a", [(1, None), (2, float("nan")), (3, 1.0)]) is None
    found = curve("a", [(1, 1.0), (2, None), (3, 3.0)])
    assert found is not None
    assert (found.first, found.last, found.rounds, len(found.points.split())) == (1.0, 3.0, 2, 2)


async def test_a_browser_shows_the_token_once_and_other_sites_get_nothing(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    principals = Principals(TokenFile(tmp_path / "token"), People, None)
    app = application([], checks=access_middleware(principals, "127.0.0.1"))
    Page(None, World, Session(principals)).add_to(app)  # no screen is looked at but the login
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:

            async def log_in(token: str, **headers: str) -> tuple[int, str]:
                form = aiohttp.FormData({"token": token}, default_to_multipart=True)
                sent = browser.post(f"{url}/ui/login", data=form, headers=headers, allow_redirects=False)
                async with sent as answer:
                    return answer.status, answer.headers.get("Location", "")

            async with browser.get(f"{url}/ui/runs/x", allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "../login")
            assert await log_in("wrong") == (303, "login?wrong=1")
            assert not list(browser.cookie_jar)
            assert (await log_in("secret", Origin="http://evil.example"))[0] == 403
            assert await log_in("secret") == (303, "./")
            (cookie,) = browser.cookie_jar
            assert (cookie["httponly"], cookie["samesite"]) == (True, "Strict")
            async with browser.get(f"{url}/v1/none") as answer:
                assert answer.status == 404, "let in"
            async with browser.post(f"{url}/v1/none", headers={"Origin": "http://evil.example"}) as answer:
                assert answer.status == 403
            async with browser.post(f"{url}/v1/none", data={"a": "b"}) as answer:
                assert answer.status == 403, "a form of another site cannot act"
    finally:
        await runner.cleanup()

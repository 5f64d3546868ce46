"""The API of costs: the ledger by any dimension, its lines, prices, budgets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice

from aiohttp import web
from pydantic import AwareDatetime, Field

from fedtide.coordinator.adapters.metering import Metering
from fedtide.coordinator.api.http import Listing, answer, asker, name_in, page_of, query_of, read_body
from fedtide.coordinator.api.routes import Route, delete, get, put
from fedtide.coordinator.bookkeeping import QUOTA
from fedtide.coordinator.ledger import views
from fedtide.coordinator.ledger.accounts import NOBODY, Account, Entry
from fedtide.coordinator.ledger.booking import Where, book
from fedtide.coordinator.ledger.valuation import Valued, Valuer, valued
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import ConfigError, InvalidTransition
from fedtide.fabric.events.costs import BudgetApplied, BudgetRemoved, PricesApplied, UsageReported
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.messages.cost_views import BudgetView, CostLine, CostView
from fedtide.fabric.messages.views import Page
from fedtide.fabric.plans.prices import Budget, PriceBook
from fedtide.fabric.strict import Strict

MOST_DIMENSIONS = 5


class _Which(Strict):
    since: AwareDatetime | None = Field(default=None, description="Begin of the first hour")
    until: AwareDatetime | None = Field(default=None, description="End of the last hour")
    where: str = Field(default="", max_length=1000, description="Dimensions and their values: model=m,region=eu")


class CostQuery(_Which):
    by: str = Field(default="", max_length=300, description="Dimensions, with commas; empty: the total alone")


class LineListing(Listing, _Which):
    after: str = Field(default="", max_length=2000, description="`next` of the page before")


class CostApi:
    """Handlers over the engine's ledger, and what is not logged yet."""

    def __init__(self, engine: Engine, metering: Metering, *, is_tenants: bool = False) -> None:
        """`is_tenants`: of a tenant, for whom the installation has set prices and a quota."""
        self._is_tenants = is_tenants
        self._engine = engine
        self._metering = metering

    def routes(self) -> list[Route]:
        return [
            get("/v1/costs", self._costs, "Costs by any dimensions", CostView, query=CostQuery),
            get("/v1/costs/lines", self._lines, "The ledger's lines", Page[CostLine], query=LineListing),
            get("/v1/prices", self._prices, "The price book", PriceBook),
            put("/v1/prices", self._apply_prices, "Use another price book", PriceBook, body=PriceBook, needs="admin"),
            get("/v1/budgets", self._budgets, "Budgets, and how they stand", Page[BudgetView], query=Listing),
            get("/v1/budgets/{name}", self._budget, "One budget", BudgetView),
            put(
                "/v1/budgets/{name}",
                self._apply_budget,
                "Create or change a budget",
                BudgetView,
                body=Budget,
                needs="admin",
            ),
            delete("/v1/budgets/{name}", self._remove_budget, "Remove a budget", BudgetView, needs="admin"),
        ]

    async def _costs(self, request: web.Request) -> web.Response:
        return answer(await self.costs(query_of(request, CostQuery)))

    async def costs(self, query: CostQuery) -> CostView:
        by = [name.strip() for name in query.by.split(",") if name.strip()]
        views.check_dimensions("by", by)
        if len(by) > MOST_DIMENSIONS or len(set(by)) < len(by):
            raise ConfigError("by", f"names up to {MOST_DIMENSIONS} dimensions, each once")
        valuer, look = self._look(query)
        # A long history takes a while: the accounts are immutable, and the loop goes on.
        return await asyncio.to_thread(lambda: views.costs(look(), valuer, by, query.since, query.until))

    async def _lines(self, request: web.Request) -> web.Response:
        query = query_of(request, LineListing)
        valuer, look = self._look(query)
        return answer(await asyncio.to_thread(lambda: _page(look(), valuer, query)))

    def _look(self, query: _Which) -> tuple[Valuer, Callable[[], Iterator[Valued]]]:
        """The prices, and all lines that are asked for, also those that are not logged yet."""
        where = _pairs(query.where)
        views.check_dimensions("where", where)
        world = self._engine.world
        nobody, valuer = Entry(world.ledger.get(NOBODY, Account())), world.valuer
        report = UsageReported(source="coordinator", items=self._metering.unlogged())
        book(nobody, Event.now("coordinator", report), Where(lambda _: None, lambda _: 0))
        ledger = {**world.ledger, NOBODY: nobody.account}
        return valuer, lambda: valued(ledger, valuer, query.since, query.until, where)

    async def _prices(self, request: web.Request) -> web.Response:
        return answer(self._engine.world.prices)

    async def _apply_prices(self, request: web.Request) -> web.Response:
        if self._is_tenants:
            raise InvalidTransition("the prices are those of the installation", "Ask its admins")
        await self._engine.submit(PricesApplied(book=await read_body(request, PriceBook), by=asker(request)))
        return answer(self._engine.world.prices)

    def _view(self, name: str) -> BudgetView:
        return views.budget(self._engine.world.budget(name), datetime.now(UTC))

    async def _budgets(self, request: web.Request) -> web.Response:
        return answer(self.budgets(query_of(request, Listing)))

    def budgets(self, query: Listing) -> Page[BudgetView]:
        return page_of(query, sorted(self._engine.world.budgets), self._view)

    async def _budget(self, request: web.Request) -> web.Response:
        return answer(self._view(name_in(request, "name")))

    async def _apply_budget(self, request: web.Request) -> web.Response:
        budget, name = await read_body(request, Budget), name_in(request, "name")
        self._check_is_own(name)
        if budget.name != name:
            raise ConfigError("name", f"is {budget.name!r}, the URL says {name!r}")
        await self._engine.submit(BudgetApplied(budget=budget, by=asker(request)))
        return answer(self._view(name))

    async def _remove_budget(self, request: web.Request) -> web.Response:
        self._check_is_own(name_in(request, "name"))
        removed = self._view(name_in(request, "name"))
        await self._engine.submit(BudgetRemoved(name=removed.budget.name, by=asker(request)))
        return answer(removed)

    def _check_is_own(self, budget: str) -> None:
        if self._is_tenants and budget == QUOTA:
            raise InvalidTransition(f"the budget {QUOTA} is what the installation lets you spend", "Ask its admins")


def _pairs(text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError("where", f"{part!r} is no DIMENSION=VALUE", "For example where=model=m,region=eu")
        found[name.strip()] = value.strip()
    return found


def _page(lines: Iterable[Valued], valuer: Valuer, query: LineListing) -> Page[CostLine]:
    keyed = sorted(((views.key_of(each), each) for each in lines), key=lambda pair: pair[0])
    left = [pair for pair in keyed if pair[0] > query.after]
    shown = list(islice(left, query.limit))
    items = [views.line(each, valuer) for _, each in shown]
    return Page(items=items, total=len(keyed), next=shown[-1][0] if len(left) > len(shown) else "")

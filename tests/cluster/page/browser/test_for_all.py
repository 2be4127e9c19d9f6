"""axe-core finds nothing that shuts people out: every view, in light and dark, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from rlhf.desk.desk import Desk
from tests.cluster.page.browser.browsing import PHONE, Come, Server
from tests.rlhf.desk.groups import person, rank_all

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

LOOKS: list[dict[str, Any]] = [{"color_scheme": "light"}, {"color_scheme": "dark", **PHONE}]


def violations(page: Page) -> list[str]:
    # Its script is put in by the browser's own tools, past the page's policy.
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']} ({one['impact']}): {node['html'][:200]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark phone"])
def test_the_page_of_those_who_rank_shuts_nobody_out(come: Come, look: dict[str, Any]) -> None:
    page = come(**look).page
    for view in views_of_ranking(page):
        assert violations(page) == [], view


def views_of_ranking(page: Page) -> Iterator[str]:
    """Goes from view to view, and names each."""
    press = page.keyboard.press
    yield "sorting"
    for key in ("a", "u", "1", "b", "1", "c", "2", "d", "3", "e", "4"):
        press(key)
    page.wait_for_selector("#saved[data-kind=saved]")
    yield "some are sorted"
    press("n")
    press("b")
    press("ArrowUp")
    yield "ordering"
    for key in ("b", "v", "a", "v"):
        press(key)
    yield "two side by side"
    press("Escape")
    for key, dialog in (("l", "guidelines"), ("k", "keys"), ("p", "progress"), ("s", "skipping"), ("n", "partial")):
        press(key)
        page.wait_for_selector(f"#{dialog}[open]")
        yield dialog
        press("Escape")
    press("n")
    page.locator("#partial button.main").click()
    page.wait_for_selector("#toast:not([hidden])")
    yield "handed in"


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark phone"])
def test_the_leads_page_shuts_nobody_out(come: Come, desk: Desk, look: dict[str, Any]) -> None:
    rank_all(desk, person(desk, "one"))
    rank_all(desk, person(desk, "two"), ((2,), (0, 1)))
    desk.withdraw("two", "lea")
    page = come("lea", "lead", **look).page
    assert violations(page) == []
    page.locator("#groups button").first.click()
    page.wait_for_selector("#group[open] article")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Withdraw the rankings of one").click()
    assert violations(page) == []


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark phone"])
def test_signing_in_shuts_nobody_out(browser: Browser, server: Server, look: dict[str, Any]) -> None:
    context = browser.new_context(bypass_csp=True, **look)
    page = context.new_page()
    page.goto(server.url)
    assert violations(page) == []
    context.close()

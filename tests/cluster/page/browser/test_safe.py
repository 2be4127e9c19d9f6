"""Hostile answers do nothing in Chromium."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from rlhf.records import Answer, AnswerGroup, Message, Prompt
from tests.cluster.page.browser.browsing import Come

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>alert('ran'); fetch('https://evil.example/')</script>",
    "<img src=x onerror=\"alert('ran')\"><svg onload=alert(1)><a onclick=alert(1) href=#>x</a>",
    "[click me](javascript:alert('ran')) <javascript:alert(1)> [data](data:text/html,<script>alert(1)</script>)",
    "![pixel](https://evil.example/pixel.png) <iframe src=https://evil.example></iframe>",
    "<style>* { display: none !important }</style><link rel=stylesheet href=https://evil.example/x.css>",
    "long " * 20_000,  # 100 kB
    "x" * 100_000,  # and without a space
    "safe \u202e gnihton \u202c \u2066 text \x00\x07\x1b[31m \ud83d \u200b\ufeff",
    "שלום עולם, this is mixed: עברית",
    "</div></article></main><script src=/static/rank.js></script>\n\n<base href=https://evil.example/>",
)


@pytest.fixture
def groups() -> list[AnswerGroup]:
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(HOSTILE))
    message = Message("user", "<script>alert('prompt')</script> [x](javascript:alert(1)) \u202e\x00" + "long " * 3000)
    return [AnswerGroup(Prompt("hostile", (message,), (1,)), answers)]


def test_hostile_answers_are_shown_and_do_nothing(come: Come) -> None:
    visit = come()
    page = visit.page
    expect(page.locator(".card")).to_have_count(10)
    everything = page.locator("main").inner_text()
    for text in ("<script>alert('ran');", "onerror=", "[click me](javascript:alert('ran'))", "<style>*", "⟦U+202E⟧"):
        assert text in everything
    assert page.locator(".answer :is(script, img, svg, iframe, style, link, base, object, form)").count() == 0
    hrefs = page.eval_on_selector_all(".answer a", "links => links.map(link => link.href)")
    assert hrefs and all(href.startswith("https://evil.example/") for href in hrefs)  # a link, if somebody follows it
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for key in "abcdefghij":
        page.keyboard.press(key)
        page.keyboard.press("Enter")  # all of it
    sizes = page.eval_on_selector_all(".card .answer", "all => all.map(one => one.textContent.length)")
    assert sorted(sizes)[-2] >= 99_999
    page.keyboard.press("m")  # as plain text
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("v")
    page.keyboard.press("a")
    page.keyboard.press("v")
    expect(page.locator("#compare")).to_be_visible()
    visit.nothing_happened()


def test_a_page_that_was_led_astray_could_still_run_and_load_nothing(come: Come) -> None:
    visit = come()
    page = visit.page
    # As if the server's own care had failed: the browser holds the line.
    outcome = page.evaluate(
        """async () => {
            const tried = {};
            const inline = document.createElement("script");
            try { inline.textContent = "window.ran = 1"; document.body.append(inline); }
            catch (error) { tried.script = error.name; }
            try { document.body.innerHTML += "<img src=x onerror='window.ran = 2'>"; }
            catch (error) { tried.html = error.name; }
            const image = new Image();
            tried.image = await new Promise((done) => {
                image.onload = () => done("loaded");
                image.onerror = () => done("refused");
                image.src = "https://evil.example/pixel.png";
            });
            tried.fetch = await fetch("https://evil.example/").then(() => "sent", () => "refused");
            tried.ran = window.ran ?? 0;
            return tried;
        }"""
    )
    assert outcome == {"script": "TypeError", "html": "TypeError", "image": "refused", "fetch": "refused", "ran": 0}


def test_the_lead_is_shown_the_same_harmless_text(come: Come) -> None:
    visit = come("lea", "lead")
    visit.page.locator("#groups button").first.click()
    expect(visit.page.locator("#group-answers article")).to_have_count(10)
    assert visit.page.locator(".answer :is(script, img, svg, iframe, style, link, base)").count() == 0
    visit.nothing_happened()

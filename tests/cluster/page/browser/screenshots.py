"""Makes the pictures of docs/annotate.md: `python -m tests.cluster.page.browser.screenshots docs/images`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from rlhf.desk.records import Verdict
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from tests.cluster.page.browser.browsing import PHONE, Server, Visit, chromium

QUESTION = (
    "I boil eggs for six minutes and the yolk is still runny, though my friend's are firm. What am I doing wrong?"
)
ANSWERS = (
    "Nothing is wrong. **Start the clock when the water boils**, not when the eggs go in:\n\n"
    "1. Bring the water to the boil.\n2. Lower the eggs in.\n3. Wait *nine* minutes for a firm yolk.\n\n"
    "Large eggs, or eggs from the fridge, need a minute more.",
    "Your friend lives lower down. At 2,000 m water boils at 93 °C, and an egg needs about a third longer.",
    "Six minutes gives a soft yolk. Firm ones take nine to ten.",
    "Eggs are a good source of protein. A large egg has about six grams of it.",
    "Try the following.\n\n| minutes | yolk |\n|---|---|\n| 6 | runny |\n| 8 | waxy |\n| 10 | firm |\n\n"
    "The times are for large eggs out of the fridge, put into boiling water.",
    "You should microwave the egg in its shell. It is quicker and always firm.",
    "An egg, an egg, an egg, an egg, an egg, an egg, an egg, an egg",
    "Boil them longer. If they come out of the fridge, longer still. `9 min` is a good start.",
    "It may be the size of the eggs, the height at which you live, or when you begin to count. Which of these differs "
    "between the two of you? If you tell me, I can say how long to boil them.\n\nUntil then: three minutes more.",
    "The yolk sets at 65 to 70 °C, the white earlier. In six minutes the centre of a large egg reaches about 60 °C.",
)
OTHERS = ("Write a haiku about rust.", "What does a capacitor do?", "Translate “good night” into five languages.")
MOST_BYTES = 200_000


def main(folder: Path) -> None:
    """Writes the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        database = f"sqlite:///{place}/rankings.db"
        with Desk(database, DeskConfig(quota=2, repeats=0), seed=1) as desk:
            tokens = _fill(desk)
            server = Server(database)
            try:
                with chromium() as browser:
                    desktop = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"}
                    _rank(Visit(browser, server.url, tokens["Ann"], **desktop), folder)
                    _phone(Visit(browser, server.url, tokens["Ben"], **PHONE, color_scheme="dark"), folder)
                    _lead(Visit(browser, server.url, tokens["Lea"], **desktop), folder)
            finally:
                server.kill()
    for picture in folder.glob("annotate-*.png"):
        assert picture.stat().st_size < MOST_BYTES, picture


def _fill(desk: Desk) -> dict[str, str]:
    """Tokens of the people, after some of them have ranked."""
    desk.add_groups([_group("eggs", QUESTION)] + [_group(f"p{i}", text) for i, text in enumerate(OTHERS)])
    tokens = {name: desk.invite(name) for name in ("Ann", "Ben", "Chen")} | {"Lea": desk.invite("Lea", "lead")}
    orders = {"Ben": (2, 0, 4, 1, 9, 7, 8, 3, 5, 6), "Chen": (0, 4, 2, 9, 1, 8, 7, 5, 3, 6)}
    for name, order in orders.items():
        found = desk.sign_in(tokens[name])
        assert found is not None
        for _ in range(3 if name == "Chen" else 2):
            task = desk.next_task(found.id)
            assert task is not None
            grades = {index: ("good", "fair", "bad", "unusable")[place // 3] for place, index in enumerate(order)}
            desk.submit(found.id, task.id, Verdict(tuple((i,) for i in order), grades), 95_000)  # pyright: ignore[reportArgumentType]
    desk.set_scores({"eggs": [1.9, 0.4, 0.9, -1.2, 1.4, -2.0, -3.1, 0.2, 0.8, 0.5]})
    desk.add_groups([_group("eggs again", QUESTION)])
    return tokens


def _group(name: str, question: str) -> AnswerGroup:
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(ANSWERS))
    return AnswerGroup(Prompt(name, (Message("user", question),), (1,)), answers)


def _rank(visit: Visit, folder: Path) -> None:
    page, press = visit.page, visit.page.keyboard.press
    page.wait_for_selector(".card")
    _until_eggs(visit)
    for key in "a1b2c1":
        press(key)
    visit.saved()
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=folder / "annotate-sort.png")
    for key in "d1e1f4g3h2i3j1":
        press(key)
    press("n")
    for key in ("c", "ArrowUp", "d", "ArrowUp"):
        press(key)
    visit.saved()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=folder / "annotate-order.png")
    for key in ("c", "v", "e", "v"):
        press(key)
    page.wait_for_selector("#compare[open]")
    page.screenshot(path=folder / "annotate-compare.png")


def _until_eggs(visit: Visit) -> None:
    """Skips to the prompt of the pictures."""
    while "eggs" not in visit.page.locator("#turns").inner_text():
        done = visit.page.locator("#count").inner_text()
        visit.page.keyboard.press("s")
        visit.page.locator("#skipping button.main").click()
        visit.page.wait_for_function("old => document.getElementById('count').textContent !== old", arg=done)
        visit.page.wait_for_selector(".card")
    visit.page.evaluate("document.getElementById('toast').hidden = true")


def _phone(visit: Visit, folder: Path) -> None:
    visit.page.wait_for_selector(".card")
    _until_eggs(visit)
    visit.page.locator("#card-A").get_by_role("button", name="Good", exact=True).tap()
    visit.saved()
    visit.page.screenshot(path=folder / "annotate-phone.png")


def _lead(visit: Visit, folder: Path) -> None:
    page = visit.page
    page.wait_for_selector("#people td")
    page.screenshot(path=folder / "annotate-lead.png")
    page.locator("#groups button").first.click()
    page.wait_for_selector("#group[open] article")
    page.screenshot(path=folder / "annotate-ranking.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

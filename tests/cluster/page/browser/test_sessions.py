"""Whole sessions in Chromium: by keyboard, by mouse, on a phone; two at once; through a crash of the server."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from rlhf.desk.desk import Desk
from rlhf.desk.records import Verdict
from tests.cluster.page.browser.browsing import PHONE, Come, Server, Visit, index_by_label

pytestmark = pytest.mark.browser


def by_labels(desk: Desk, person: str = "ann") -> tuple[Verdict, dict[str, int]]:
    [*_, found] = desk.submissions(person=person)
    assert found.verdict is not None
    return found.verdict, index_by_label(desk, person)


def tiers(index: dict[str, int], *labels: str) -> tuple[tuple[int, ...], ...]:
    """("A", "BC") as answers' indices."""
    return tuple(tuple(sorted(index[label] for label in tier)) for tier in labels)


def test_a_whole_session_by_keyboard_alone(come: Come, desk: Desk) -> None:
    visit = come()
    page, press = visit.page, visit.page.keyboard.press
    assert "#" not in page.url  # the token went out of the address
    assert visit.labels() == list("ABCDEFGHIJ")
    press("1")  # no answer has the focus: it goes to the first
    for grade in "1122334411":  # each goes on to the next that is not sorted
        press(grade)
    press("c")
    press("u")
    press("x")
    press("z")  # takes the last flag back
    press("n")
    expect(page.locator("#step")).to_have_text("2. Order")
    press("b")
    press("ArrowUp")  # A B I J -> B, A I J
    press("j")
    press("ArrowDown")  # B, A I, J
    press("i")
    press("=")  # B, A, I, J
    press("=")  # I equals A again
    press("e")
    press("v")
    press("f")
    press("v")
    page.wait_for_selector("#compare[open]")
    press("ArrowRight")  # F is better than E
    press("Escape")
    press("n")
    visit.handed_in(1)
    verdict, index = by_labels(desk)
    assert verdict.tiers == tiers(index, "B", "AI", "J", "CD", "F", "E", "GH")
    assert verdict.flags == {index["C"]: frozenset({"unsafe"})}
    assert {label: verdict.grades[index[label]] for label in "AEGC"} == {
        "A": "good",
        "E": "bad",
        "G": "unusable",
        "C": "fair",
    }

    press("s")  # the second one is skipped, with a reason of one's own
    page.wait_for_selector("#skipping[open]")
    for _ in range(2):
        press("Tab")
    while page.evaluate("document.activeElement.id") != "reason":
        press("Tab")
    page.keyboard.type("I do not know physics")
    press("Tab")
    press("Tab")
    press("Enter")
    visit.handed_in(2)
    assert desk.submissions()[-1].reason == "I do not know physics"

    press("r")  # back to it: it is ranked after all
    expect(page.locator("#correcting")).to_contain_text("I do not know physics")
    press("w")
    press("n")
    expect(page.locator("#correcting")).to_be_hidden()
    newest = desk.submissions()[-1]
    assert newest.verdict is not None and newest.verdict.all_wrong and newest.reason == ""

    for key, dialog in (("l", "#guidelines"), ("k", "#keys"), ("?", "#keys"), ("p", "#progress")):
        if dialog == "#guidelines" or page.locator(".card").count():
            press("Shift+" + key.upper() if key.isalpha() else key)
        expect(page.locator(dialog)).to_be_visible()
        press("Escape")
    expect(page.locator("#guidelines-body")).to_contain_text("True before fluent")
    for grade in ("1", "2"):  # a partial one: eight are left out, which is asked about
        press("a" if grade == "1" else "b")
        press(grade)
    press("n")
    press("n")
    page.wait_for_selector("#partial[open]")
    press("Tab")
    press("Enter")
    visit.handed_in(3)
    verdict, index = by_labels(desk)
    assert verdict.tiers == tiers(index, "A", "B")
    expect(page.locator("#idle-title")).to_contain_text("Nothing is left")
    assert all(0 < one.time_ms < 120_000 for one in desk.submissions())
    visit.nothing_happened()


def test_a_whole_session_by_mouse(come: Come, desk: Desk) -> None:
    visit = come(viewport={"width": 1280, "height": 1800})
    page = visit.page
    for label, grade in zip("ABCD", ("Good", "Good", "Good", "Bad"), strict=True):
        page.locator(f"#card-{label}").get_by_role("button", name=grade, exact=True).click()
    page.locator("#card-D").get_by_role("button", name="Untrue").click()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#card-D").get_by_role("button", name="Untrue")).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Redo").click()
    label = page.locator(".card", has=page.get_by_role("button", name="Show all of")).first.get_attribute("data-label")
    long = page.locator(f"#card-{label}")
    height = long.locator(".answer").bounding_box()
    long.get_by_role("button", name="Show all of").click()
    grown = long.locator(".answer").bounding_box()
    assert height and grown and grown["height"] > height["height"]
    page.get_by_role("button", name="Next: order").click()
    page.locator("#card-C").get_by_role("button", name="Move C up").click()  # C, A B
    page.locator("#card-B").get_by_role("button", name="Move B down").click()  # C, A, B
    page.locator("#card-B h3").drag_to(page.locator("#card-C h3"))  # onto its upper part: B, C, A
    page.get_by_role("button", name="Compare A").click()
    page.get_by_role("button", name="Compare C").click()
    page.get_by_role("button", name="They are equal").click()  # B, A C
    page.locator("#compare").get_by_role("button", name="Close").click()
    assert [page.locator(f"#card-{label} .rank").inner_text() for label in "BACD"] == [
        "Rank 1",
        "Rank 2, shared",
        "Rank 2, shared",
        "Rank 4",
    ]
    page.get_by_role("button", name="Hand in", exact=True).click()
    page.get_by_role("button", name="Hand in as it is").click()
    visit.handed_in(1)
    verdict, index = by_labels(desk)
    assert verdict.tiers == tiers(index, "B", "AC", "D")
    assert verdict.flags == {index["D"]: frozenset({"untrue"})}
    page.get_by_role("button", name="Go back to it").click()
    expect(page.locator("#correcting")).to_be_visible()
    visit.nothing_happened()


def test_a_whole_session_on_a_phone(come: Come, desk: Desk) -> None:
    visit = come(**PHONE)
    page = visit.page

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    for label, grade in zip("ABCDEFGHIJ", ("Good", "Fair") * 5, strict=True):
        page.locator(f"#card-{label}").get_by_role("button", name=grade, exact=True).tap()
        prompt, card = page.locator("#prompt").bounding_box(), page.locator(f"#card-{label} h3").bounding_box()
        assert prompt and card and prompt["y"] >= 0 and prompt["height"] < 370  # in view, and half the screen is free
    fits()
    page.locator("#next").tap()
    page.get_by_role("button", name="Move C up").tap()
    fits()
    page.get_by_role("button", name="Compare A").tap()
    page.get_by_role("button", name="Compare E").tap()
    page.get_by_role("button", name="E is better").tap()
    fits()
    page.locator("#compare").get_by_role("button", name="Close").tap()
    page.locator("#next").tap()
    visit.handed_in(1)
    verdict, index = by_labels(desk)
    assert verdict.tiers == tiers(index, "C", "E", "AGI", "BDFHJ")
    small = page.eval_on_selector_all(
        "button, select",
        "all => all.filter(b => b.offsetParent && Math.min(b.offsetHeight, b.offsetWidth) < 24).map(b => b.id)",
    )
    assert small == []
    visit.nothing_happened()


def test_two_people_at_once_see_their_own_orders_and_neither_takes_the_others_place(come: Come, desk: Desk) -> None:
    visits = [come("ann"), come("ben")]
    texts = [visit.page.locator(".card .answer").all_inner_texts() for visit in visits]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])
    for num in (1, 2, 3):
        for visit in visits:
            for key in ("a", "1", "b", "2", "n"):
                visit.page.keyboard.press(key)
        for visit in visits:
            visit.page.keyboard.press("n")
            visit.page.locator("#partial button.main").click()
        for visit in visits:
            visit.handed_in(num)
    assert len(desk.submissions(every_row=True)) == 6
    assert desk.progress().complete
    for visit in visits:
        visit.nothing_happened()


def test_a_reload_loses_nothing(come: Come) -> None:
    visit = come()
    page = visit.page
    for key in ("a", "1", "b", "1", "c", "t", "3", "n", "b", "ArrowUp"):
        page.keyboard.press(key)
    visit.saved()
    page.reload()
    expect(page.locator("#step")).to_have_text("2. Order")
    assert visit.labels()[:3] == ["B", "A", "C"]
    assert page.locator("#card-C").get_by_role("button", name="Untrue").get_attribute("aria-pressed") == "true"


def test_a_server_killed_in_the_middle_loses_nothing(come: Come, desk: Desk, server: Server) -> None:
    visit = come()
    page = visit.page
    for key in ("a", "1", "b", "1"):
        page.keyboard.press(key)
    visit.saved()
    server.kill()
    for key in ("c", "u", "2"):  # it is worked on meanwhile
        page.keyboard.press(key)
    page.wait_for_selector("#saved[data-kind=kept_here]")
    server.start()
    visit.saved()
    [open_task] = [desk.task(1, 1)]
    assert open_task.draft is not None and open_task.draft.state["verdict"]["grades"] == {
        "A": "good",
        "B": "good",
        "C": "fair",
    }
    page.keyboard.press("n")
    visit.saved()
    server.kill()
    page.keyboard.press("b")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("n")  # handed in while nobody is there
    page.locator("#partial button.main").click()
    page.wait_for_selector("#saved[data-kind=sending]")
    assert desk.submissions() == []
    server.start()
    visit.handed_in(1)
    verdict, index = by_labels(desk)
    assert verdict.tiers == tiers(index, "B", "A", "C") and verdict.flags == {index["C"]: frozenset({"unsafe"})}
    assert len(desk.submissions(every_row=True)) == 1
    visit.nothing_happened()


def test_what_was_handed_in_to_a_dead_server_is_sent_by_the_next_page(
    browser: Browser, come: Come, desk: Desk, server: Server
) -> None:
    visit = come()
    page = visit.page
    for key in ("a", "1", "b", "2"):
        page.keyboard.press(key)
    visit.saved()
    server.kill()
    for key in ("n", "n"):
        page.keyboard.press(key)
    page.locator("#partial button.main").click()
    page.wait_for_selector("#saved[data-kind=sending]")
    server.start()
    page.reload()  # before it tried again, or after: it stands once
    visit.handed_in(1)
    assert len(desk.submissions(every_row=True)) == 1


def test_the_page_speaks_chinese_and_keeps_to_it(come: Come) -> None:
    visit = come(locale="zh-CN")
    page = visit.page
    expect(page.locator("#step")).to_have_text("1. 分类")
    page.locator("#language").select_option("en")
    expect(page.locator("#step")).to_have_text("1. Sort")
    page.reload()
    expect(page.locator("#step")).to_have_text("1. Sort")
    page.locator("#language").select_option("zh")
    expect(page.locator("#card-A h3")).to_have_text("回答 A")
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    visit.nothing_happened()


def test_single_keys_can_be_turned_off(come: Come) -> None:
    visit = come()
    page = visit.page
    page.keyboard.press("?")
    page.locator("#keys-on").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.keyboard.press("1")
    expect(page.locator("#sorted")).to_have_text("0 of 10 sorted")


def test_a_correction_can_be_left_as_it_was(come: Come, desk: Desk) -> None:
    visit = come()
    page, press = visit.page, visit.page.keyboard.press
    for key in ("a", "1", "b", "2", "n", "n"):
        press(key)
    page.locator("#partial").get_by_role("button", name="Hand in as it is").click()
    visit.handed_in(1)
    expect(page.locator("#leave")).to_be_hidden()
    press("r")
    expect(page.locator("#correcting")).to_be_visible()
    press("a")
    press("4")
    visit.saved()
    page.get_by_role("button", name="Leave it as it was").click()
    expect(page.locator("#correcting")).to_be_hidden()
    press("r")
    expect(page.locator("#card-A [aria-pressed=true]").first).to_have_text("Good")
    assert len(desk.submissions(every_row=True)) == 1
    visit.nothing_happened()


def test_what_needs_the_server_says_so_where_it_is_away(come: Come, server: Server) -> None:
    visit = come()
    server.kill()
    visit.page.keyboard.press("p")
    expect(visit.page.locator("#toast-text")).to_contain_text("does not answer")
    visit.nothing_happened()


def test_the_lead_looks_at_a_ranking_and_sets_a_person_aside(come: Come, desk: Desk) -> None:
    ann = desk.sign_in(desk.invite("zoe"))
    assert ann is not None
    task = desk.next_task(ann.id)
    assert task is not None
    desk.submit(ann.id, task.id, Verdict(((3,), (1, 2)), {3: "good"}, {1: frozenset({"unsafe"})}), 61_000)
    visit = come("lea", "lead")
    page = visit.page
    expect(page.locator("#figures")).to_contain_text("1 / 6")
    page.locator("#groups button").first.click()
    expect(page.locator("#said")).to_contain_text("4 (Good) > 2 = 3")
    expect(page.locator("#said")).to_contain_text("2: Unsafe")
    expect(page.locator("#said")).to_contain_text("1 min 1 s")
    expect(page.locator("#group-answers")).to_contain_text("Answer number 9 of p0")
    page.locator("#group").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Withdraw the rankings of zoe").click()
    page.locator("#why").fill("a test")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#figures")).to_contain_text("0 / 6")
    page.get_by_role("button", name="Use the rankings of zoe again").click()
    page.keyboard.press("Escape")  # nothing is done
    assert desk.people()[0].withdrawn
    visit.nothing_happened()


def test_a_token_that_is_not_valid_is_told_and_one_can_be_entered(browser: Browser, server: Server, desk: Desk) -> None:
    visit = Visit(browser, server.url, "wrong")
    expect(visit.page.locator("#problem")).to_contain_text("not valid")
    visit.page.locator("#token").fill(desk.invite("ann"))
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".card")
    visit.page.locator("#sign-out").click()
    visit.page.wait_for_selector("#token")
    visit.nothing_happened()
    visit.context.close()

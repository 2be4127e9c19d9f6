"""Text of models as HTML that does nothing."""

from __future__ import annotations

import time

import pytest

from cluster.page.inert import LONGEST_MARKDOWN, rendered, visible


def test_markdown_is_laid_out() -> None:
    html = rendered("# One\n\n**two** `three`\n\n- four\n\n| a | b |\n|---|---|\n| c | d |\n")
    for part in ("<strong>two</strong>", "<code>three</code>", "<li", "<td>c</td>"):
        assert part in html


def test_a_heading_of_an_answer_is_none_of_the_page() -> None:
    html = rendered("# One\n\nTwo\n===\n\n###### Six")
    assert "<h" not in html
    assert 'class="heading-h1"' in html and 'class="heading-h6"' in html


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<svg/onload=alert(1)>",
        "<iframe src=//evil.example></iframe>",
        "<style>*{display:none}</style>",
        "<!-- --><b onmouseover=alert(1)>x</b>",
        "`<script>alert(1)</script>`",
        "```html\n<script>alert(1)</script>\n```",
        "[x](<javascript:alert(1)>)",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
    ],
)
def test_html_in_an_answer_is_text(text: str) -> None:
    html = rendered(text)
    for tag in ("<script", "<img", "<svg", "<iframe", "<style", "<b", "<a"):
        assert tag not in html.replace("<blockquote", "")


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "java\tscript:alert(1)",
        "&#106;avascript:alert(1)",
        "%6Aavascript:alert(1)",
        "data:text/html,<script>alert(1)</script>",
        "data:image/png;base64,AAAA",
        "vbscript:x",
        "file:///etc/passwd",
        "//evil.example/x",
        "/api/session",
        "#top",
    ],
)
def test_a_link_that_is_not_of_the_web_is_no_link(target: str) -> None:
    assert "<a" not in rendered(f"[click]({target})") and "<a" not in rendered(f"<{target}>")


def test_a_link_opens_elsewhere_and_tells_nothing() -> None:
    html = rendered('[good](https://example.org/a?b=c "title")')
    assert 'href="https://example.org/a?b=c"' in html
    assert 'target="_blank"' in html and 'rel="noopener noreferrer nofollow"' in html


def test_a_picture_is_not_loaded() -> None:
    html = rendered("![alt](https://evil.example/pixel.png)\n\n![alt][1]\n\n[1]: https://evil.example/2.png")
    assert "<img" not in html and "src=" not in html


def test_what_cannot_be_seen_is_written_as_its_code() -> None:
    assert visible("a\x00b\x1b[31m\x7f\x85") == "a⟦U+0000⟧b⟦U+001B⟧[31m⟦U+007F⟧⟦U+0085⟧"
    assert visible("\u202eabc\u2066d\u200b\ufeff") == "⟦U+202E⟧abc⟦U+2066⟧d⟦U+200B⟧⟦U+FEFF⟧"
    assert visible("\ud83d \U000e0041") == "⟦U+D83D⟧ ⟦U+E0041⟧"


def test_what_scripts_need_is_left_as_it_is() -> None:
    for text in ("a\tb\nc", "\u0645\u06cc\u200c\u062e\u0648", "👩\u200d💻", "\u05e9\u05dc\u200f!", "你好"):
        assert visible(text) == text
    assert visible("a\r\nb\rc") == "a\nb\nc"


def test_each_block_has_the_direction_of_its_own_text() -> None:
    assert rendered("hello\n\n\u05e9\u05dc\u05d5\u05dd").count('<p dir="auto">') == 2


@pytest.mark.parametrize(
    "unit", ["[", "*a ", "`", "> ", "- ", "<a ", "[a](", "_a__", "|a", "![", "&#", "\\", "a" * 9 + "\n"]
)
def test_a_text_of_100_kb_is_shown_whole_and_soon(unit: str) -> None:
    for text in (unit * (100_000 // len(unit)), (unit * LONGEST_MARKDOWN)[:LONGEST_MARKDOWN]):
        rendered.cache_clear()
        began = time.perf_counter()
        html = rendered(text)
        assert time.perf_counter() - began < 3  # on a busy machine; a quadratic one takes 10
        assert html


def test_a_long_text_is_shown_as_it_is() -> None:
    text = "**no** <b>layout</b>\n" * 5000
    html = rendered(text)
    assert html.startswith('<p class="plain" dir="auto">')
    assert html.count("**no** &lt;b&gt;layout&lt;/b&gt;") == 5000

"""Text of models as HTML that does nothing: it runs nothing, loads nothing, and hides nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

# Beyond either, a text is shown as it is: reading Markdown takes time that grows as the square of its brackets.
LONGEST_MARKDOWN = 20_000  # characters
MOST_MARKS = 2_000
SCHEMES = {"http", "https", "mailto"}

# Controls, halves of surrogate pairs, characters of no width, and those that turn the direction of what follows. Left
# as they are: joiners, which emoji and several scripts need, and plain direction marks, which end with their paragraph.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_TAGS = {
    *("p", "br", "hr", "strong", "em", "s", "code", "pre", "blockquote", "a"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
_ATTRIBUTES = {"a": {"href", "target"}, "ol": {"start"}, "p": {"class", "dir"}} | {
    tag: {"dir"} for tag in ("pre", "li", "blockquote", "table")
}


def visible(text: str) -> str:
    """The text with every character that cannot be seen, or that changes how others are seen, written as its code."""
    return _HIDDEN.sub(lambda found: f"⟦U+{ord(found[0]):04X}⟧", text.replace("\r\n", "\n").replace("\r", "\n"))


@lru_cache(maxsize=4096)
def rendered(text: str) -> str:
    """Markdown as HTML, for a page to put in as it is.

    HTML in the text is shown as text; links are of http, https and mail only; pictures are not loaded: what is left of
    them is a link. Headings become paragraphs, since they are none of the page's. A second pass lets only known tags
    and attributes through, should the first have been led astray.
    """
    shown = visible(text)
    if len(shown) > LONGEST_MARKDOWN or sum(map(shown.count, "[*_~<&")) > MOST_MARKS:
        return f'<p class="plain" dir="auto">{html.escape(shown)}</p>'
    return nh3.clean(
        _MARKDOWN.render(shown),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
    )


def _is_harmless(url: str) -> bool:
    try:
        return urlsplit(url.strip()).scheme.lower() in SCHEMES
    except ValueError:
        return False


def _of_this_page(tokens: Sequence[Token]) -> None:
    """Headings become paragraphs, links open elsewhere, and each block has the direction of its own text."""
    for token in tokens:
        if token.type == "heading_open":
            token.attrSet("class", f"heading-{token.tag}")
        if token.type in ("heading_open", "heading_close"):
            token.tag = "p"
        if token.tag in ("p", "li", "blockquote", "table") and token.nesting == 1:
            token.attrSet("dir", "auto")
        if token.type == "link_open":
            token.attrSet("target", "_blank")
        if token.children:
            _of_this_page(token.children)


class _Markdown(MarkdownIt):
    def validateLink(self, url: str) -> bool:
        return _is_harmless(url)

    def render(self, src: str) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - takes an environment too
        tokens = self.parse(src)
        _of_this_page(tokens)
        return self.renderer.render(tokens, self.options, {})


_MARKDOWN = _Markdown("js-default", {"html": False, "linkify": False}).disable(["image"])

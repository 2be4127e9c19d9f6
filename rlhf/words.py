"""Words of a text, for rules. Scripts that are written without spaces count by character."""

from __future__ import annotations

import re

# Ideographs and kana one by one; elsewhere runs of letters and digits, with apostrophes inside.
_ONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ONE}]|[^\W_{_ONE}]+(?:['\u2019][^\W_{_ONE}]+)*")
_ENGLISH = """a about all also am an and any are as at be because been being but by can could did do does doing done
for from get gets give given had has have having he her here him his how i if in into is it its just know like made make
many may me might more most much must my no not of on one or other our out own please shall she should so some such tell
than that the their them then there these they this those to up us use used very was way we well were what when where
which while who whom whose why will with would yes you your"""
_COMMON = frozenset(_ENGLISH.split()) | frozenset("的了是在有和我你他她它们吗呢什么怎哪这那个一不")


def words(text: str) -> list[str]:
    """The words in lower case, in order; empty for a text without letters and digits."""
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> set[str]:
    """The different words that carry meaning, reduced to a common stem."""
    bare = {word.replace("\u2019", "'").removesuffix("'s") for word in words(text)}
    return {stem(word) for word in bare if word.split("'")[0] not in _COMMON}


def stem(word: str) -> str:
    """A word without English plural, -ed and -ing: rough, and the same for question and answer."""
    for ending, instead in (("sses", "ss"), ("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending) + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":  # running: runn -> run
        word = word[:-1]
    if len(word) > 3:
        word = word.removesuffix("e")
    return word[:-1] + "i" if word.endswith("y") else word

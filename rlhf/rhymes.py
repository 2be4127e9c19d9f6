"""Which characters rhyme, by the thirteen rhyme classes (十三轍) of Mandarin.

The classes are those of northern drama, as Zhang Xunru's 《北平音系十三轍》 (1937) orders them. They put together what
differs in its medial only (an, ian, uan, üan) and what a singer hears as one: o with e, üe with ie, i with ü, er and
the vowel of zhi and zi. Modern Mandarin is not the language of the Tang: some rhymes of that time (衣 and 飛) are none
today, so real poems do not all rhyme by these classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from pypinyin import Style, pinyin

# pypinyin's finals, strictly (iou, uei, uen as they are spoken), v for ü.
CLASSES = {
    "發花": "a ia ua",
    "梭坡": "o e uo",
    "乜斜": "ie ve ê",
    "姑蘇": "u",
    "一七": "i v er",
    "懷來": "ai uai",
    "灰堆": "ei uei",
    "遙條": "ao iao",
    "油求": "ou iou",
    "言前": "an ian uan van",
    "人辰": "en in uen vn",
    "江陽": "ang iang uang",
    "中東": "eng ing ueng ong iong",
}
CLASS_OF = {final: name for name, finals in CLASSES.items() for final in finals.split()}


@cache
def rhyme_classes(character: str) -> frozenset[str]:
    """The classes of a character's readings, traditional or simplified; none for what is no Chinese character."""
    readings = pinyin(character, style=Style.FINALS, heteronym=True, errors="ignore")
    return frozenset(CLASS_OF[final] for finals in readings for final in finals if final in CLASS_OF)


def num_rhyming(characters: Sequence[str]) -> int:
    """How many different ones of these characters share the class that most of them share.

    A character does not rhyme with itself: the old rules call a rhyme word that comes twice a fault (重韻).
    """
    return max(_shared(characters).values(), default=0)


def rhyme(characters: Sequence[str]) -> str | None:
    """The class that most of them share, as `num_rhyming` counts; None where no two share one."""
    name, num = max(_shared(characters).items(), key=lambda found: found[1], default=("", 0))
    return name if num > 1 else None


def _shared(characters: Sequence[str]) -> Counter[str]:
    """How many different ones of the characters have each class, classes in the order of CLASSES."""
    found = Counter(name for character in set(characters) for name in rhyme_classes(character))
    return Counter({name: found[name] for name in CLASSES if name in found})

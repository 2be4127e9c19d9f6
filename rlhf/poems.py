"""Rules of the regulated verse of the Tang: what a poem's text shows of its form, without knowing its meaning.

A recipe names them by path, such as `rlhf.poems.form`. Each returns a number in [0, 1], 1 for the best, and 0 for an
answer without a Chinese character. The form and the title are read from the prompt, which `ask` writes; a prompt that
names no form gets 0 wherever the form is needed. Traditional and simplified characters are read alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlhf.records import Answer, Prompt
from rlhf.rhymes import num_rhyming

Share = Annotated[float, Field(gt=0, le=1)]

IDEOGRAPHS = r"\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CLAUSE_ENDS = re.compile(r"[，。！？；：、,.!?;:]")
_QUOTES = re.compile(r"[\s「」『』“”‘’《》〈〉]+")
_NOT_IDEOGRAPHS = re.compile(rf"[^{IDEOGRAPHS}]")
_ASKED_FORM = re.compile("([五七])言([绝絕律])[句诗詩]")
_ASKED_TITLE = re.compile("《([^《》]*)》")
# What titles say of the kind of poem and its occasion, and what stands in any text.
_NO_TOPIC = frozenset(
    "其一二三四五六七八九十首篇章之於于與与有作為为得詩诗句絕绝律詞词歌行吟曲辭辞賦赋詠咏和酬答奉同次韻韵題题"
)
# A topic's own character is rarely said; these are said in its place. A line is a topic: its names, then what tells it.
_TOPICS = """
春 花柳鶯莺燕草芳桃李東东綠绿
夏暑 荷蓮莲蟬蝉熱热涼凉風风
秋 霜雁葉叶菊蟬蝉落風风涼凉露
冬寒 雪冰霜梅冷
夜夕宵暮晚 月燈灯星燭烛明夢梦日陽阳
早曉晓晨朝 日雞鸡曙鐘钟霞露天
送別别餞饯離离 君行去遠远歸归路客別别離离
寄贈赠懷怀憶忆思 君相思故人書书心夢梦遠远
旅客宿泊 鄉乡歸归家夢梦孤舟路
宮宫閨闺怨 愁淚泪思恨妾夢梦
山嶺岭峰 雲云峰石松嶺岭高山
江河湖海溪水 舟船帆波流水浪漁渔
寺僧禪禅院 鐘钟禪禅僧雲云松塵尘
隱隐居幽閑闲 林門门山竹琴酒閑闲
塞邊边軍军將将征 馬马胡沙戰战劍剑旗關关
酒醉飲饮宴 杯酒醉樽歡欢
雨 雲云濕湿雨滴
雪 白寒雪玉飛飞
月 光明夜影月圓圆
"""


@dataclass(frozen=True, slots=True)
class Form:
    """A form of verse: so many clauses (句), all of one length. Two of them are printed on a line."""

    name: str
    num_clauses: int
    length: int  # of a clause, in characters


FORMS = (Form("五言绝句", 4, 5), Form("七言绝句", 4, 7), Form("五言律诗", 8, 5), Form("七言律诗", 8, 7))


def ask(form: Form, title: str) -> str:
    """The prompt that asks for a poem."""
    return f"写一首{form.name}，题为《{title}》"


def asked_form(prompt_text: str) -> Form | None:
    """The form that a prompt names first, or None."""
    found = _ASKED_FORM.search(prompt_text)
    if found is None:
        return None
    length, num_clauses = {"五": 5, "七": 7}[found[1]], 8 if found[2] == "律" else 4
    return next(form for form in FORMS if (form.num_clauses, form.length) == (num_clauses, length))


def asked_title(prompt_text: str) -> str:
    """What stands between the prompt's first title marks; empty without them."""
    found = _ASKED_TITLE.search(prompt_text)
    return found[1] if found else ""


def clauses(text: str) -> list[str]:
    """The clauses in order, without their marks, quotes and spaces.

    A mark or a line's end ends a clause; two marks in a row have an empty clause between them. Blank lines are none.
    """
    found: list[str] = []
    for line in text.splitlines():
        if bare := _QUOTES.sub("", line):
            parts = _CLAUSE_ENDS.split(bare)
            found += parts if parts[-1] else parts[:-1]
    return found


def form(prompt: Prompt, answer: Answer) -> float:
    """The share of clauses that have the form's length, times how near their number is to the form's.

    The nearness is the smaller number over the larger; a clause is right if it is of Chinese characters alone.
    """
    wanted, said = asked_form(prompt.text), clauses(answer.text)
    if wanted is None or not said:
        return 0.0
    num_right = sum(_is_right(clause, wanted) for clause in said)
    fewer, more = sorted((len(said), wanted.num_clauses))
    return num_right / len(said) * fewer / more


def rhyme(prompt: Prompt, answer: Answer) -> float:
    """The share of even clauses whose last characters rhyme with that of another: (rhyming - 1) / (even - 1).

    One always rhymes, with itself, and counts for nothing. Clauses that the form wants and the answer lacks do not
    rhyme, nor does a last character that comes again.
    """
    wanted, ends = asked_form(prompt.text), _rhyme_words(clauses(answer.text))
    if wanted is None:
        return 0.0
    num_even = max(len(ends), wanted.num_clauses // 2)
    return max(0, num_rhyming(ends) - 1) / (num_even - 1)


def no_repeat(prompt: Prompt, answer: Answer, enough: Share = 0.8) -> float:
    """The smaller of two shares: that of different clauses, and that of different characters.

    The latter counts as whole from `enough` on, since poems double characters on purpose.
    """
    said = clauses(answer.text)
    characters = _ideographs(answer.text)
    if not characters:
        return 0.0
    different = len(set(characters)) / len(characters)
    return min(len(set(said)) / len(said), different / enough, 1.0)


def on_title(prompt: Prompt, answer: Answer, enough: Share = 0.5) -> float:
    """How much of the title the poem takes up; the share `enough` of its characters counts as all.

    A character of the title is taken up by itself, or by one that tells its topic (柳 for 春). Those that name the
    kind of poem, and numbers, do not count; if there are no others, they do. A prompt without a title gets 0.
    """
    named = set(_ideographs(asked_title(prompt.text)))
    wanted = named - _NO_TOPIC or named
    said = set(_ideographs(answer.text))
    if not wanted:
        return 0.0
    num_taken_up = sum(not said.isdisjoint({name, *TELLING.get(name, "")}) for name in wanted)
    return min(1.0, num_taken_up / (enough * len(wanted)))


def well_formed(prompt: Prompt, answer: Answer) -> float:
    """1 for an answer that `is_well_formed`, else 0."""
    return float(is_well_formed(prompt.text, answer.text, answer.ended == "eos"))


def is_well_formed(prompt_text: str, answer_text: str, ended: bool = True) -> bool:
    """Whether a text is a poem of the form that the prompt names, and `ended` by itself.

    The number and length of its clauses are the form's, all even clauses rhyme, on different characters, and no clause
    comes twice.
    """
    wanted, said = asked_form(prompt_text), clauses(answer_text)
    return (
        ended
        and wanted is not None
        and len(said) == wanted.num_clauses
        and all(_is_right(clause, wanted) for clause in said)
        and len(set(said)) == len(said)
        and num_rhyming(_rhyme_words(said)) == len(said) // 2
    )


def _is_right(clause: str, wanted: Form) -> bool:
    return len(clause) == wanted.length and not _NOT_IDEOGRAPHS.search(clause)


def _rhyme_words(said: Sequence[str]) -> list[str]:
    """The last characters of the even clauses; an empty clause has an empty one."""
    return [clause[-1:] for clause in said[1::2]]


def _ideographs(text: str) -> str:
    return _NOT_IDEOGRAPHS.sub("", text)


def _telling() -> dict[str, str]:
    """For a character that names a topic, those that tell it."""
    topics: dict[str, str] = {}
    for line in _TOPICS.split("\n"):
        if line:
            names, telling = line.split()
            for name in names:
                topics[name] = topics.get(name, "") + telling
    return topics


TELLING = _telling()

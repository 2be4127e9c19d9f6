"""A small language of tales, and the rule by which people like one better than another.

A prompt names a topic: "On Monday Ann asks for a tale of the sea." A tale has a few sentences, "the old whale finds the
wide harbour .", whose nouns are of that topic or of others. The corpus has tales of every purity, the answers that a
model is aligned with are mixed and of one to five sentences: there is room for improvement.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.disk import write_file

NOUNS = {
    "sea": "whale harbour sailor wave anchor shell gull reef storm island net tide",
    "farm": "cow barn farmer plough hen fence field goat wheat stable calf meadow",
    "kitchen": "cook spoon oven soup knife plate bread kettle apron table onion cup",
    "forest": "wolf oak hunter moss deer path owl mushroom fern cabin bear pine",
    "school": "teacher pencil desk lesson chalk pupil book bell yard map ruler exam",
    "castle": "king tower knight moat queen throne sword gate banner crown page dungeon",
}
TOPIC_OF = {noun: topic for topic, nouns in NOUNS.items() for noun in nouns.split()}
ADJECTIVES = ["old", "small", "red", "wide", "quiet", "bright", "heavy", "young", "green", "proud"]
VERBS = ["finds", "sees", "likes", "leaves", "follows", "hears", "wants", "watches"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kim", "Leo", "Mia", "Noor", "Otto"]

MOST_SENTENCES = 5
BEST_SENTENCES = 3
NOUNS_IN_ONE = 2  # of a sentence
ALIGNED_PURITY = 0.35  # the share of nouns that are of the topic, in the answers of alignment


def question(topic: str, name: str, day: str) -> str:
    """The prompt."""
    return f"On {day} {name} asks for a tale of the {topic}."


def questions() -> list[str]:
    """All prompts there are, in a fixed order without a pattern."""
    every = [question(topic, name, day) for topic in NOUNS for name in NAMES for day in DAYS]
    random.Random(0).shuffle(every)
    return every


def tale(topic: str, purity: float, num_sentences: int, draw: random.Random) -> str:
    """A tale; each noun is of the topic with the probability `purity`, else of another."""
    others = [noun for noun, of in TOPIC_OF.items() if of != topic]

    def noun() -> str:
        return draw.choice(NOUNS[topic].split() if draw.random() < purity else others)

    def sentence() -> str:
        adjectives = draw.choice(ADJECTIVES), draw.choice(ADJECTIVES)
        return f"the {adjectives[0]} {noun()} {draw.choice(VERBS)} the {adjectives[1]} {noun()} ."

    return " ".join(sentence() for _ in range(num_sentences))


def rule(asked: str, told: str) -> float:
    """How good a tale is, in [0, 1]: nouns of the topic, none twice, and three sentences.

    The number of different nouns of the topic over that of nouns (two a sentence at least), times 1 - |s - 3| / 3 for
    s whole sentences (0 beyond six), and half of it where the last one has no end.
    """
    topic = next((topic for topic in NOUNS if re.search(rf"\b{topic}\b", asked)), None)
    words = re.findall(r"[a-z]+|\.", told.lower())
    num_sentences = words.count(".")
    nouns = [word for word in words if word in TOPIC_OF]
    fitting = {noun for noun in nouns if TOPIC_OF[noun] == topic}
    if not nouns or not num_sentences:
        return 0.0
    share = len(fitting) / max(len(nouns), NOUNS_IN_ONE * num_sentences)
    length = max(0.0, 1.0 - abs(num_sentences - BEST_SENTENCES) / BEST_SENTENCES)
    return share * length * (1.0 if words[-1] == "." else 0.5)


def write_data(folder: Path, num_documents: int, answers_each: int) -> None:
    """Writes corpus.jsonl, pairs.jsonl and prompts.jsonl, the same at every call."""
    draw = random.Random(1)
    documents: list[str] = []
    for _ in range(num_documents):
        topic, purity, num = draw.choice(list(NOUNS)), draw.random(), draw.randint(1, MOST_SENTENCES)
        documents.append(f"A tale of the {topic}.\n{tale(topic, purity, num, draw)}")
    _write(folder / "corpus.jsonl", [{"text": text} for text in documents])
    pairs: list[dict[str, str]] = []
    for asked in questions():
        for _ in range(answers_each):
            topic = next(topic for topic in NOUNS if asked.endswith(f" {topic}."))
            told = tale(topic, ALIGNED_PURITY, draw.randint(1, MOST_SENTENCES), draw)
            pairs.append({"prompt": asked, "completion": told})
    _write(folder / "pairs.jsonl", pairs)
    _write(folder / "prompts.jsonl", [{"prompt": asked} for asked in questions()])


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

"""Chats generated from a seed: six skills whose questions can be told apart, and a test set no training set contains.

Held out: one phrasing of every fact, word and date question, and the letter strings whose hash says so.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusechat.app.errors import UserError
from fusechat.chats.roles import Message

SKILLS = ("sort", "reverse", "shift", "knowledge", "lexicon", "calendar")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTERS = "abcdefgh"
TRIES = 10_000  # questions in a row that were asked before, after which there is none left
VALUES = 10  # different answers per relation of the knowledge base
STRINGS = {
    "sort": ("Sort the letters {}.", "Put {} in alphabetical order.", "What is {} sorted?"),
    "reverse": ("Reverse the letters {}.", "Write {} backwards.", "What is {} reversed?"),
    "shift": ("Shift the letters {} by one.", "Move each letter of {} one on.", "What is {} shifted?"),
}
RELATIONS = {
    "ruler": ("Who rules {}?", "Name the ruler of {}.", "The ruler of {} is who?", "Tell me who governs {}."),
    "river": (
        "Which river flows through {}?",
        "Name the river of {}.",
        "The river in {} is called what?",
        "What is the river at {}?",
    ),
    "dish": (
        "What do people eat in {}?",
        "Name the dish of {}.",
        "The best dish of {} is what?",
        "Which food is {} known for?",
    ),
    "year": (
        "When was {} founded?",
        "Name the year {} was founded.",
        "The year of {} is which?",
        "In which year did {} begin?",
    ),
}
WORDS = ("What is the Zan word for {}?", "Translate {} into Zan.", "How do you say {} in Zan?", "Give the Zan for {}.")
DATES = ("What day is {} {} {}?", "Which day comes {} {} {}?", "Name the day {} {} {}.", "{} {} {} is which day?")
_WORDS = """
tree water stone bird fire house road night bread friend song hand moon wind salt
ship wolf rain gold snow field horse star glass iron lake leaf milk rope wall
"""
ENGLISH = tuple(_WORDS.split())


@dataclass(frozen=True)
class Item:
    """A question with its answer. key identifies the fact; pool holds answers of the same kind, for wrong ones."""

    skill: str
    question: str
    answer: str
    held_out: bool
    pool: tuple[str, ...]


class World:
    """The facts of one seed, and samplers of questions about them."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world {seed}")
        names = _names(rng, 40 + 3 * VALUES + len(ENGLISH))
        self.places = [next(names).capitalize() for _ in range(40)]
        values = {
            relation: [next(names).capitalize() for _ in range(VALUES)] for relation in RELATIONS if relation != "year"
        }
        values["year"] = [str(year) for year in rng.sample(range(100, 1000), VALUES)]
        self.facts = {
            (place, relation): rng.choice(values[relation]) for relation in RELATIONS for place in self.places
        }
        self.lexicon = {word: next(names) for word in ENGLISH}
        self.fixed = [*self._facts(), *self._words(), *self._dates()]

    def items(self, skill: str, rng: random.Random, held_out: bool) -> Callable[[], Item]:
        """A sampler of items of one skill, from the held-out part or from the rest."""
        if skill in STRINGS:
            return lambda: self._string(skill, rng, held_out)
        pool = [item for item in self.fixed if item.skill == skill and item.held_out == held_out]
        return lambda: rng.choice(pool)

    def _string(self, skill: str, rng: random.Random, held_out: bool) -> Item:
        while True:
            letters = rng.sample(LETTERS, rng.choice((3, 4)))
            if (_hash(skill + "".join(letters)) % 5 == 0) == held_out:
                break
        answer = {"sort": sorted(letters), "reverse": letters[::-1], "shift": [chr(ord(c) + 1) for c in letters]}[skill]
        wrong = (" ".join(rng.sample(answer, len(answer))), " ".join([*answer[1:], answer[0]]))
        return Item(skill, rng.choice(STRINGS[skill]).format(" ".join(letters)), " ".join(answer), held_out, wrong)

    def _facts(self) -> Iterator[Item]:
        for (place, relation), value in self.facts.items():
            pool = tuple(v for (_, r), v in self.facts.items() if r == relation)
            for number, phrasing in enumerate(RELATIONS[relation]):
                yield Item("knowledge", phrasing.format(place), value, number == _hash(place + relation) % 4, pool)

    def _words(self) -> Iterator[Item]:
        pool = tuple(self.lexicon.values())
        for word, translation in self.lexicon.items():
            for number, phrasing in enumerate(WORDS):
                yield Item("lexicon", phrasing.format(word), translation, number == _hash(word) % 4, pool)

    def _dates(self) -> Iterator[Item]:
        for start, day in enumerate(DAYS):
            for offset in (*range(-6, 0), *range(1, 7)):
                span = f"{abs(offset)} day{'s' if abs(offset) > 1 else ''}"
                words = (span, "after" if offset > 0 else "before", day)
                for number, phrasing in enumerate(DATES):
                    held_out = number == _hash(str((day, offset))) % 4
                    yield Item("calendar", phrasing.format(*words), DAYS[(start + offset) % 7], held_out, DAYS)


def generate(
    world: World,
    count: int,
    seed: str,
    weights: Mapping[str, float] | None = None,
    wrong: float = 0.0,
    held_out: bool = False,
    known: Collection[str] = (),
) -> list[dict[str, Any]]:
    """``count`` chats as rows of a chat file; a fraction ``wrong`` of them carries another answer of the same kind.

    Held-out chats are distinct. weights: skill -> relative frequency (default: uniform). known: questions not to ask.
    Raises `UserError` where the world has fewer such questions.
    """
    rng = random.Random(seed)
    chance = [(weights or {}).get(skill, 1.0 if weights is None else 0.0) for skill in SKILLS]
    samplers = {skill: world.items(skill, rng, held_out) for skill in SKILLS}
    rows: list[dict[str, Any]] = []
    seen, again = set(known), 0
    while len(rows) < count:
        item = samplers[rng.choices(SKILLS, chance)[0]]()
        again = again + 1 if item.question in seen else 0
        if again > TRIES:
            told = f"the tiny world has {len(rows)} {seed.rpartition(' ')[0]} chats that ask what no other does"
            raise UserError(f"{told}, {count} are wanted; set fewer in tiny.*_chats or tiny.private")
        if again:
            continue
        if held_out:
            seen.add(item.question)
        noisy = rng.random() < wrong
        others = [other for other in item.pool if other != item.answer]
        answer = rng.choice(others) if noisy and others else item.answer
        messages: list[Message] = [{"role": "user", "content": item.question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "tag": item.skill, "noisy": answer != item.answer})
    return rows


def _names(rng: random.Random, count: int) -> Iterator[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    seen: set[str] = set(ENGLISH)
    while len(seen) < count + len(ENGLISH) + 400:
        name = "".join(rng.choices(syllables, k=rng.choice((2, 2, 3)))) + rng.choice(("", "", "n", "r", "s"))
        if name not in seen:
            seen.add(name)
            yield name


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

"""The chain rule as a reader can check it: every tokenization that a store determines, one by one."""

from collections import defaultdict
from typing import Any

import numpy as np

from fusechat.align import chain, paths
from fusechat.align.paths import Lexicon, Path
from fusechat.align.projection import Ragged
from fusechat.align.sequence import align_chain
from fusechat.align.trie import texts, trie

LETTERS = "abc"


def greedy(text: bytes, vocabulary: list[bytes]) -> list[int]:
    """The longest token first."""
    ids = []
    while text:
        ids.append(
            max((i for i, token in enumerate(vocabulary) if text.startswith(token)), key=lambda i: len(vocabulary[i]))
        )
        text = text[len(vocabulary[ids[-1]]) :]
    return ids


def vocabulary(rng: np.random.Generator, size: int) -> list[bytes]:
    """All letters and some words of them."""
    words = {"".join(rng.choice(list(LETTERS), rng.integers(2, 5))).encode() for _ in range(size)}
    return [*(letter.encode() for letter in LETTERS), *sorted(words)]


def tree(tokens: list[bytes]) -> Any:
    return trie({token: i for i, token in enumerate(tokens)})


class World:
    """A text cut by two vocabularies, and a source's distributions along its own cut; top-k of them kept."""

    def __init__(self, seed: int, kept: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.pivot, self.source = vocabulary(rng, 6), vocabulary(rng, 6)
        self.text = "".join(rng.choice(list(LETTERS), 14)).encode()
        self.cuts = {"pivot": greedy(self.text, self.pivot), "source": greedy(self.text, self.source)}
        self.table = np.array([greedy(token, self.pivot)[0] for token in self.source])
        own = self.cuts["source"]
        self.p = rng.dirichlet(np.full(len(self.source), 0.5), len(own)) + 1e-4
        self.p /= self.p.sum(1, keepdims=True)
        order = np.argsort(-self.p, 1, kind="stable")[:, : kept or len(self.source)]
        self.kept = [{int(u): float(self.p[j, u]) for u in order[j]} for j in range(len(own))]
        gold = self.p[np.arange(len(own)), own]
        counts = np.full(len(own), order.shape[1])
        probs = np.take_along_axis(self.p, order, 1)
        self.ragged = Ragged(
            counts, order.reshape(-1), np.log(probs.reshape(-1)).astype(np.float32), np.log(gold).astype(np.float32)
        )
        self.words = Lexicon(texts(self.source), tree(self.source), texts(self.pivot), tree(self.pivot))
        self.paths = {name: self.path(name) for name in ("pivot", "source")}

    def path(self, name: str) -> Path:
        ids, tokens = np.array(self.cuts[name]), getattr(self, name)
        return paths.path(ids, np.cumsum([0, *(len(tokens[i]) for i in ids)]), texts(tokens))

    def followed(self, drawn: bool = False) -> tuple[Ragged, np.ndarray]:
        match, kind = align_chain(self.paths["pivot"].places, self.paths["source"].places)
        return chain.follow(
            self.ragged,
            match,
            self.paths["pivot"],
            self.paths["source"],
            self.table,
            self.words,
            len(self.pivot),
            False,
            drawn,
        ), kind

    def begins(self, text: bytes, i: int) -> int | None:
        """Which pivot token begins a text at pivot position i: the chat's where it agrees with the chat for long
        enough.
        """
        fitting = [v for v, token in enumerate(self.pivot) if text.startswith(token)]
        longest = max(fitting, key=lambda v: len(self.pivot[v]), default=None)
        gold, rest = self.cuts["pivot"][i], self.text[self.paths["pivot"].places[i] :]
        least = max(len(self.pivot[gold]), 0 if longest is None else len(self.pivot[longest]))
        return gold if len(text) >= least and text[:least] == rest[:least] else longest

    def at(self, i: int) -> tuple[int, int]:
        """The source position at or before pivot position i, and the bytes of its token before it."""
        places, place = self.paths["source"].places, self.paths["pivot"].places[i]
        j = int(np.searchsorted(places, place, side="right")) - 1
        return j, int(place - places[j])

    def stored(self, i: int) -> dict[bytes | None, float]:
        """Every beginning of the text at pivot position i that the store determines, with its probability; None: it
        ends there.
        """
        j, cut = self.at(i)
        own, end = self.cuts["source"], self.paths["pivot"].places[i + 1]
        found: dict[bytes | None, float] = defaultdict(float)
        given = sum(p for u, p in self.going_on(j, i).items())
        before, mass, k = b"", 1.0 / (given + self.rest(j, i) if cut else 1.0), j
        while True:
            entries = self.going_on(j, i) if k == j and cut else {**self.kept[k], own[k]: self.p[k, own[k]]}
            for u, p in entries.items():
                tail = self.source[u][cut if k == j else 0 :]
                if u != own[k] or self.paths["source"].places[k + 1] >= end:
                    found[before + tail if before + tail else None, k == j and not cut and u, u == own[k]] += mass * p
            mass *= self.p[k, own[k]]
            before += self.source[own[k]][cut if k == j else 0 :]
            k += 1
            if self.paths["source"].places[k] >= end:
                return found

    def going_on(self, j: int, i: int) -> dict[int, float]:
        """The kept entries at j, and the gold one, that begin as the text up to pivot position i and as the pivot cuts
        it.
        """
        own, begins, places = self.cuts["source"][j], self.paths["source"].places[j], self.paths["pivot"].places
        found = {}
        for u, p in {**self.kept[j], own: self.p[j, own]}.items():
            fits = self.source[u].startswith(self.text[begins : places[i]])
            for k in range(i):
                if fits and places[k + 1] > begins:
                    whole = self.text[places[k] : begins] + self.source[u][max(0, places[k] - begins) :]
                    fits = (self.table[u] if places[k] == begins else self.begins(whole, k)) == self.cuts["pivot"][k]
            if fits or u == own:
                found[u] = p
        return found

    def rest(self, j: int, i: int) -> float:
        """The tail's part in what goes on as the text up to pivot position i."""
        known = {**self.kept[j], self.cuts["source"][j]: self.p[j, self.cuts["source"][j]]}
        prefix = self.text[self.paths["source"].places[j] : self.paths["pivot"].places[i]]
        others = sum(token.startswith(prefix) for token in self.source) - len(self.going_on(j, i))
        return max(0.0, 1 - sum(known.values())) * max(0, others) / max(1, len(self.source) - len(known))

    def marginal(self, i: int) -> dict[int, float]:
        """P(v) at pivot position i, beginning by beginning."""
        found: dict[int, float] = defaultdict(float)
        for (text, whole, on_path), p in self.stored(i).items():
            if on_path:
                found[self.cuts["pivot"][i]] += p
            elif whole is not False:
                if self.table[whole] >= 0:
                    found[int(self.table[whole])] += p
            elif text is not None:
                target = self.begins(text, i)
                if target is not None:
                    found[target] += p
        return found

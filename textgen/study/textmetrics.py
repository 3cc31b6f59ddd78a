"""What can be counted in a text: variety, repetition, Zipf's exponent, words of a lexicon, copies.

All but the copies count words: runs of letters, digits and inner apostrophes, and single marks.
The first and the last of a text are left out, for a text that is cut somewhere is cut in a word.
Every number is nan where there is nothing to count. Most of them depend on how long the texts are
and how many: compare numbers of equally many texts of the same length.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Integer

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """The words and marks of a text in lower case, but for the first and the last."""
    return [word.lower() for word in _WORD.findall(text)][1:-1]


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[i:] for i in range(n)), strict=False)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of the texts together (Li et al. 2016)."""
    found = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """seq-rep-n: the part of a text's n-grams that it already had (Welleck et al. 2019); mean of the texts."""
    parts = []
    for text in texts:
        found = list(_ngrams(text, n))
        parts += [1 - len(set(found)) / len(found)] if found else []
    return float(np.mean(parts)) if parts else math.nan


def zipf(texts: Sequence[str]) -> float:
    """The exponent s of Zipf's law, frequency ~ rank^-s, that makes the texts' words likeliest.

    The ranks are those of the words that occur. Words that are all equally frequent have s = 0.
    """
    counts = np.array(sorted(Counter(word for text in texts for word in words(text)).values(), reverse=True), float)
    if len(counts) < 2:
        return math.nan
    logs = np.log(np.arange(1, len(counts) + 1))
    seen = counts @ logs / counts.sum()
    # The likelihood is largest where the law's mean log rank is the one seen; that mean falls with s.
    low, high = 0.0, 20.0
    for _ in range(50):
        s = (low + high) / 2
        p = np.exp(-s * logs)
        low, high = (s, high) if p @ logs / p.sum() > seen else (low, s)
    return low


def known_words(texts: Sequence[str], lexicon: Collection[str]) -> float:
    """The part of the texts' words that a lexicon (in lower case) has; marks do not count."""
    found = [word for text in texts for word in words(text) if word[0].isalnum()]
    return sum(word in lexicon for word in found) / len(found) if found else math.nan


def longest_copies(texts: Sequence[str], source: str) -> Integer[np.ndarray, "S"]:
    """For each text, the characters of its longest stretch that stands in the source.

    A stretch is known by 64 bits, so that two are taken for one about once in 10^9 calls with a
    source of a million characters. Its length is found by bisection, which works because a copy
    holds copies of all shorter lengths; texts that go the same way share the work.
    """
    sourced, hashed = _hashes(source), [_hashes(text) for text in texts]
    longest = np.zeros(len(texts), int)

    def search(which: list[int], low: int, high: int) -> None:
        if not which or low == high:
            longest[which] = low
            return
        middle = (low + high + 1) // 2
        there = np.sort(sourced(middle))
        copies = [i for i in which if _any_in(hashed[i](middle), there)]
        search(copies, middle, high)
        search([i for i in which if i not in copies], low, middle - 1)

    search(list(range(len(texts))), 0, min(len(source), max(map(len, texts), default=0)))
    return longest


_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


def _hashes(text: str) -> Callable[[int], np.ndarray]:
    """A function from a length to the 64-bit polynomial hashes of all stretches of that length."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(1)
    powers = lambda base: np.cumprod(np.r_[np.uint64(1), np.full(len(points), base, np.uint64)])
    sums = np.r_[np.uint64(0), np.cumsum(points * powers(_BASE)[1:])]
    shifts = powers(pow(_BASE, -1, 2**64))

    def of(length: int) -> np.ndarray:
        places = max(len(sums) - length, 0)
        return (sums[length:] - sums[:places]) * shifts[:places]

    return of


def _any_in(values: np.ndarray, ordered: np.ndarray) -> bool:
    where = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return bool((ordered[where] == values).any())

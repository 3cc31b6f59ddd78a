"""Each count against its plain, slow definition."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen.study import textmetrics as tm

TEXTS = st.lists(st.text("ab c.'\n", max_size=30), min_size=1, max_size=5)


def grams(text, n):
    found = tm.words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def test_words_and_marks_without_the_cut_ones_at_the_ends():
    assert tm.words("ng! Don't stop, KING 'tis\n2 na\u00efve wo") == [
        "!", "don't", "stop", ",", "king", "'", "tis", "2", "na\u00efve",
    ]  # fmt: skip
    assert tm.words("") == tm.words("one") == tm.words("one two") == []


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_distinct_and_repetition_by_their_definitions(texts, n):
    pooled = [gram for text in texts for gram in grams(text, n)]
    parts = [1 - len(set(grams(t, n))) / len(grams(t, n)) for t in texts if grams(t, n)]
    assert tm.distinct(texts, n) == pytest.approx(len(set(pooled)) / len(pooled) if pooled else math.nan, nan_ok=True)
    assert tm.repetition(texts, n) == pytest.approx(sum(parts) / len(parts) if parts else math.nan, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(TEXTS)
def test_zipf_is_the_likeliest_exponent(texts):
    counts = sorted(Counter(w for text in texts for w in tm.words(text)).values(), reverse=True)
    s = tm.zipf(texts)
    if len(counts) < 2:
        assert math.isnan(s)
        return
    whole = lambda s: sum(rank**-s for rank in range(1, len(counts) + 1))
    loss = lambda s: sum(c * (s * math.log(rank) + math.log(whole(s))) for rank, c in enumerate(counts, 1))
    assert all(loss(s) <= loss(t) + 1e-9 for t in (max(s - 0.01, 0), min(s + 0.01, 20)))


def test_zipf_finds_the_law_that_made_the_counts():
    counts = [round(20_000 * r**-1.3) for r in range(1, 200)]
    text = " ".join(f"w{i} " * c for i, c in enumerate(counts))
    assert tm.zipf([f"cut {text} cut"]) == pytest.approx(1.3, abs=0.01)
    assert tm.zipf(["cut a b c d cut"]) == pytest.approx(0, abs=1e-9)


def test_known_words_are_counted_without_marks():
    assert tm.known_words(["x A bird, a brd! x", "x bird x"], {"a", "bird"}) == pytest.approx(4 / 5)
    assert math.isnan(tm.known_words(["", ", ."], {"a"}))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab\U0001f600", max_size=12), max_size=5), st.text("ab\U0001f600", max_size=40))
def test_longest_copies_by_trying_all_stretches(texts, source):
    def slow(text):
        return max(j - i for i in range(len(text) + 1) for j in range(i, len(text) + 1) if text[i:j] in source)

    assert tm.longest_copies(texts, source).tolist() == [slow(text) for text in texts]


def test_longest_copies_in_a_long_source():
    random = np.random.default_rng(0)
    source = "".join(random.choice(list("abcd"), 200_000))
    texts = ["x" + source[i : i + n] + "x" for i, n in ((0, 300), (199_950, 50), (1_000, 77))]
    assert tm.longest_copies(texts, source).tolist() == [300, 50, 77]

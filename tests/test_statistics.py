"""Intervals that keep their word, and verdicts in words."""

import itertools
import math

import numpy as np
import pytest
from scipy.signal import lfilter

from textgen import statistics
from textgen.config import UserError


def nats_of_a_tie(random, seeds, tokens, *, text=0.15, seed=0.006, mixed=0.15, length=30):
    """Two arms of one true loss, [2, S, N]: the nats of characters under models of tiny Shakespeare's kind.

    Args:
      text: sd of what the arms predict differently, token by token; alike over `length` tokens.
      seed: sd of a seed's mean loss.
      mixed: sd of what a seed predicts differently, token by token, alike over `length` tokens.
    """

    def wave(shape, sd):
        keep = math.exp(-1 / length)
        noise = random.standard_normal(shape, dtype=np.float32) * np.float32(sd * math.sqrt(1 - keep**2))
        return lfilter([1], [1, -keep], noise, axis=-1)

    hard = random.exponential(1.5, tokens)
    return [
        hard + wave(tokens, text) + wave((seeds, tokens), mixed) + random.normal(0, seed, (seeds, 1)) for _ in range(2)
    ]


def coverage(seeds, trials, tokens, **noise):
    random = np.random.default_rng(7)
    differences = (statistics.difference(*nats_of_a_tie(random, seeds, tokens, **noise)) for _ in range(trials))
    return np.mean([d.low < 0 < d.high for d in differences])


def test_the_interval_of_a_tie_holds_zero_quickly():
    """Four standard errors of the count to either side of 95 %."""
    assert 0.90 < coverage(3, 300, 512 * 16) < 0.995


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "noise",
    [{}, {"text": 0.05, "seed": 0.01, "mixed": 0.05}, {"seed": 0.003}, {"mixed": 0.0}],
    ids=["both", "seeds rule", "text rules", "smooth seeds"],
)
def test_the_interval_of_a_tie_holds_zero_95_times_in_100(seeds, noise):
    """2,000 ties: the count itself is known to +-1 point. Printed with pytest -s."""
    share = coverage(seeds, 2000, 512 * 40, **noise)
    print(f"\n{seeds} seeds, {noise}: {share:.4f}")
    assert 0.93 <= share <= 0.97

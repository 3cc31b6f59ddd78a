"""Intervals that keep their word, and verdicts in words."""

import itertools
import math

import numpy as np
import pytest
from comparisons import wave
from scipy import stats

from textgen.comparison import statistics
from textgen.config import UserError


def nats_of_a_tie(random, seeds, tokens, *, text=0.15, seed=0.006, mixed=0.15):
    """Two arms of one true loss, [2, S, N]: the nats of characters under models of tiny Shakespeare's kind.

    Args:
      text: sd of what the arms predict differently, token by token; alike over 30 neighbours.
      seed: sd of a seed's mean loss.
      mixed: sd of what a seed predicts differently, token by token, alike over 30 neighbours.
    """
    hard = random.exponential(1.5, tokens)
    return [
        hard + wave(random, tokens, text) + wave(random, (seeds, tokens), mixed) + random.normal(0, seed, (seeds, 1))
        for _ in range(2)
    ]


def coverage(seeds, trials, tokens, **noise):
    random = np.random.default_rng(7)
    differences = (statistics.difference(*nats_of_a_tie(random, seeds, tokens, **noise)) for _ in range(trials))
    return np.mean([d.low < 0 < d.high for d in differences])


def test_the_interval_of_a_tie_holds_zero_quickly():
    """Four standard errors of the count to either side of 95 %."""
    assert 0.90 < coverage(3, 300, 512 * 16) < 0.995


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "seeds"),
    [
        ({}, 3),
        ({}, 5),
        ({"text": 0.05, "seed": 0.01, "mixed": 0.05}, 3),
        ({"seed": 0.003}, 5),
        ({"mixed": 0.0}, 3),
    ],
    ids=["both-3", "both-5", "seeds rule-3", "text rules-5", "smooth seeds-3"],
)
def test_the_interval_of_a_tie_holds_zero_95_times_in_100(seeds, noise):
    """1,000 ties: the share itself is known to +-1.4 points. Printed with pytest -s."""
    share = coverage(seeds, 1000, 512 * 40, **noise)
    print(f"\n{seeds} seeds, {noise}: {share:.4f}")
    assert 0.93 <= share <= 0.97


def test_many_blocks_and_no_seed_noise_give_the_textbook_error():
    """Independent tokens: the half width is 1.96 sd / sqrt(N), and the bootstrap agrees."""
    random = np.random.default_rng(0)
    nats = random.normal(1.5, 1.0, (2, 1, 512 * 400))
    d = statistics.difference(*nats)
    assert d.half_width == pytest.approx(1.966 * math.sqrt(2 / nats.shape[-1]), rel=0.06)
    low, high = statistics.text_interval(nats[0, 0])
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(nats.shape[-1]), rel=0.1)
    assert low < nats[0].mean() < high


def test_the_bootstrap_draws_the_same_blocks_for_everyone():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 50))
    np.testing.assert_allclose(statistics.bootstrap(a) - statistics.bootstrap(b), statistics.bootstrap(a - b))
    assert statistics.bootstrap(a).std() == pytest.approx(a.std() / math.sqrt(50), rel=0.05)
    before = statistics.bootstrap(a)
    statistics._resamplings.cache_clear()  # as in another process
    np.testing.assert_array_equal(statistics.bootstrap(a), before)


def test_the_parts_of_the_variance_are_found():
    """Averaged over many texts, each part is what was put in."""
    random, seeds, tokens, block = np.random.default_rng(1), 4, 512 * 30, 512
    found = []
    for _ in range(200):
        common, seed = random.normal(0, 0.5, tokens), random.normal(0, 0.01, (seeds, 1))
        a = common + seed + random.normal(0, 0.6, (seeds, tokens))
        d = statistics.difference(a, np.zeros((seeds, tokens)), block=block)
        found.append([d.text, d.a.spread, d.a.mixed])
    want = [0.25 / tokens, 0.01**2 + 0.36 / tokens, 0.36 / tokens]
    np.testing.assert_allclose(np.mean(found, 0), want, rtol=0.12)


def test_without_noise_in_the_text_it_is_welchs_interval():
    seeds_a, seeds_b = np.array([1.0, 1.2, 1.1]), np.array([1.5, 1.1, 1.9, 1.2])
    d = statistics.difference(*(np.repeat(seeds[:, None], 5000, 1) for seeds in (seeds_a, seeds_b)))
    want = stats.ttest_ind(seeds_a, seeds_b, equal_var=False).confidence_interval(0.95)
    assert (d.low, d.high) == pytest.approx((want.low, want.high), rel=1e-5)


def test_few_blocks_are_not_too_few_for_the_bootstrap():
    """The variance of a mean of 4 blocks is s^2 / 4, s^2 with 3 in the denominator."""
    random = np.random.default_rng(0)
    a = random.normal(size=(1, 4)).repeat(512, 1)
    d = statistics.difference(a, np.zeros((1, 2048)))
    assert d.text == pytest.approx(a[0, ::512].var(ddof=1) / 4, rel=0.1)


def test_what_all_tokens_of_both_arms_share_changes_nothing():
    random = np.random.default_rng(0)
    a, b = random.normal(1.0, 0.1, (2, 3, 5000))
    hard = random.exponential(3.0, 5000)
    alone, paired = statistics.difference(a, b), statistics.difference(a + hard, b + hard)
    assert paired.mean == pytest.approx(alone.mean, abs=1e-9)
    assert paired.half_width == pytest.approx(alone.half_width, rel=1e-6)


def test_swapping_the_arms_turns_the_sign():
    a, b = np.random.default_rng(0).normal(1.0, 0.1, (2, 3, 5000))
    one, other = statistics.difference(a, b), statistics.difference(b, a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_a_short_text_tells_little():
    a, b = np.random.default_rng(0).normal(1.0, 0.1, (2, 3, 40))
    short = statistics.difference(a, b)
    assert short.blocks == 2
    assert math.isfinite(short.half_width)
    with pytest.raises(UserError, match="two or more"):
        statistics.difference(a[:, :1], b[:, :1])


def test_seed_interval_is_students():
    """Three seeds: 4.303 standard errors; by hand."""
    assert statistics.seed_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(statistics.seed_interval([1.0]))


def test_best_of_k_is_the_mean_over_all_subsets():
    losses = [1.9, 1.5, 2.5, 1.6, 7.0, 1.5]
    want = [np.mean([min(c) for c in itertools.combinations(losses, k)]) for k in range(1, 7)]
    np.testing.assert_allclose(statistics.best_of_k(losses), want)


def test_rate_sensitivity_counts_a_diverged_trial_as_untrained():
    losses = {1e-3: [1.5, 1.7], 1e-2: [1.4, 1.4], 1e-1: [math.nan, 9.0]}
    assert statistics.rate_sensitivity(losses, initial=4.0) == pytest.approx((1.6 + 1.4 + 4.0) / 3 - 1.4)


def arms(gap, seed, *, seeds=3, tokens=512 * 100, text=0.1):
    """Two arms, the second worse by `gap`; each seed of an arm off by -seed, 0, seed, ..."""
    random = np.random.default_rng(3)
    hard = random.exponential(1.5, tokens)
    offset = np.linspace(-seed, seed, seeds)[:, None] if seeds > 1 else np.zeros((1, 1))
    a, b = (hard + random.normal(0, text, tokens) + offset for _ in range(2))
    return a, b + gap - (b.mean() - a.mean())


def say(gap, seed, smallest=0.0, **rest):
    return statistics.verdict(
        ("lstm", "transformer"), arms(gap, seed, **rest), unit="nats per character", smallest=smallest
    )


def test_a_clear_win():
    v = say(0.05, 0.002)
    assert v.outcome == "better"
    assert v.text.startswith("lstm is better than transformer by 0.0500 \u00b1 0.00")
    assert v.text.endswith("nats per character (95 % interval over the text and 3 seeds of each).")
    assert say(-0.05, 0.002).text.startswith("transformer is better than lstm by 0.0500")


def test_a_tie_says_how_many_more_seeds():
    v = say(0.01, 0.02)
    assert v.outcome == "unresolved"
    assert "Not resolved: the loss of lstm was lower than that of transformer by 0.010 \u00b1 0.0" in v.text
    more = int(v.text.split("about ")[1].split(" more seed")[0])
    # With as many more seeds of the same spread it is settled, and with one fewer it is not.
    settled = say(0.01, 0.02 * spread_of(3) / spread_of(3 + more), seeds=3 + more)
    assert settled.outcome == "better"
    assert say(0.01, 0.02 * spread_of(3) / spread_of(1 + more), seeds=1 + more).outcome == "unresolved"


def spread_of(seeds):
    return np.linspace(-1, 1, seeds).std(ddof=1)


def test_a_tie_that_the_text_limits_asks_for_text():
    v = say(0.001, 0.0, text=2.0)
    assert v.outcome == "unresolved"
    assert "The text is the limit, not the seeds" in v.text
    assert "seeds of each arm would settle" not in v.text


def test_a_difference_below_what_matters():
    v = say(0.001, 0.0005, smallest=0.01)
    assert v.outcome == "equal"
    assert v.text.startswith("No difference that matters")
    assert v.text.endswith("within the 0.01 fixed before the run.")
    assert say(0.05, 0.002, smallest=0.01).outcome == "better"


def test_a_tie_is_settled_by_what_matters():
    """A difference of 0 never leaves 0, but it can be shown to be too small to matter."""
    v = say(0.0, 0.01, smallest=0.01)
    assert "more seeds of each arm would settle it" in v.text


def test_one_seed_resolves_nothing():
    v = say(0.05, 0.0, seeds=1)
    assert v.outcome == "unresolved"
    assert "of lstm and of transformer one run finished" in v.text


def test_an_arm_without_a_run():
    v = statistics.verdict(("a", "b"), (None, np.ones((2, 9))))
    assert (v.outcome, v.text) == ("none", "No comparison: a has no finished run.")


def test_rounding_does_not_hide_on_which_side_of_zero_an_interval_ends():
    assert statistics.rounded(0.1421, 0.1389) == ("0.142", "0.139")
    assert statistics.rounded(0.14, 0.14) == ("0.14", "0.14")


def test_numbers_end_where_their_error_begins():
    assert statistics.rounded(0.031234, 0.00812) == ("0.0312", "0.0081")
    assert statistics.rounded(-1.2, 0.2) == ("-1.20", "0.20")
    assert statistics.rounded(1.23456, math.nan) == ("1.2346", "nan")

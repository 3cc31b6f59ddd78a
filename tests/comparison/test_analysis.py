"""Groups of predictions against plain loops; mixtures against their closed forms."""

import jax
import numpy as np
import pytest
from conftest import noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import models, trained_model
from textgen.codecs import text as text_codec
from textgen.comparison import analysis, dynamic


def every_token_once(groups, count):
    assert np.array_equal(np.sum(list(groups.values()), 0), np.ones(count))


def plain_repeated(tokens, window):
    """The longest n-gram that ends at each token and stands earlier in its window, by looking."""
    found = []
    for t in range(1, len(tokens)):
        start = (t - 1) // window * window
        text, place = list(tokens[start : t + 1]), t - start
        longest = 0
        for n in range(1, place + 1):
            gram = text[place - n + 1 :]
            if any(text[end - n + 1 : end + 1] == gram for end in range(n - 1, place)):
                longest = n
        found.append(longest)
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(1, 17))
def test_repeated_is_what_one_finds_by_looking(tokens, window):
    tokens = np.array(tokens, np.uint8)
    assert list(analysis.repeated(tokens, window)) == plain_repeated(tokens, window)
    every_token_once(analysis.by_repetition(tokens, window), len(tokens) - 1)


def test_positions():
    groups = analysis.by_position(23, 10)
    every_token_once(groups, 23)
    assert list(groups) == ["1", "2", "3\u20134", "5\u20138", "9\u201310"]
    assert list(np.flatnonzero(groups["3\u20134"])) == [2, 3, 12, 13, 22]


def test_frequencies():
    train = np.repeat([0, 1, 2, 3], [1, 9, 10, 250]).astype(np.uint8)
    groups = analysis.by_frequency(np.array([0, 1, 2, 3, 4, 3], np.uint8), train)
    every_token_once(groups, 6)
    assert {label: list(np.flatnonzero(here)) for label, here in groups.items()} == {
        "never": [4],
        "1+": [0, 1],
        "10+": [2],
        "100+": [3, 5],
    }


def test_a_mixture_is_the_mean_of_probabilities():
    nats = np.random.default_rng(0).exponential(2.0, (3, 50))
    weights = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(analysis.mixture(nats, weights), -np.log(weights @ np.exp(-nats)))
    np.testing.assert_allclose(analysis.ensemble(nats), -np.log(np.exp(-nats).mean(0)))
    assert analysis.ensemble(nats).mean() <= nats.mean()
    # Where all give next to nothing, the logarithm holds.
    np.testing.assert_allclose(analysis.ensemble(nats + 1000), analysis.ensemble(nats) + 1000)


def test_best_weights_beat_a_grid():
    nats = np.random.default_rng(0).exponential([[1.0], [1.3]], (2, 400))
    grid = [analysis.mixture(nats, np.array([w, 1 - w])).mean() for w in np.linspace(0, 1, 201)]
    found = analysis.best_weights(nats)
    assert analysis.mixture(nats, found).mean() == pytest.approx(min(grid), abs=1e-5)


def test_a_useless_model_gets_no_weight():
    good = np.random.default_rng(0).exponential(1.0, 400)
    _, weights = analysis.mixed(np.stack([good, good + 3.0]))
    np.testing.assert_allclose(weights, [1.0, 0.0], atol=1e-3)


def test_no_half_is_read_with_weights_of_its_own():
    """Model 0 is good in the first half and model 1 in the second: chosen elsewhere, the weights are wrong."""
    nats = np.ones((2, 100))
    nats[1, :50] = nats[0, 50:] = 5.0
    together, weights = analysis.mixed(nats)
    np.testing.assert_allclose(together, 5.0, atol=0.2)
    np.testing.assert_allclose(weights, 0.5, atol=1e-3)


def test_most_different():
    difference = np.zeros(100)
    difference[20:25], difference[60:65] = -1.0, 1.0
    assert analysis.most_different(difference, 5) == (20, 60)


@pytest.fixture(scope="module", params=["lstm", "transformer"])
def lm(request):
    config = tiny({"model.backbone": request.param})
    tokenizer = text_codec.fit(config.tokenizer, iter(["abcdefgh\n"]))
    model = models.build(config, tokenizer.vocab_size)
    return trained_model.TrainedModel(model, noisy_params(model), tokenizer, config, 0)


TOKENS = np.tile(np.arange(8, dtype=np.uint8), 20)[:150]


@pytest.mark.slow
def test_dynamic_evaluation_at_rate_0_is_the_static_loss(lm):
    static = lm.nats(TOKENS, stream=False)
    (still,) = dynamic.nats(lm, TOKENS, history=TOKENS, rates=[0.0])
    np.testing.assert_allclose(still, static, atol=2e-5)


def test_dynamic_evaluation_learns_and_only_from_the_past(lm):
    static = lm.nats(TOKENS, stream=False)
    (learned,) = dynamic.nats(lm, TOKENS, history=TOKENS, rates=[0.01])
    window = lm.config.eval_window
    np.testing.assert_allclose(learned[:window], static[:window], atol=2e-5)  # nothing was read yet
    assert learned[-2 * window :].mean() < static[-2 * window :].mean() - 0.1
    other = TOKENS.copy()
    other[5 * window + 1 :] = 0
    (changed,) = dynamic.nats(lm, other, history=TOKENS, rates=[0.01])
    np.testing.assert_allclose(changed[: 5 * window], learned[: 5 * window], atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), lm.params, noisy_params(lm.model)))


def test_dynamic_rates_are_chosen_on_the_other_half(lm, monkeypatch):
    tried = np.repeat([[1.0, 3.0], [2.0, 2.0]], 5, axis=1)  # the static model, and the one that learns
    monkeypatch.setattr(lm, "nats", lambda *_, **__: tried[0])
    monkeypatch.setattr(dynamic, "nats", lambda *_, **__: tried[1:])
    found, rates = dynamic.chosen(lm, TOKENS, history=TOKENS, rates=(0.1,))
    assert rates == [0.1, 0.0]
    np.testing.assert_array_equal(found, np.repeat([2.0, 3.0], 5))

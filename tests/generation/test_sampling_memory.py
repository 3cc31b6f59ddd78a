"""Transformations with a memory, each against its definition on the text as a list."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen.config import UserError
from textgen.generation import transforms

V, T, N, ROOM = 5, 6, 12, 24


@jax.jit
def _follow(chain, prompts, lengths, drawn, logits, uniforms):
    def body(both, inputs):
        states, made = both
        token, z, uniform = inputs
        z, commit = chain.step(z, states, transforms.Moment(made, uniform))
        return (commit(token), made + 1), z

    states = chain.init(prompts, lengths, V, ROOM)
    inputs = (drawn.T, jnp.swapaxes(logits, 0, 1), uniforms.T)
    return jnp.swapaxes(jax.lax.scan(body, (states, jnp.zeros(len(lengths), jnp.int32)), inputs)[1], 0, 1)


def case(seed, rows=3, vocab=V):
    random = np.random.default_rng(seed)
    return (
        random.integers(0, vocab, (rows, T)).astype(np.int32),
        random.integers(0, T + 1, rows).astype(np.int32),
        random.integers(0, vocab, (rows, N)).astype(np.int32),
        2 * random.standard_normal((rows, N, V)).astype(np.float32),
        random.uniform(size=(rows, N)).astype(np.float32),
    )


def log_softmax(z):
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def by_definition(definition, prompts, lengths, drawn, logits, uniforms):
    """definition(z, prompt, drawn so far, uniform) -> z, for every row and step."""
    wanted = np.empty_like(logits)
    for b, n in enumerate(lengths):
        for i in range(N):
            wanted[b, i] = definition(
                logits[b, i].copy(), prompts[b, :n].tolist(), drawn[b, :i].tolist(), uniforms[b, i]
            )
    return wanted


def assert_follows(chain, definition, seed, **options):
    inputs = case(seed, **options)
    got = np.asarray(_follow(chain, *inputs))
    np.testing.assert_allclose(got, by_definition(definition, *inputs), rtol=2e-5, atol=2e-5)


NOW = transforms.Moment(jnp.zeros(1), jnp.zeros(1))
SEEDS = st.integers(0, 9999)
quick = settings(max_examples=25, deadline=None)


@quick
@given(SEEDS, st.floats(0.5, 3.0))
def test_repetition_penalty(seed, theta):
    def definition(z, prompt, drawn, _):
        for t in set(prompt + drawn):
            z[t] = z[t] / theta if z[t] > 0 else z[t] * theta
        return z

    assert_follows(transforms.chain(transforms.repetition_penalty(theta)), definition, seed)


@quick
@given(SEEDS, st.floats(-1, 2), st.floats(-1, 2))
def test_presence_and_frequency_penalties_count_what_was_drawn(seed, a, b):
    def definition(z, _, drawn, __):
        counts = np.bincount(drawn, minlength=V)
        return z - a * (counts > 0) - b * counts

    chain = transforms.chain(transforms.presence_penalty(a), transforms.frequency_penalty(b))
    assert_follows(chain, definition, seed)


@quick
@given(SEEDS, st.integers(1, 4))
def test_no_repeat_ngram(seed, n):
    def definition(z, prompt, drawn, _):
        text = prompt + drawn
        seen = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        banned = [t for t in range(V) if (*text[len(text) - n + 1 :], t) in seen and len(text) >= n - 1]
        if len(banned) < V:
            z[banned] = -np.inf
        return z

    assert_follows(transforms.chain(transforms.no_repeat_ngram(n)), definition, seed)


def _dry_by_hand(z, text, multiplier, base, allowed, breakers):
    penalty = np.zeros(V)
    for i, token in enumerate(text):  # text[i] followed a match of the n tokens before it with the end
        n = 0
        while n < i and text[i - 1 - n] == text[-1 - n] and text[i - 1 - n] not in breakers:
            n += 1
        if n >= allowed:
            penalty[token] = max(penalty[token], multiplier * base ** (n - allowed))
    return z - penalty


@quick
@given(SEEDS, st.integers(1, 3), st.sampled_from([None, [0], [1, 2]]))
def test_dry(seed, allowed, breakers):
    definition = lambda z, prompt, drawn, _: _dry_by_hand(z, prompt + drawn, 0.8, 1.75, allowed, breakers or [])
    assert_follows(transforms.chain(transforms.dry(allowed=allowed, breakers=breakers)), definition, seed, vocab=3)


def test_dry_of_a_match_of_four_is_2_45():
    text = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]], np.int32)
    chain = transforms.chain(transforms.dry())
    z, _ = chain.step(jnp.zeros((1, 5)), chain.init(text, np.array([9], np.int32), 5, 12), NOW)
    np.testing.assert_allclose(z, [[0, 0, 0, 0, -2.45]], rtol=1e-6)  # 0.8 * 1.75^2 on the 4 that would come


@quick
@given(SEEDS, st.floats(0.05, 0.6), st.floats(0, 1))
def test_xtc(seed, threshold, probability):
    def definition(z, _, __, uniform):
        p = np.exp(log_softmax(z))
        top = np.flatnonzero(p >= threshold)
        if uniform < probability and len(top) > 1:
            z[np.setdiff1d(top, top[np.argmin(p[top])])] = -np.inf
        return z

    assert_follows(transforms.chain(transforms.xtc(threshold, probability)), definition, seed)


def test_xtc_mixes_the_two_distributions():
    z = np.random.default_rng(0).standard_normal((1, V)).astype(np.float32)
    grid = (np.arange(200) + 0.5) / 200
    chain = transforms.chain(transforms.xtc(0.1, 0.3))
    moment = transforms.Moment(jnp.zeros(200), jnp.asarray(grid, jnp.float32))
    out, _ = chain.step(jnp.tile(z, (200, 1)), ((),), moment)
    p = np.exp(log_softmax(z[0]))
    top = p >= 0.1
    cut = np.where(top & (p != p[top].min()), 0, p)
    mean = np.asarray(jax.nn.softmax(out)).mean(0)
    np.testing.assert_allclose(mean, 0.3 * cut / cut.sum() + 0.7 * p, atol=1e-5)


@quick
@given(SEEDS, st.floats(0.5, 3.0), st.floats(0.05, 0.5))
def test_mirostat(seed, tau, rate):
    def definition(z, _, __, ___):
        return z

    prompts, lengths, drawn, logits, uniforms = case(seed)
    got = np.asarray(
        _follow(transforms.chain(transforms.mirostat(tau, rate)), prompts, lengths, drawn, logits, uniforms)
    )
    for b in range(len(lengths)):
        bound = 2 * tau
        for i in range(N):
            bits = -log_softmax(logits[b, i]) / np.log(2)
            kept = (bits <= bound) | (bits == bits.min())
            if np.abs(bits - bound).min() > 1e-4:  # where float32 can tell
                np.testing.assert_array_equal(np.isfinite(got[b, i]), kept)
            bound -= rate * (bits[drawn[b, i]] - tau)


def test_mirostat_reaches_its_surprise_on_a_stream():
    z = jnp.asarray(np.random.default_rng(1).standard_normal((1, 40)) * 1.5, jnp.float32)
    chain = transforms.chain(transforms.mirostat(3.5, 0.05))

    def body(states, uniform):
        drawn, commit = chain.step(z, states, NOW)
        token = transforms.draw(drawn, uniform[None])
        return commit(token), -jax.nn.log_softmax(z)[0, token[0]] / jnp.log(2)

    uniforms = jnp.asarray(np.random.default_rng(2).uniform(size=6000), jnp.float32)
    bits = jax.jit(lambda: jax.lax.scan(body, chain.init(jnp.zeros((1, 1)), jnp.zeros(1), 40, 1), uniforms)[1])()
    np.testing.assert_allclose(np.mean(bits), 3.5, atol=0.02)


@quick
@given(SEEDS, st.floats(0, 2), st.floats(0, 2), st.integers(1, 20))
def test_temperature_schedule_is_the_temperature_of_each_position(seed, start, end, steps):
    inputs = case(seed)
    got = np.asarray(_follow(transforms.chain(transforms.temperature_schedule(start, end, steps)), *inputs))
    for i in (0, 5, N - 1):
        way = min(i / steps, 1)
        wanted = transforms.temperature((1 - way) * start + way * end)
        # At the least temperatures of float32 rounding decides which are greedy; the probabilities are the same.
        expected = transforms.chain(wanted)(jnp.asarray(inputs[3][:, i]))
        np.testing.assert_allclose(*(scipy.special.softmax(z, -1) for z in (got[:, i], expected)), rtol=1e-3, atol=1e-7)


def test_a_schedule_can_end_greedy():
    inputs = case(0)
    got = np.asarray(_follow(transforms.chain(transforms.temperature_schedule(1.3, 0, 4)), *inputs))
    assert (np.isfinite(got[:, 4:]).sum(-1) == 1).all()
    assert (np.argmax(got, -1) == np.argmax(inputs[3], -1)).all()


def test_biases_and_bans():
    z = np.random.default_rng(3).standard_normal((2, V)).astype(np.float32)
    run = lambda *t: np.asarray(transforms.chain(*t)(jnp.asarray(z)))
    np.testing.assert_allclose(
        run(transforms.logit_bias([1, 3], [2.5, -1])), z + np.array([0, 2.5, 0, -1, 0]), rtol=1e-6
    )
    np.testing.assert_array_equal(np.isfinite(run(transforms.banned(0, 4)))[0], [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(np.isfinite(run(transforms.allowed([0, 4])))[0], [1, 0, 0, 0, 1])
    # What would leave nothing is not applied.
    np.testing.assert_array_equal(run(transforms.allowed(2), transforms.banned(2)), run(transforms.allowed(2)))


def test_nothing_repeats_where_something_new_is_possible():
    chain = transforms.chain(transforms.no_repeat_ngram(2))

    def body(states, uniform):
        z, commit = chain.step(jnp.zeros((1, V)), states, NOW)
        token = transforms.draw(z, uniform[None])
        return commit(token), token[0]

    start = chain.init(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), V, 64)
    text = [0, *jax.lax.scan(body, start, jnp.asarray(np.random.default_rng(4).uniform(size=12), jnp.float32))[1]]
    pairs = [(int(a), int(b)) for a, b in itertools.pairwise(text)]
    assert len(set(pairs)) == len(pairs)


def test_rows_may_have_settings_of_their_own():
    inputs = case(7, rows=2)
    make = lambda theta, a, n: transforms.chain(
        transforms.repetition_penalty(theta), transforms.presence_penalty(a), transforms.no_repeat_ngram(n)
    )
    together = make([1.0, 2.0], [0.0, 1.0], [3, 2])
    got = np.asarray(_follow(together, *inputs))
    for i, chain in enumerate((make(1.0, 0.0, 3), make(2.0, 1.0, 2))):
        np.testing.assert_allclose(got[i], np.asarray(_follow(chain, *inputs))[i], rtol=1e-6)
        assert str(together.row(i)) == str(chain)


def test_chains_read_back_what_they_write():
    text = (
        "repetition_penalty(1.2), presence_penalty(0.5), frequency_penalty(-0.1), no_repeat_ngram(3), "
        "dry(0.8, 1.75, 2, [1, 2]), xtc(0.1, 0.5), mirostat(5, 0.1), temperature_schedule(1.2, 0.33333334, 100), "
        "banned([1]), allowed([1, 2, 3]), temperature(0.8)"
    )
    assert str(transforms.parse(text)) == text
    encode = lambda s: [ord(c) - ord("a") for c in s]
    chain = transforms.parse("banned('b', 'd'), logit_bias(['c', 0], [2, -1]), dry(breakers=['a'])", encode)
    np.testing.assert_array_equal(chain.transforms[0].numbers[0], [[1, 3]])
    assert str(transforms.parse(str(chain))) == str(chain)


def test_any_parameter_annotated_as_tokens_takes_texts(monkeypatch):
    def vowels(bonus: float, *letters: transforms.Tokens) -> transforms.Transform:
        return transforms.logit_bias(list(letters), [bonus] * len(letters))

    monkeypatch.setitem(transforms.TRANSFORMS, "vowels", vowels)
    chain = transforms.parse("vowels(2, 'a', 'e')", lambda s: [ord(c) - ord("a") for c in s])
    assert str(chain) == "logit_bias([0, 4], [2, 2])"


def test_the_largest_settings_leave_something_to_draw():
    inputs = case(8, rows=1)
    chain = transforms.parse(
        "repetition_penalty(1e9), frequency_penalty(1e9), presence_penalty(-1e9), dry(1e9, 1e9, 1), logit_bias(0, -1e9)"
    )
    got = np.asarray(_follow(chain, *inputs))
    assert np.isfinite(got).any(-1).all()
    assert not np.isnan(got).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repetition_penalty(0)", r"repetition_penalty must lie in \[1e-9, 1e9\], got 0"),
        ("frequency_penalty(1e38)", "frequency_penalty must be 1e9 or less in size"),
        ("no_repeat_ngram(1.5)", "no_repeat_ngram must be a whole number"),
        ("dry(-1)", "dry must have a multiplier of 0 or more"),
        ("xtc(2)", r"xtc must have a threshold and a probability in \[0, 1\], got 2"),
        ("mirostat(0)", "mirostat must have a surprise and a rate above 0"),
        ("temperature_schedule(1, -1, 5)", "temperature_schedule must have temperatures of 0 or more"),
        ("banned()", r"banned takes token ids, or texts of one token each, got \[\]"),
        ("banned(1.5)", "banned takes token ids"),
        ("allowed('ab')", "'ab' makes 2 tokens: name tokens one by one"),
        ("logit_bias(3)", "has other arguments than logit_bias takes"),
        ("logit_bias([1, 2], 3)", "as many biases as tokens"),
        ("logit_bias('a', 'b')", "logit_bias must be 1e9 or less in size, got 'b'"),
        ("mirostatt(3)", "Unknown sampler 'mirostatt'. Did you mean 'mirostat'"),
        ("temperature('hot')", "temperature"),
    ],
)
def test_what_is_wrong_with_a_chain_is_said(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text, lambda s: list(range(len(s))))


def test_what_a_vocabulary_cannot_do_is_said():
    with pytest.raises(UserError, match="banned names token 9, and the vocabulary has 5 tokens"):
        transforms.check_vocabulary(transforms.parse("banned(9)"), V)
    with pytest.raises(UserError, match="bans every token of the vocabulary"):
        transforms.check_vocabulary(transforms.parse("allowed(1, 2), banned(1), banned(2)"), V)
    transforms.check_vocabulary(transforms.parse("allowed(1, 2), banned(1)"), V)

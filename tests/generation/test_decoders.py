"""Decoders against the enumeration of all texts of a small Markov chain, where no neural net hides anything."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SOME_BACKBONES, noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import models
from textgen.config import UserError
from textgen.generation import scan, search, search_loop, transforms

V = 3  # tokens of the chain
N = 4  # tokens of a text
PLAIN = transforms.chain()


def table(seed=0, spread=1.5):
    """Logits of the next token after each pair of tokens [V, V, V]."""
    return np.asarray(spread * np.random.default_rng(seed).standard_normal((V, V, V)), np.float32)


def step(params, tokens, carry, lengths):
    """A Markov chain of the second order; its carry is the last token."""
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    both = jnp.concatenate([carry[:, None], tokens], 1)
    at = lambda i: jnp.take_along_axis(both, jnp.maximum(i, 0)[:, None], 1)[:, 0]
    return params[at(lengths - 1), at(lengths)], at(lengths)


def first(batch_size, max_length):
    return jnp.zeros(batch_size, jnp.int32)


DECODE = search_loop.Decoding(step, first)
SAMPLE = scan.Generator(step, first)
PROMPT = np.array([1, 2], np.int32)


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def decode(decoder, params, *, chain=PLAIN, prompts=(PROMPT,), seeds=(0,), length=N, end=None):
    return DECODE(params, list(prompts), keys(*seeds), chain, decoder, length=length, end=end)


transformed = jax.jit(lambda chain, logits: chain(logits))


def log_table(params, chain=PLAIN):
    """ln p of each token after each pair of tokens; float64."""
    logits = np.asarray(transformed(chain, jnp.asarray(params.reshape(-1, V))), np.float64).reshape(V, V, V)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_probabilities(table, text, prompt=PROMPT):
    """ln p of each token of a text, by looking it up."""
    whole = [0, *prompt, *text]
    return np.array([table[whole[i - 2], whole[i - 1], whole[i]] for i in range(len(prompt) + 1, len(whole))])


def all_texts(params, chain=PLAIN, end=None, length=N):
    """{text: ln p}: those that end, and those that reach the length; impossible ones left out."""
    texts, table = {}, log_table(params, chain)
    for text in itertools.product(range(V), repeat=length):
        if end in text:
            text = text[: text.index(end) + 1]
        texts[text] = log_probabilities(table, text).sum()
    return {text: p for text, p in texts.items() if p > -np.inf}


def shown(made):
    return [tuple(t[:n].tolist()) for t, n in zip(made.seen.tokens, made.lengths, strict=True)]


CHAINS = [PLAIN, transforms.chain(transforms.temperature(0.7), transforms.top_p(0.9))]
everywhere = pytest.mark.parametrize(("chain", "end"), [(PLAIN, None), (CHAINS[1], 2)], ids=["plain", "end"])
ends = pytest.mark.parametrize("end", [None, 2])


@everywhere
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_wide_enough_is_brute_force(chain, end, alpha):
    for seed in range(3):
        params = table(seed)
        made = decode(search.beam(V ** (N - 1), alpha), params, chain=chain, end=end)
        scores = {t: p / ((5 + len(t)) / 6) ** alpha for t, p in all_texts(params, chain, end).items()}
        best = sorted(scores.values(), reverse=True)[: V ** (N - 1)]
        texts = shown(made)[: len(best)]
        assert len(set(texts)) == len(best)
        np.testing.assert_allclose(made.score[: len(best)], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([scores[t] for t in texts], best, rtol=1e-4, atol=1e-5)
        assert np.isneginf(made.score[len(best) :]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_a_beam_of_one_is_greedy(seed, length):
    params = table(seed)
    greedy = SAMPLE(params, [PROMPT], keys(0), transforms.chain(transforms.greedy()), length=length)
    made = decode(search.beam(1), params, length=length)
    np.testing.assert_array_equal(made.seen.tokens, greedy.tokens)
    np.testing.assert_array_equal(made.seen.log_probability, greedy.log_probability)


def beam_by_hand(params, width, length, end, alpha):
    """Beam search over lists."""
    alive, finished, table = [((), 0.0)], [], log_table(params)
    for _ in range(length):
        grown = [((*t, v), log_probabilities(table, (*t, v)).sum()) for t, _ in alive for v in range(V)]
        finished += [(t, p) for t, p in grown if t[-1] == end]
        alive = sorted((c for c in grown if c[0][-1] != end), key=lambda c: -c[1])[:width]
    return sorted(((p / ((5 + len(t)) / 6) ** alpha, t) for t, p in finished + alive), reverse=True)[:width]


@pytest.mark.parametrize("width", [2, 3])
@ends
@pytest.mark.slow
def test_a_narrow_beam_is_the_textbooks(width, end):
    for seed in range(10):
        params, length = table(seed, 0.7), 7
        wanted = beam_by_hand(params, width, length, end, 0.6)
        made = decode(search.beam(width, alpha=0.6), params, length=length, end=end)
        assert shown(made) == [text for _, text in wanted]
        np.testing.assert_allclose(made.score, [score for score, _ in wanted], rtol=1e-4)


ALL = [search.beam(3, 0.6), search.stochastic_beam(3), search.arithmetic(3), search.best_of(3)]
each = pytest.mark.parametrize("decoder", ALL, ids=str)


@each
@everywhere
@pytest.mark.slow
def test_what_it_tells_of_each_token_is_what_the_chain_of_tokens_says(decoder, chain, end):
    params = table(4)
    made = decode(decoder, params, chain=chain, end=end, length=6)
    assert len(shown(made)) == decoder.results
    for i, text in enumerate(shown(made)):
        n = len(text)
        np.testing.assert_allclose(
            made.seen.log_probability[i, :n], log_probabilities(log_table(params), text), atol=1e-5
        )
        np.testing.assert_allclose(
            made.seen.log_probability_drawn[i, :n], log_probabilities(log_table(params, chain), text), atol=1e-5
        )
        assert not made.seen.log_probability[i, n:].any()
        assert not made.seen.entropy[i, n:].any()
        assert n == 6 or text[-1] == end
        assert end not in text[:-1]


@each
@pytest.mark.slow
def test_a_text_has_its_own_memory_of_what_it_said(decoder):
    """Each step of a text, taken alone by a chain with a memory, gives the probabilities that the decoder tells."""
    params = table(7)
    chain = transforms.chain(transforms.presence_penalty(1.0), transforms.no_repeat_ngram(3), transforms.xtc(0.1, 0.5))
    made = decode(decoder, params, chain=chain, length=6)
    advance = jax.jit(lambda *now: jax.nn.log_softmax(chain.step(*now)[0])[0])
    commit = jax.jit(lambda *now, token: chain.step(*now)[1](jnp.full(1, token)))
    for i, text in enumerate(shown(made)):
        if np.isneginf(made.score[i]):
            continue
        states, whole = chain.init(PROMPT[None], np.array([2]), V, 32), [*PROMPT.tolist(), *text]
        for n, token in enumerate(text):
            logits = jnp.asarray(params[whole[n], whole[n + 1]][None])
            chances = [
                transforms.Moment(jnp.full(1, n), jnp.full(1, u)) for u in (1.0, 0.0)
            ]  # without xtc, and with it
            drawn = [advance(logits, states, c)[token] for c in chances]
            assert np.abs(made.seen.log_probability_drawn[i, n] - np.array(drawn)).min() < 1e-5
            states = commit(logits, states, chances[0], token=token)


@pytest.mark.parametrize(
    "decoder", [ALL[0], *(pytest.param(decoder, marks=pytest.mark.slow) for decoder in ALL[1:])], ids=str
)
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(decoder):
    params, prompts = table(1), [PROMPT, np.array([0], np.int32), np.array([2, 2, 1, 0, 1], np.int32)]
    run = lambda rows: decode(
        decoder, params, chain=CHAINS[1], prompts=[prompts[i] for i in rows], seeds=rows, length=9, end=2
    )
    together = jax.tree.map(lambda leaf: leaf.reshape(3, decoder.results, *leaf.shape[1:]), run([0, 1, 2]))
    for rows in ([1], [2, 1, 0]):
        some = jax.tree.map(lambda leaf: leaf.reshape(-1, decoder.results, *leaf.shape[1:]), run(rows))
        wanted = jax.tree.map(lambda leaf, rows=rows: leaf[np.array(rows)], together)
        jax.tree.map(np.testing.assert_array_equal, some, wanted)


def sets_without_replacement(p, k):
    """{set: probability} of drawing k different items one after another, and each item's chance to be in it."""
    inclusion = dict.fromkeys(p, 0.0)
    for order in itertools.permutations(p, k):
        chance, left = 1.0, 1.0
        for item in order:
            chance *= p[item] / left
            left -= p[item]
        for item in order:
            inclusion[item] += chance
    return inclusion


@pytest.mark.parametrize("end", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_stochastic_beam_draws_without_replacement(end):
    params, n, length, k = table(2, 1.0), 20_000, 2, 2
    p = {t: np.exp(v) for t, v in all_texts(params, end=end, length=length).items()}
    made = decode(search.stochastic_beam(k), params, prompts=[PROMPT] * n, seeds=range(n), length=length, end=end)
    texts = shown(made)
    assert all(a != b for a, b in zip(texts[::2], texts[1::2], strict=True))
    assert (made.score[::2] >= made.score[1::2]).all()
    inclusion = sets_without_replacement(p, k)
    weight = np.exp(made.log_weight.astype(np.float64))
    for text, chance in inclusion.items():
        hit = np.array([t == text for t in texts])
        # Five standard deviations; the seeds are fixed.
        assert abs(hit.sum() - n * chance) <= 5 * np.sqrt(n * chance * (1 - chance)) + 1
        firsts = hit[::2].sum()
        assert abs(firsts - n * p[text]) <= 5 * np.sqrt(n * p[text] * (1 - p[text])) + 1
        # The weights make an unbiased estimate of every text's probability.
        estimates = (hit * weight).reshape(n, k).sum(1)
        assert abs(estimates.mean() - p[text]) <= 5 * estimates.std() / np.sqrt(n)


def test_a_stochastic_beam_as_wide_as_there_are_texts_finds_them_all_and_weighs_them_right():
    params = table(3)
    p = {t: np.exp(v) for t, v in all_texts(params).items()}
    made = decode(search.stochastic_beam(V**N + 1), params)
    assert set(shown(made)[:-1]) == set(p)
    np.testing.assert_allclose(np.exp(made.log_weight), [*(p[t] for t in shown(made)[:-1]), 0], rtol=1e-4)


def test_gumbels_given_their_maximum_are_right_far_from_zero_too():
    noisy = np.array([[0.0, -2.0, -40.0, -np.inf]], np.float64)
    for maximum in (3.0, -1.0, -300.0):
        out = np.asarray(search.conditioned(jnp.asarray(noisy + maximum, jnp.float32), jnp.full((1, 1), maximum)))
        assert out.max() == pytest.approx(maximum)
        assert (np.diff(out[0, :3]) < 0).all()
        assert np.isneginf(out[0, 3])
    wanted = -np.log(np.exp(-1.0) - np.exp(-0.0) + np.exp(-noisy[0, :3].clip(-30)))
    out = search.conditioned(jnp.asarray(noisy, jnp.float32), jnp.full((1, 1), 1.0))
    np.testing.assert_allclose(np.asarray(out)[0, :2], wanted[:2], rtol=1e-5)


@everywhere
@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.slow
def test_arithmetic_samples_come_as_often_as_they_should(chain, end, n):
    for seed in range(3):
        params = table(seed)
        made = decode(search.arithmetic(n), params, chain=chain, end=end, seeds=(seed,))
        texts = all_texts(params, chain, end)
        counts = dict.fromkeys(texts, 0)
        for text in shown(made):
            counts[text] += 1
        for text, p in texts.items():
            assert abs(counts[text] - n * np.exp(p)) < 1
    np.testing.assert_allclose(np.exp(made.log_weight), 1 / n, rtol=1e-6)


SYMBOLS = np.array([0.5, 0.25, 0.0, 0.25], np.float32)


def symbols_of(codes, steps):
    """[steps, n] tokens that codes [n] stand for, each drawn from SYMBOLS."""

    def body(codes, key):
        log_q = jnp.broadcast_to(jnp.log(SYMBOLS), (len(codes), 4))
        token, codes = search.decode_symbol(log_q, codes, jax.random.uniform(key, codes.shape))
        return codes, (token, codes)

    tokens, codes = jax.lax.scan(body, codes, jax.random.split(jax.random.key(1), steps))[1]
    assert ((codes >= 0) & (codes < 1)).all()
    return np.asarray(tokens)


def test_a_grid_of_codes_gives_every_text_exactly_its_share():
    n = 4096
    tokens = symbols_of(jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32), 5)
    texts, counts = np.unique(tokens.T, axis=0, return_counts=True)
    np.testing.assert_array_equal(counts, n * SYMBOLS[texts].prod(1))


def test_a_code_never_runs_out():
    n, steps = 4096, 60  # 90 bits a text, where a float has 24
    tokens = symbols_of(jax.random.uniform(jax.random.key(0), (n,)), steps)
    bound = lambda p: 5 * np.sqrt(n * p * (1 - p))
    for row in tokens:
        assert (np.abs(np.bincount(row, minlength=4) - n * SYMBOLS) <= bound(SYMBOLS)).all()
    # A late token says nothing about an early one, nor about the one before.
    pairs = np.outer(SYMBOLS, SYMBOLS)
    for a, b in ((2, 59), (30, 31), (20, 45)):
        counts = np.histogram2d(tokens[a], tokens[b], bins=(range(5), range(5)))[0]
        assert (np.abs(counts - n * pairs) <= bound(pairs)).all()


def test_the_best_of_n_is_the_best_of_the_samples_that_sampling_makes():
    params, n = table(5), 7
    chain = transforms.chain(transforms.temperature(0.7), transforms.xtc(0.1, 0.5))
    samples = SAMPLE(params, [PROMPT], scan.row_keys(11, n), chain, length=9, num_samples=n)
    best = np.argmax(samples.log_probability.mean(1))
    made = decode(search.best_of(n), params, chain=chain, seeds=(11,), length=9)
    np.testing.assert_array_equal(made.seen.tokens[0], samples.tokens[best])
    assert made.score[0] == pytest.approx(samples.log_probability.mean(1)[best], rel=1e-5)
    judged = decode(
        search.best_of(n, judge=lambda tokens, lengths: tokens @ 3 ** np.arange(9)),
        params,
        chain=chain,
        seeds=(11,),
        length=9,
    )
    scores = samples.tokens @ 3 ** np.arange(9)
    np.testing.assert_array_equal(judged.seen.tokens[0], samples.tokens[np.argmax(scores)])
    assert judged.score[0] == scores.max()


def test_the_best_of_n_has_the_law_of_a_maximum():
    params, n, draws, length = table(6, 1.0), 3, 20_000, 2
    p = {t: np.exp(v) for t, v in all_texts(params, length=length).items()}
    made = decode(search.best_of(n), params, prompts=[PROMPT] * draws, seeds=range(draws), length=length)
    texts = shown(made)
    below = 1.0  # the chance of a text no better, F from the best down
    for text in sorted(p, key=p.get, reverse=True):
        chance = below**n - max(below - p[text], 0) ** n
        below -= p[text]
        count = sum(t == text for t in texts)
        assert abs(count - draws * chance) <= 5 * np.sqrt(draws * chance * (1 - chance)) + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_BACKBONES)
def test_every_backbone_follows_many_texts(name):
    model = models.build(tiny({"model.backbone": name, "model.layers": 2}), 7)
    params = noisy_params(model)
    next_token = lambda p, *a: model.apply({"params": p}, *a, method="next_token")
    prompts = [np.array(p, np.int32) for p in ([3], [5, 1, 6, 2])]
    run = search_loop.Decoding(next_token, model.init_carry, model.max_positions)
    made = run(params, prompts, keys(0, 1), CHAINS[1], search.stochastic_beam(3), length=16)
    texts = np.zeros((6, 20), np.int32)  # after the prompt, the new tokens; then nothing that matters
    for row, prompt, tokens in zip(texts, [p for p in prompts for _ in range(3)], made.seen.tokens, strict=True):
        row[: len(prompt) + 16] = [*prompt, *tokens]
    log_p = jax.nn.log_softmax(jax.jit(lambda p, x: model.apply({"params": p}, x)[0])(params, texts))
    for i, n in enumerate([1] * 3 + [4] * 3):
        wanted = np.asarray(log_p)[i, n - 1 + np.arange(16), made.seen.tokens[i]]
        np.testing.assert_allclose(made.seen.log_probability[i], wanted, atol=1e-4)
    assert len(set(shown(made)[:3])) == len(set(shown(made)[3:])) == 3


def test_no_prompt_length_seed_or_number_compiles_again():
    run = lambda alpha, lengths, length, t: DECODE(
        table(),
        [np.ones(n, np.int32) for n in lengths],
        keys(*range(len(lengths))),
        transforms.chain(transforms.temperature(t)),
        search.beam(2, alpha),
        length=length,
    )
    run(0.5, (3, 9), 20, 1.0)
    compiled = DECODE._run._cache_size()
    run(0.7, (16, 1), 31, 0.0)
    assert DECODE._run._cache_size() == compiled


def test_decoders_are_written_as_they_are_read():
    for decoder in ALL:
        again = search.parse(str(decoder))
        assert again == decoder
        assert str(again) == str(decoder)
    assert str(search.parse("beam(8, alpha=0.6)")) == "beam(8, 0.6)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("baem(8)", "Unknown decoder 'baem'. Did you mean 'beam'"),
        ("beam", "is written like 'beam"),
        ("beam(", "is written like 'beam"),
        ("beam(2), beam(3)", "Give one decoder"),
        ("", "Give one decoder"),
        ("beam(0)", "beam takes a whole number of texts, 1 or more, got 0"),
        ("beam(2, alpha=-1.0)", "alpha must be 0 or more, got -1"),
        ("beam(2, beta=1)", "has other arguments than beam takes"),
        ("arithmetic(x)", "has other arguments than arithmetic takes"),
    ],
)
def test_bad_decoders_are_refused(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        search.parse(text)


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [([], 3, "at least one prompt"), ([np.zeros(0, np.int32)], 3, "A prompt is empty"), ([PROMPT], 0, "got 0")],
)
def test_bad_requests_are_refused(prompts, length, message):
    with pytest.raises(UserError, match=message):
        decode(ALL[0], table(), prompts=prompts, length=length)
    with pytest.raises(UserError, match="take 6 tokens of 4 positions"):
        search_loop.Decoding(step, first, max_positions=4)(table(), [PROMPT], keys(0), PLAIN, ALL[0], length=4)

"""Generation: independent of the batch, exact beyond the window, compiled once."""

import functools
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
from textgen.generation import scan, transforms

V = 7


@functools.cache
def build(name, **overrides):
    model = models.build(tiny({"model.backbone": name, "model.layers": 2} | overrides), V)
    params = noisy_params(model)
    full = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens)[0])
    step = lambda p, tokens, carry, lengths: model.apply({"params": p}, tokens, carry, lengths, method="next_token")
    return full, params, scan.Generator(step, model.init_carry, model.max_positions)


@pytest.fixture(params=SOME_BACKBONES, scope="module")
def built(request):
    return build(request.param)


@pytest.fixture
def one():
    """Where the chain and the draws are the subject, the model is not."""
    return build("lstm")


def prompts_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, n).astype(np.int32) for n in lengths]


CHAIN = transforms.chain(transforms.temperature(0.9), transforms.top_p(0.95))


def test_greedy_generation_is_the_argmax_of_the_full_pass(built):
    full, params, generator = built
    (prompt,) = prompts_of([5])
    made = generator(params, [prompt], scan.row_keys(0, 1), transforms.chain(transforms.greedy()), length=9, chunk=4)
    text = np.concatenate([prompt, made.tokens[0]])
    logits = full(params, text[None])
    np.testing.assert_array_equal(made.tokens[0], np.argmax(logits[0, 4:-1], -1))


def test_what_it_tells_of_each_token_is_what_the_full_pass_says(built):
    full, params, generator = built
    (prompt,) = prompts_of([3])
    made = generator(params, [prompt], scan.row_keys(3, 1), CHAIN, length=6)
    text = np.concatenate([prompt, made.tokens[0]])
    logits = np.asarray(full(params, text[None]), np.float64)[0, 2:-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    drawn = np.asarray(jax.jit(lambda z: CHAIN(z))(jnp.asarray(logits, jnp.float32)), np.float64)
    log_q = drawn - np.log(np.exp(drawn).sum(-1, keepdims=True))
    at = np.arange(6), made.tokens[0]
    np.testing.assert_allclose(made.log_probability[0], log_p[at], atol=1e-4)
    np.testing.assert_allclose(made.log_probability_drawn[0], log_q[at], atol=1e-4)
    np.testing.assert_allclose(made.entropy[0], -(np.exp(log_p) * log_p).sum(-1), atol=1e-4)
    q = np.exp(log_q)
    np.testing.assert_allclose(
        made.entropy_drawn[0], -np.where(q > 0, q * np.maximum(log_q, -99), 0).sum(-1), atol=1e-4
    )
    np.testing.assert_array_equal(made.rank[0], (logits > logits[at][:, None]).sum(-1))
    np.testing.assert_array_equal(made.kept[0], np.isfinite(drawn).sum(-1))


def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(built):
    _, params, generator = built

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(1, 16), min_size=3, max_size=3), st.floats(0.2, 2.0), st.integers(0, 2**32 - 1))
    def check(lengths, temperature, seed):
        chain = transforms.chain(transforms.temperature(temperature))
        prompts, keys = prompts_of(lengths, seed % 1000), scan.row_keys(seed, len(lengths))
        together = generator(params, prompts, keys, chain, length=12, chunk=6)
        order = np.random.default_rng(seed).permutation(len(lengths))
        shuffled = generator(params, [prompts[i] for i in order], keys[order], chain, length=12, chunk=6)
        np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
        alone = generator(params, prompts[:1], keys[:1], chain, length=12, chunk=6)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])

    check()


@pytest.mark.slow
def test_samples_of_a_prompt_share_its_prefill_and_equal_separate_prompts(built):
    _, params, generator = built
    prompts, keys = prompts_of([4, 2]), scan.row_keys(1, 6)
    shared = generator(params, prompts, keys, CHAIN, length=5, num_samples=3)
    separate = generator(params, [prompts[0]] * 3 + [prompts[1]] * 3, keys, CHAIN, length=5)
    np.testing.assert_array_equal(shared.tokens, separate.tokens)
    assert len({tuple(row) for row in shared.tokens.tolist()}) > 1


def test_going_on_from_a_text_equals_not_having_stopped(built):
    _, params, generator = built
    (prompt,), keys = prompts_of([3]), scan.row_keys(9, 1)
    whole = generator(params, [prompt], keys, CHAIN, length=12).tokens[0]
    first = generator(params, [prompt], keys, CHAIN, length=5).tokens[0]
    rest = generator(params, [np.concatenate([prompt, first])], keys, CHAIN, length=7).tokens[0]
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


@pytest.mark.slow
def test_the_chunk_and_the_stream_change_nothing(built):
    _, params, generator = built
    prompts, keys = prompts_of([3, 6]), scan.row_keys(2, 2)
    whole = generator(params, prompts, keys, CHAIN, length=13)
    for chunk in (1, 5):
        parts = list(generator.stream(params, prompts, keys, CHAIN, length=13, chunk=chunk))
        np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts], 1), whole.tokens)


MEMORIES = transforms.parse(
    "repetition_penalty(1.3), frequency_penalty(0.2), no_repeat_ngram(4), dry(), mirostat(2, 0.3), xtc(0.2, 0.4)"
)


@pytest.mark.slow
def test_a_chain_with_a_memory_sees_each_row_alone_and_across_chunks(one):
    _, params, generator = one
    prompts, keys = prompts_of([7, 2, 11]), scan.row_keys(5, 6)
    whole = generator(params, prompts, keys, MEMORIES, length=20, num_samples=2, chunk=20)
    for i, prompt in enumerate(prompts):
        rows = slice(2 * i, 2 * i + 2)
        alone = generator(params, [prompt], keys[rows], MEMORIES, length=20, num_samples=2, chunk=3)
        np.testing.assert_array_equal(whole.tokens[rows], alone.tokens)
    # Its distributions are those of the chain on the whole text, step by step.
    text = np.concatenate([prompts[1], whole.tokens[2]])
    states = MEMORIES.init(prompts[1][None], np.array([2], np.int32), V, 64)
    logits = one[0](params, text[None])[0]

    @jax.jit
    def step(logits, states, i, token):
        _, more = scan.uniforms(keys[2:3], (2 + i)[None])
        z, commit = MEMORIES.step(logits[None], states, transforms.Moment(i[None], more))
        return z[0], commit(token[None])

    for i, token in enumerate(whole.tokens[2]):
        z, states = step(logits[1 + i], states, jnp.int32(i), jnp.int32(token))
        assert whole.kept[2, i] == np.isfinite(z).sum()
        np.testing.assert_allclose(whole.log_probability_drawn[2, i], jax.nn.log_softmax(z)[token], atol=1e-4)


@pytest.mark.slow
def test_rows_shared_out_to_the_cores_are_the_same_rows(one, monkeypatch):
    _, params, generator = one
    rows = 6
    chain = transforms.chain(
        transforms.repetition_penalty(1.3), transforms.temperature(np.linspace(0.5, 2, rows)), transforms.banned([2])
    )
    (*prompts, second), keys = prompts_of([5, 1, 7, 3]), scan.row_keys(4, rows)
    options = {"length": 9, "chunk": 4, "num_samples": 2}
    for more in ({}, {"second_prompts": [second] * 3, "guidance": np.linspace(0, 2, rows)}):
        made = []
        for count in (1, 2):  # three rows each: the second prompt's part company
            monkeypatch.setattr(scan, "groups", lambda rows, count=count: count)
            made.append(generator(params, prompts, keys, chain, **options, **more))
        np.testing.assert_array_equal(made[1].tokens, made[0].tokens)
        np.testing.assert_allclose(made[1].log_probability_drawn, made[0].log_probability_drawn, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(scan, "workers", lambda: 4)
    assert [scan.groups(rows) for rows in (1, 7, 8, 9, 12, 16, 23, 64)] == [1, 1, 2, 1, 3, 4, 1, 4]


@pytest.mark.slow
def test_guidance_leans_from_the_second_prompt_to_the_first(built):
    full, params, generator = built
    (first, second), keys = prompts_of([5, 3]), scan.row_keys(4, 2)
    options = {"length": 9, "num_samples": 2, "chunk": 4, "second_prompts": [second]}
    one = generator(params, [first], keys, CHAIN, guidance=1.0, **options)
    plain = generator(params, [first], keys, CHAIN, length=9, num_samples=2)
    np.testing.assert_array_equal(one.tokens, plain.tokens)
    made = generator(params, [first], keys, transforms.chain(), guidance=[2.5, 0.0], **options)
    for row, g in enumerate((2.5, 0.0)):
        a, b = (full(params, np.concatenate([p, made.tokens[row]])[None])[0, len(p) - 1 : -1] for p in (first, second))
        mixed = jax.nn.log_softmax(b + g * (a - b))
        at = np.arange(9), made.tokens[row]
        np.testing.assert_allclose(made.log_probability_drawn[row], mixed[at], atol=1e-4)
        np.testing.assert_allclose(made.log_probability[row], jax.nn.log_softmax(a)[at], atol=1e-4)


@pytest.mark.parametrize("name", ["hybrid", "lstm", "transformer"])  # two with a window, one without
def test_beyond_the_window_it_goes_on_and_equals_recomputing_the_window(name):
    full, params, generator = build(name, **{"model.context": 6})
    (prompt,) = prompts_of([4])
    made = generator(params, [prompt], scan.row_keys(0, 1), transforms.chain(transforms.greedy()), length=40, chunk=7)
    text = np.concatenate([prompt, made.tokens[0]])
    logits = full(params, text[None])  # sliding-window attention over all of it
    np.testing.assert_array_equal(text[4:], np.argmax(logits[0, 3:-1], -1))


LEARNED = {"model.transformer.positions": "learned", "model.context": 16}


@pytest.mark.parametrize("prompt", [3, 12, 16, 17, 40])
def test_past_learned_positions_every_token_follows_from_the_window_of_its_own_length(prompt):
    full, params, generator = build("transformer", **LEARNED)
    made = generator(params, prompts_of([prompt]), scan.row_keys(0, 1), transforms.chain(), length=30)
    text = np.concatenate([prompts_of([prompt])[0], made.tokens[0]])
    for t in range(prompt, len(text)):
        start = 0 if t <= 16 else 8 * -(-(t - 16) // 8)  # all of up to 16 tokens, then half of them on
        window = np.zeros(16, np.int32)
        window[: t - start] = text[start:t]
        expected = jax.nn.log_softmax(full(params, window[None])[0, t - start - 1])[text[t]]
        np.testing.assert_allclose(made.log_probability[0, t - prompt], expected, atol=1e-4)


@pytest.mark.slow
def test_past_learned_positions_a_row_depends_on_neither_chunk_nor_neighbours():
    _, params, generator = build("transformer", **LEARNED)
    prompts, keys = prompts_of([3, 14, 16, 30, 9]), scan.row_keys(0, 5)
    together = generator(params, prompts, keys, MEMORIES, length=50)
    for i, prompt in enumerate(prompts):
        for chunk in (50, 7):
            alone = generator(params, [prompt], keys[i : i + 1], MEMORIES, length=50, chunk=chunk)
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    guided = generator(params, prompts, keys, MEMORIES, length=50, guidance=1.0, second_prompts=prompts_of([11] * 5))
    np.testing.assert_array_equal(guided.tokens, together.tokens)


def test_a_memory_holds_all_of_a_prompt_that_outruns_the_positions():
    _, params, generator = build("transformer", **LEARNED)
    prompt = np.tile(np.arange(V, dtype=np.int32), 12)
    chain = transforms.chain(transforms.no_repeat_ngram(2))
    made = generator(params, [prompt], scan.row_keys(0, 1), chain, length=20)
    text = [*prompt.tolist(), *made.tokens[0].tolist()]
    pairs = list(itertools.pairwise(text))
    assert not any(pair in pairs[: i + len(prompt) - 1] for i, pair in enumerate(pairs[len(prompt) - 1 :]))


def test_every_position_and_every_row_draws_anew(one):
    _, params, generator = one
    hot = transforms.chain(transforms.temperature(1e9))  # all tokens alike: the draws show through
    made = generator(params, prompts_of([2]), scan.row_keys(0, 40), hot, length=50, num_samples=40)
    for tokens in (*made.tokens, *made.tokens.T):
        assert np.bincount(tokens, minlength=V).max() < 25  # of 40 or 50; 6 or 7 are expected


@pytest.mark.slow
def test_sampling_frequencies_are_the_models(one):
    full, params, generator = one
    (prompt,), n = prompts_of([2]), 4000
    made = generator(params, [prompt], scan.row_keys(0, n), transforms.chain(), length=1, num_samples=n)
    logits = full(params, prompt[None])
    p = np.asarray(jax.nn.softmax(logits[0, -1]))
    counts = np.bincount(made.tokens[:, 0], minlength=V)
    # Five standard deviations of a binomial: once in two million runs by chance, and the seed is fixed.
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_no_prompt_length_seed_or_number_compiles_again():
    _, params, generator = build("transformer")  # whose carry grows

    def run(lengths, seed, temperature, length):
        chain = transforms.chain(transforms.temperature(temperature))
        generator(params, prompts_of(lengths), scan.row_keys(seed, len(lengths)), chain, length=length)

    run([3, 9], 0, 1.0, 60)
    compiled = generator._prefill._cache_size(), generator._decode._cache_size()
    run([16, 1], 1, 0.0, 55)
    run([2, 2], 2, 0.3, 58)
    run([5, 12], 3, 2.0, 51)
    assert (generator._prefill._cache_size(), generator._decode._cache_size()) == compiled


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([np.zeros(0, np.int32)], {}, "A prompt is empty"),
        ([np.zeros(1, np.int32)], {"length": 0}, "length must be 1 or more, got 0"),
        ([np.zeros(1, np.int32)], {"num_samples": 0}, "num_samples must be 1 or more, got 0"),
    ],
)
def test_bad_requests_are_refused(one, prompts, options, message):
    _, params, generator = one
    with pytest.raises(UserError, match=message):
        generator(params, prompts, scan.row_keys(0, 1), CHAIN, **({"length": 2} | options))

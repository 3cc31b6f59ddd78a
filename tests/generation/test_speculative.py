"""Speculative decoding: the distribution of the model alone, for every draft, backbone and chain."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SOME_BACKBONES, noisy_params, tiny, trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import models
from textgen.config import UserError
from textgen.generation import scan, speculative, transforms
from textgen.models import ngram
from textgen.training import losses

V = 4
PLAIN = transforms.chain()
SHARP = transforms.chain(transforms.temperature(0.8), transforms.top_p(0.9))
GREEDY = transforms.chain(transforms.temperature(0.0), transforms.top_p(0.9))  # compiled once with SHARP
MEMORY = transforms.chain(transforms.presence_penalty(0.7), transforms.xtc(0.2, 0.5), transforms.temperature(0.9))


# A Markov chain of the second order as the model, and one of the first as its draft; the carry is the last token.


def score(params, tokens, carry, lengths):
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    both = jnp.concatenate([carry[:, None], tokens], 1)
    return params[both[:, :-1], tokens], None, jnp.take_along_axis(both, lengths[:, None], 1)[:, 0]


def step(params, tokens, carry, lengths):
    return params[tokens[:, -1]], carry


def first(batch_size, max_length):
    return jnp.zeros(batch_size, jnp.int32)


def table(order, seed, spread=1.5):
    return np.asarray(spread * np.random.default_rng(seed).standard_normal((V,) * (order + 1)), np.float32)


PROMPT = np.array([1, 2], np.int32)
MARKOV = {g: speculative.Speculator(score, first, speculative.model_draft(step, first, g), alone=False) for g in (1, 3)}


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


def one_step(p, q):
    """The rule's outcome, integrated over everything random: (P(token), P(kept))."""
    kept = np.minimum(p, q)
    rest = np.maximum(p - q, 0)
    return kept + (1 - kept.sum()) * (rest / rest.sum() if rest.sum() else p), kept.sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.6))
def test_the_rule_gives_the_models_distribution_on_a_grid_of_all_that_is_random(seed, removed):
    random, n = np.random.default_rng(seed), 100
    p, q = (random.dirichlet(np.ones(V)) * (random.uniform(size=V) >= removed) + 1e-30 for _ in range(2))
    p, q = p * (p > 1e-20) + (p.max() < 1e-20), q * (q > 1e-20) + (q.max() < 1e-20)
    p, q = p / p.sum(), q / q.sum()
    law, rate = one_step(p, q)
    np.testing.assert_allclose(law, p, atol=1e-12)
    # Every proposed token, with its probability as its weight; every pair of a grid of uniforms.
    grid = (np.arange(n) + 0.5) / n
    proposed, keep, anew = (x.reshape(-1) for x in np.meshgrid(np.arange(V), grid, grid, indexing="ij"))
    with np.errstate(divide="ignore"):
        logits = [np.broadcast_to(np.log(x).astype(np.float32), (len(keep), 1, V)) for x in (p, q)]
    drawn = jnp.concatenate([logits[0], jnp.zeros_like(logits[0])], 1)
    accepted, token = speculative.verify(
        drawn, jnp.asarray(logits[1]), jnp.asarray(proposed[:, None], jnp.int32),
        jnp.asarray(keep[:, None], jnp.float32), jnp.asarray(np.stack([anew, anew], 1), jnp.float32),
    )  # fmt: skip
    token = np.where(np.asarray(accepted) == 1, proposed, token)
    weight = q[proposed] / n**2
    assert abs((weight * np.asarray(accepted)).sum() - rate) <= V / n
    np.testing.assert_allclose(np.bincount(token, weight, minlength=V), p, atol=2 * V / n)
    assert (p[token[weight > 0]] > 0).all()


def law_of_texts(params, chain, length):
    """{text: p} by taking every text through the chain, a token at a time."""
    texts = {(): (1.0, chain.init(PROMPT[None], np.array([2]), V, 32))}
    chances = [transforms.Moment(jnp.zeros(1, jnp.int32), jnp.full(1, u)) for u in (1.0, 0.0)]
    advance = jax.jit(lambda logits, states, moment: chain.step(logits, states, moment)[0])
    commit = jax.jit(lambda logits, states, token: chain.step(logits, states, chances[0])[1](token))
    for _ in range(length):
        longer = {}
        for text, (p, states) in texts.items():
            whole = [*PROMPT.tolist(), *text]
            logits = jnp.asarray(params[whole[-2], whole[-1]][None])
            next_p = np.mean([softmax(advance(logits, states, c)[0]) for c in chances], 0)  # half the time, xtc acts
            for token in range(V):
                longer[*text, token] = (p * next_p[token], commit(logits, states, jnp.full(1, token)))
        texts = longer
    return {text: p for text, (p, _) in texts.items()}


@pytest.mark.parametrize(("chain", "gamma"), [(PLAIN, 1), (SHARP, 3), (MEMORY, 1), (MEMORY, 3)])
@pytest.mark.slow
def test_texts_come_as_often_as_from_the_model_alone(chain, gamma):
    params, draft, n, length = table(2, 0), table(1, 1), 20_000, 3
    wanted = law_of_texts(params, chain, length)
    assert sum(wanted.values()) == pytest.approx(1)
    made = MARKOV[gamma](
        params, draft, [PROMPT], scan.row_keys(0, n), chain, length=length, num_samples=n, draft_chain=SHARP
    )
    texts, counts = np.unique(made.generated.tokens, axis=0, return_counts=True)
    counts = dict(zip(map(tuple, texts.tolist()), counts.tolist(), strict=True))
    assert set(counts) <= {text for text, p in wanted.items() if p > 0}
    for text, p in wanted.items():  # five standard deviations; the seed is fixed
        assert abs(counts.get(text, 0) - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1


def test_proposals_are_kept_as_often_as_the_two_distributions_overlap():
    params, draft, n = table(2, 2), table(1, 3), 20_000
    made = MARKOV[1](params, draft, [PROMPT], scan.row_keys(1, n), PLAIN, length=1, num_samples=n)
    _, rate = one_step(softmax(params[1, 2]), softmax(draft[2]))
    assert (made.calls == 1).all()
    assert abs(made.accepted.sum() - n * rate) <= 5 * np.sqrt(n * rate * (1 - rate))


def test_a_draft_that_is_the_model_is_always_right():
    params = np.broadcast_to(table(1, 4), (V, V, V))
    made = MARKOV[3](params, table(1, 4), [PROMPT], scan.row_keys(1, 50), SHARP, length=40, num_samples=50)
    np.testing.assert_array_equal(made.calls, 10)
    np.testing.assert_array_equal(made.accepted, 30)
    assert made.tokens_per_call == 4


# The models of the house.


KINDS = {
    "lstm": ("lstm", {}, "model"),
    "transformer": ("transformer", {}, "model"),
    "window": ("transformer", {"model.context": 6}, "model"),
    "ngram": ("transformer", {"model.context": 20}, "ngram"),
    "transformer-heads": ("transformer", {"model.predict_ahead": 3}, "heads"),
    "lstm-heads": ("lstm", {"model.predict_ahead": 2}, "heads"),
}
each = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def build(kind):
    name, overrides, draft = KINDS[kind]
    model = models.build(tiny({"model.backbone": name, "model.layers": 2} | overrides), 7)
    params, apply = noisy_params(model), lambda p, *a: model.apply({"params": p}, *a, method="next_token")
    if draft == "heads":
        pair, draft_params = speculative.speculator(model, gamma=2), params
    elif draft == "ngram":
        pair, draft_params = (
            speculative.speculator(model, models.NGram(3, 7), gamma=4),
            ngram.fit(*prompts_of([200]), 3, 7),
        )
    else:
        other = models.build(tiny({"model.backbone": "lstm", "model.width": 8}), 7)
        pair, draft_params = speculative.speculator(model, other, gamma=3), noisy_params(other, 1)
    return pair, scan.Generator(apply, model.init_carry, model.max_positions), params, draft_params, model


def prompts_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 7, n).astype(np.int32) for n in lengths]


@pytest.mark.slow
@each
def test_greedy_text_is_that_of_greedy_decoding(kind):
    speculator, generator, params, draft_params, _ = build(kind)
    prompts, keys = prompts_of([5, 1, 9]), scan.row_keys(0, 3)
    made = speculator(params, draft_params, prompts, keys, GREEDY, length=18)
    alone = generator(params, prompts, keys, GREEDY, length=18)
    np.testing.assert_array_equal(made.generated.tokens, alone.tokens)
    for name, told in vars(alone).items():
        np.testing.assert_allclose(getattr(made.generated, name), told, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "window", "ngram", "transformer-heads"])  # each draft, and each carry
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(kind):
    speculator, _, params, draft_params, model = build(kind)
    prompts, keys = prompts_of([4, 1, 12]), scan.row_keys(7, 3)

    def run(rows):
        return speculator(params, draft_params, [prompts[i] for i in rows], keys[np.array(rows)], SHARP, length=18)

    speculator.alone = False
    together = run([0, 1, 2])
    assert together.generated.tokens.shape == (3, 18)
    assert (together.calls + together.accepted >= 18).all()
    for speculator.alone, rows in ((False, [1]), (False, [2, 1, 0]), (True, [2, 1, 0])):
        some, wanted = run(rows), jax.tree.map(lambda leaf, rows=rows: leaf[np.array(rows)], together)
        for name in ("calls", "accepted"):
            np.testing.assert_array_equal(getattr(some, name), getattr(wanted, name))
        np.testing.assert_array_equal(some.generated.tokens, wanted.generated.tokens)
    # What it tells is what one pass over the whole text says.
    text = np.concatenate([prompts[0], together.generated.tokens[0]])
    full = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens)[0])
    log_p = jax.nn.log_softmax(full(params, text[None])[0])[3:-1]
    told = together.generated.log_probability[0]
    np.testing.assert_allclose(told, np.asarray(log_p)[np.arange(18), together.generated.tokens[0]], atol=1e-4)


def test_in_the_transformer_lengths_change_the_carry_alone():
    """So that scoring all proposed tokens and reading the kept ones is one computation."""
    model = models.build(tiny({"model.layers": 2}), 7)
    params, tokens = noisy_params(model), np.stack(prompts_of([5, 5]))
    apply = jax.jit(lambda tokens, carry, lengths: model.apply({"params": params}, tokens, carry, lengths))
    _, carry = apply(tokens, model.init_carry(2, 16), np.array([3, 5]))
    whole, _ = apply(tokens, carry, None)
    ragged, _ = apply(tokens, carry, np.array([1, 4]))
    np.testing.assert_array_equal(whole, ragged)


@pytest.mark.slow
def test_samples_of_a_prompt_share_its_prefill_and_equal_separate_prompts():
    speculator, _, params, draft_params, _ = build("transformer")
    prompts, keys = prompts_of([4, 2]), scan.row_keys(1, 4)
    shared = speculator(params, draft_params, prompts, keys, SHARP, length=5, num_samples=2)
    separate = speculator(params, draft_params, [p for p in prompts for _ in range(2)], keys, SHARP, length=5)
    np.testing.assert_array_equal(shared.generated.tokens, separate.generated.tokens)


def test_no_prompt_length_seed_or_number_compiles_again():
    def run(lengths, temperature, length):
        chain, keys = transforms.chain(transforms.temperature(temperature)), scan.row_keys(0, len(lengths))
        prompts = [np.ones(n, np.int32) for n in lengths]
        return MARKOV[3](table(2, 0), table(1, 1), prompts, keys, chain, length=length).generated.tokens

    short = run([3, 9], 1.0, 20)
    compiled = MARKOV[3]._run._cache_size()
    run([16, 1], 0.0, 31)
    np.testing.assert_array_equal(run([3, 9], 1.0, 31)[:, :20], short)
    assert MARKOV[3]._run._cache_size() == compiled


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([np.zeros(0, np.int32)], {}, "A prompt is empty"),
        ([PROMPT], {"length": 0}, "length must be 1 or more, got 0"),
        ([PROMPT], {"num_samples": 0}, "num_samples must be 1 or more, got 0"),
    ],
)
def test_bad_requests_are_refused(prompts, options, message):
    with pytest.raises(UserError, match=message):
        MARKOV[1](table(2, 0), table(1, 1), prompts, scan.row_keys(0, 1), PLAIN, **({"length": 2} | options))
    with pytest.raises(UserError, match="gamma=0"):
        speculative.model_draft(step, first, 0)
    for heads in (-1, 16):
        with pytest.raises(UserError, match=f"model.predict_ahead must lie in .* got {heads} of 16"):
            models.build(tiny({"model.predict_ahead": heads}), 7)
    short = speculative.Speculator(score, first, speculative.model_draft(step, first, 3), max_positions=6)
    with pytest.raises(UserError, match="reads up to 7 tokens"):
        short(table(2, 0), table(1, 1), [PROMPT], scan.row_keys(0, 1), PLAIN, length=2)


# Heads for later tokens.
SCORE = functools.partial(losses.total_nats, lambda logits: logits)


def test_without_them_there_is_nothing_of_them():
    plain, three = (models.build(tiny({"model.predict_ahead": n}), 7) for n in (0, 3))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"] for m in (plain, three)]
    extra = {name for name in shapes[1] if name not in shapes[0]}
    assert extra == {f"ahead_heads_{i}" for i in range(3)}
    assert shapes[0] == {name: shapes[1][name] for name in shapes[0]}


def test_their_loss_is_the_mean_over_heads_of_the_later_tokens_nats():
    random = np.random.default_rng(0)
    logits, targets = random.standard_normal((2, 6, 2, V)).astype(np.float32), random.integers(0, V, (2, 6))
    targets[1, 4] = -1  # no target
    log_p, wanted = np.log(softmax(logits)), 0.0
    for b, t, i in itertools.product(range(2), range(6), range(2)):
        if t + i + 1 < 6 and targets[b, t + i + 1] >= 0:
            wanted -= log_p[b, t, i, targets[b, t + i + 1]] / 2
    assert float(losses.ahead_nats(SCORE, jnp.asarray(logits), jnp.asarray(targets))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_BACKBONES)
def test_training_teaches_them_and_reports_the_next_token_alone(name):
    steps = {"model.backbone": name, "train.steps": 120, "train.steps_per_dispatch": 120, "log.every_steps": 120}
    rate = {"optimizer.learning_rate": 1e-2, "optimizer.schedule": "constant"}
    trainer, batches = trainer_of({"model.predict_ahead": 2} | steps | rate)
    state, rows = trainer.dispatch(trainer.init(), *batches(0, 120))
    first_loss = float(rows["nats"][0] / rows["tokens"][0])
    windows = batches(120, 1)[0][0]
    assert first_loss == pytest.approx(np.log(trainer.model.vocab_size), rel=1e-3)  # the heads' nats are not in it
    model, params = trainer.model, state.params
    apply = jax.jit(lambda x, method: model.apply({"params": params}, x, method=method), static_argnames="method")
    logits, y, _ = apply(windows[:, :-1], method="score")
    ahead = apply(y, method="ahead")
    assert ahead.shape == (*y.shape[:2], 2, model.vocab_size)
    # They know the later tokens better than the prediction of the next one does, read for a later one.
    targets = jnp.asarray(windows[:, 1:], jnp.int32)
    loss = lambda ahead: float(losses.ahead_nats(SCORE, ahead, targets) / targets.size)
    assert loss(ahead) < loss(jnp.stack([logits, logits], 2)) - 0.1

"""Every token predicted once, whatever the batch; as a stream, from all that came before."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SOME_BACKBONES, noisy_params, tiny

from textgen import models, parallel
from textgen.config import UserError
from textgen.data.dataset import Split
from textgen.evaluation import evaluator as evaluator_lib

V = 9


def build(name, overrides=None):
    model = models.build(tiny({"model.backbone": name} | (overrides or {})), V)
    params = noisy_params(model)
    return model, params, jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])


def plain_nats(logits, targets):
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]


TOKENS = np.random.default_rng(0).integers(0, V, 45).astype(np.uint8)


@pytest.mark.parametrize("name", SOME_BACKBONES)
def test_windows_predict_every_token_once_from_their_own_window(name):
    model, params, full = build(name)
    expected = np.concatenate(
        [
            plain_nats(full(TOKENS[None, s : s + 8])[0][: len(TOKENS[s + 1 : s + 9])], TOKENS[s + 1 : s + 9])
            for s in range(0, 44, 8)
        ]
    )
    for rows in (1, 2, 7):
        got = evaluator_lib.Evaluator(model, window=8, batch_size=rows).window_nats(params, TOKENS)
        assert got.shape == (44,)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("name", SOME_BACKBONES)
def test_a_stream_predicts_from_all_that_came_before(name, monkeypatch):
    monkeypatch.setattr(evaluator_lib, "STREAM_CHUNK", 16)
    model, params, full = build(name, {"model.context": 64})
    expected = plain_nats(full(TOKENS[None])[0][:-1], TOKENS[1:])
    got = evaluator_lib.Evaluator(model, window=8, batch_size=2).stream_nats(params, TOKENS)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("axis", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)])
def test_split_parameters_predict_the_same(axis, monkeypatch):
    monkeypatch.setattr(evaluator_lib, "STREAM_CHUNK", 16)
    config = tiny({f"mesh.{axis}": 2})
    model = models.build(config, V)
    params = noisy_params(model)
    where = parallel.shardings(params, parallel.make_mesh(config))
    assert any(not there.is_fully_replicated for there in jax.tree.leaves(where))
    tokens = np.random.default_rng(1).integers(0, V, 4001).astype(np.uint8)  # hundreds of programs that meet
    evaluator = evaluator_lib.Evaluator(model, window=8, batch_size=2)
    for read in (evaluator.window_nats, evaluator.stream_nats):
        np.testing.assert_allclose(read(jax.device_put(params, where), tokens), read(params, tokens), atol=2e-5)


def test_learned_positions_do_not_stream_past_their_end():
    model, params, _ = build("transformer", {"model.transformer.positions": "learned"})
    evaluator = evaluator_lib.Evaluator(model, window=8, batch_size=2)
    with pytest.raises(UserError, match="Learned positions end at 16, and the text has 45 tokens"):
        evaluator.stream_nats(params, TOKENS)


def test_a_report_converts_to_bits_and_splits_by_position():
    nats = np.tile(np.array([3.0, 2.0, 1.0, 1.0]), 300)
    split = Split(np.zeros(1201, np.uint8), characters=2400, bytes=4800)
    r = evaluator_lib.report(nats, split, window=4)
    assert (r.loss, r.tokens) == (1.75, 1200)
    np.testing.assert_allclose(r.bits_per_character, 1.75 / 2 / math.log(2))
    np.testing.assert_allclose(r.bits_per_byte, 1.75 / 4 / math.log(2))
    np.testing.assert_allclose(r.perplexity, math.exp(1.75))
    assert r.by_position == {"1": 3.0, "2": 2.0, "3-4": 1.0}
    assert evaluator_lib.report(nats[:600], split).characters == 1200  # the start of a split


def test_the_standard_error_is_that_of_block_means():
    random = np.random.default_rng(0)
    nats = random.standard_normal(512 * 100)
    r = evaluator_lib.report(nats, Split(np.zeros(len(nats) + 1, np.uint8), 1, 1), unknown=0)
    assert r.unknown == len(nats)
    np.testing.assert_allclose(r.standard_error, nats.reshape(100, 512).mean(1).std(ddof=1) / 10)


def test_a_model_that_knows_nothing_costs_log_v():
    model = models.build(tiny(), V)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    nats = evaluator_lib.Evaluator(model, window=8, batch_size=2).window_nats(params, TOKENS)
    np.testing.assert_allclose(nats, math.log(V), rtol=1e-6)

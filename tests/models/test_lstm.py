"""The LSTM in cuDNN's kernels: what can be shown without a GPU.

In the kernels' place stands JAX's plain definition of what they compute, with their own layout of
the weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_params, tiny
from jax.experimental import rnn

from textgen import errors, models, parallel
from textgen.comparison import ensemble
from textgen.models import lstm
from textgen.training import loop

pytestmark = pytest.mark.slow  # windows are compiled here, forwards and back

V = 11


def plain(x, h, c, weights, inputs, width):
    lengths = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    return rnn.lstm_ref(x, h, c, *rnn.unpack_lstm_weights(weights, inputs, width, 1, False), lengths,
                        inputs, width, 1, 0.0, False)  # fmt: skip


def forward(x, h, c, weights, lengths, inputs, width, *rest):
    assert lengths.dtype == jnp.int32
    assert rest == (1, 0.0, False, None)
    return plain(x, h, c, weights, inputs, width), (x, h, c, weights, lengths)


def backward(inputs, width, layers, dropout, bidirectional, precision, saved, cotangents):
    *args, lengths = saved
    return *jax.vjp(lambda *a: plain(*a, inputs, width), *args)[1](cotangents), jnp.zeros_like(lengths)


@pytest.fixture
def nvidia(gpu, monkeypatch):
    """As on a GPU whose cuDNN works."""
    monkeypatch.setattr(rnn, "lstm_fwd", forward)
    monkeypatch.setattr(rnn, "lstm_bwd", backward)
    lstm._trial.cache_clear()
    errors.note.cache_clear()
    yield gpu
    lstm._trial.cache_clear()


def config(recurrence="auto", **more):
    return tiny({"model.backbone": "lstm", "model.layers": 2, "model.recurrence": recurrence} | more)


def pair(**more):
    built = [models.build(config(recurrence, **more), V) for recurrence in ("cudnn", "scan")]
    assert [model.backbone.cudnn for model in built] == [True, False]
    return built


@pytest.mark.parametrize("remat", [False, True])
def test_a_window_its_carry_and_its_gradients_equal_the_scan(nvidia, remat):
    tokens = np.random.default_rng(0).integers(0, V, (3, 7)).astype(np.int32)
    results = []
    for model in pair(**{"model.remat": remat}):
        params = noisy_params(model)
        start = jax.tree.map(lambda leaf: leaf + 0.3, model.init_carry(3, 7))

        def loss(params, start, model=model):
            logits, carry = model.apply({"params": params}, tokens, start)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in (logits, *jax.tree.leaves(carry))), (logits, carry)

        results.append(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, start))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *results)


def test_ragged_prompts_and_single_tokens_go_on_from_its_carry(nvidia):
    model, scan = pair()
    params = noisy_params(model)
    tokens, lengths = np.arange(12, dtype=np.int32).reshape(3, 4) % V, np.array([4, 1, 2], np.int32)
    results = []
    for one in (model, scan):
        apply = lambda tokens, carry, lengths=None, one=one: one.apply({"params": params}, tokens, carry, lengths)
        carry = apply(tokens, one.init_carry(3, 16))[1]
        carry = apply(tokens, carry, lengths)[1]
        results.append(apply(tokens[:, :1], carry))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *results)


def test_seeds_side_by_side_equal_one_by_one(nvidia):
    wanted = config("cudnn", **{"optimizer.learning_rate": 1e-2})
    model = models.build(wanted, V)
    windows = np.random.default_rng(0).integers(0, V, (2, 4, 4, 17)).astype(np.uint16)
    members = ensemble.Ensemble(model, wanted, [(0, 1e-2), (1, 1e-2)], at_once=2)
    state, _ = members.dispatch(members.init(), windows, np.ones(4, bool))
    trainer = loop.Trainer(model, wanted, parallel.make_mesh(wanted))
    alone, _ = trainer.dispatch(trainer.init(), windows[0], np.ones(4, bool))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    jax.tree.map(close, ensemble.member(state, 0).params, alone.params)


@pytest.mark.parametrize(
    ("recurrence", "capability", "dtype", "taken", "told"),
    [
        ("auto", "9.0", "float32", True, ""),
        ("cudnn", "7.5", "float32", True, ""),
        ("scan", "9.0", "float32", False, ""),
        ("auto", "9.0", "bfloat16", False, ""),
        ("cudnn", "9.0", "bfloat16", False, "a scan, as cuDNN's LSTM cannot be had: that takes an NVIDIA GPU"),
        ("auto", "gfx90a", "float32", False, ""),
        ("cudnn", "gfx90a", "float32", False, "a scan, as cuDNN's LSTM cannot be had: that takes an NVIDIA GPU"),
    ],
)
def test_it_is_taken_where_it_can_be_had(nvidia, recurrence, capability, dtype, taken, told, capsys):
    nvidia.compute_capability = capability
    chosen = config(recurrence, **{"model.compute_dtype": dtype})
    assert [lstm.choose_cudnn(chosen.model) for _ in range(2)] == [taken] * 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("cuDNN") == bool(told)


@pytest.mark.parametrize(
    ("broken", "told"), [("raises", "RuntimeError: no cuDNN"), ("differs", "it differed from the scan")]
)
def test_one_that_fails_its_trial_is_left_and_said(nvidia, monkeypatch, capsys, broken, told):
    def fail(*args):
        if broken == "raises":
            raise RuntimeError("no cuDNN\nand more")
        (y, h, c), saved = forward(*args)
        return (2 * y, h, c), saved

    monkeypatch.setattr(rnn, "lstm_fwd", fail)
    assert not lstm.choose_cudnn(config().model)
    assert told in capsys.readouterr().err

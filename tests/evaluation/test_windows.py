"""Windows hold every token once as a target, and score it as the plain definition does."""

import jax
import numpy as np
import pytest
from conftest import noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import models
from textgen.evaluation import windows


@settings(deadline=None)
@given(length=st.integers(2, 60), window=st.integers(1, 20), multiple=st.integers(1, 5))
def test_every_token_but_the_first_is_predicted_once_and_in_order(length, window, multiple):
    tokens = np.arange(100, 100 + length)
    ids, scored = windows.cut(tokens, window, multiple=multiple, fill=-1)
    assert ids.shape == (len(scored), window + 1)
    assert len(ids) % multiple == 0
    np.testing.assert_array_equal(ids[:, 1:][scored], tokens[1:])
    np.testing.assert_array_equal(ids[:, :-1][scored], tokens[:-1])
    assert (ids[:, 1:][~scored] == -1).all()
    starts = np.arange(0, length - 1, window)
    np.testing.assert_array_equal(ids[: len(starts), 0], tokens[starts])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_nll_is_the_negative_log_softmax_at_the_next_token(dtype):
    model = models.build(tiny(), 9)
    params = noisy_params(model)
    ids = np.random.default_rng(0).integers(0, 9, (3, 8)).astype(dtype)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, ids[:, :-1].astype(np.int32))[0], np.float64)
    log_total = np.log(np.exp(logits).sum(-1))
    expected = log_total - np.take_along_axis(logits, ids[:, 1:, None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(windows.nll(model, params, ids), expected, atol=1e-5)

"""Every way of generating hides the empty cache of its prefill from XLA's constant folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from textgen.generation import scan, search, search_loop, speculative, transforms

V = 3
LOGITS = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)
PROMPTS = [np.array([1, 2], np.int32)]


def step(params, tokens, carry, lengths):
    """A Markov chain, whose carry only counts tokens."""
    return params[tokens[:, -1]], carry + tokens.shape[1]


def score(params, tokens, carry, lengths):
    return params[tokens], None, carry + tokens.shape[1]


def empty(batch_size, max_length):
    return jnp.zeros(batch_size, jnp.int32)


def sample(keys, chain):
    scan.Generator(step, empty)(LOGITS, PROMPTS, keys, chain, length=2)


def decode(keys, chain):
    search_loop.Decoding(step, empty)(LOGITS, PROMPTS, keys, chain, search.beam(2), length=2)


def speculate(keys, chain):
    speculator = speculative.Speculator(score, empty, speculative.model_draft(step, empty, 1), alone=False)
    speculator(LOGITS, LOGITS, PROMPTS, keys, chain, length=2)


@pytest.mark.parametrize(("generate", "caches"), [(sample, 1), (decode, 1), (speculate, 2)])
def test_a_prefill_hides_its_empty_cache(generate, caches, monkeypatch):
    hidden, barrier = [], jax.lax.optimization_barrier

    def watch(carry):
        hidden.append(carry)
        return barrier(carry)

    monkeypatch.setattr(jax.lax, "optimization_barrier", watch)
    generate(scan.row_keys(0, 1), transforms.chain())
    assert len(hidden) == caches

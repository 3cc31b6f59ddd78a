"""Runs trained together: each is the run that it would be alone, whatever becomes of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TEXT, tiny

from textgen import models, parallel
from textgen.codecs.text import CharacterTokenizer
from textgen.comparison import ensemble
from textgen.data import dataset
from textgen.training import loop

pytestmark = pytest.mark.slow  # runs are trained here

TOKENIZER = CharacterTokenizer("".join(sorted(set(TEXT))))
TOKENS = TOKENIZER.encode(TEXT)
MEMBERS = ((0, 1e-3), (3, 1e-2), (2**32 - 1, 1e-2))


def together(config, members=MEMBERS, at_once=None):
    model = models.build(config, TOKENIZER.vocab_size)
    made = ensemble.Ensemble(model, config, members, at_once)
    return made, made.batches(TOKENS)


def trained(config, members=MEMBERS, at_once=None):
    made, batches = together(config, members, at_once)
    state, most = made.init(), config.train.steps_per_dispatch
    for step in range(0, config.train.steps, most):
        state, rows = made.dispatch(state, *batches(step, min(most, config.train.steps - step)))
    return state, rows


def changes(name, devices):
    optimizer = "muon" if name == "transformer" else "adamw"
    what = {"model.backbone": name, "model.dropout": 0.1, "optimizer.name": optimizer}
    return what | {"train.steps": 6, "mesh.data": devices}


@functools.cache
def alone(name, devices, seed, rate):
    config = tiny({**changes(name, devices), "seed": seed, "optimizer.learning_rate": rate})
    trainer = loop.Trainer(models.build(config, TOKENIZER.vocab_size), config, parallel.make_mesh(config))
    batches, state, most = dataset.Batches(TOKENS, config.data, seed), trainer.init(), config.train.steps_per_dispatch
    for step in range(0, config.train.steps, most):
        state, _ = trainer.dispatch(state, *batches(step, min(most, config.train.steps - step)))
    return state


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-4, rtol=1e-3), a, b)


@pytest.mark.parametrize(("name", "devices", "at_once"), [("lstm", 2, 1), ("transformer", 1, 2), ("transformer", 2, 3)])
def test_every_member_is_the_run_that_it_would_be_alone(name, devices, at_once):
    state, _ = trained(tiny(changes(name, devices)), at_once=at_once)
    for i, (seed, rate) in enumerate(MEMBERS):
        single, member = parallel.on_one(alone(name, devices, seed, rate)), ensemble.member(state, i)
        close(member.params, single.params)
        np.testing.assert_allclose(member.sums["nats"], single.sums["nats"], rtol=1e-4)
        assert int(member.step) == 6
        np.testing.assert_array_equal(*(jax.random.key_data(s.key) for s in (member, single)))


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_that_diverges_does_not_touch_the_others(at_once):
    config = tiny({"train.steps": 4})
    made, batches = together(config, at_once=at_once)
    windows = batches(0, 4)
    healthy, _ = made.dispatch(made.init(), *windows)
    sick = made.init()
    sick.params["final_norm"]["scale"] = sick.params["final_norm"]["scale"].at[1, 0].set(jnp.nan)
    sick, rows = made.dispatch(sick, *windows)
    np.testing.assert_array_equal(rows["skipped_in_a_row"][:, -1], [0, 4, 0])
    for i in (0, 2):
        both = (ensemble.member(s, i).params for s in (healthy, sick))
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_other_rates_and_seeds_are_the_same_program():
    config = tiny({"train.steps": 4})
    made, batches = together(config, at_once=3)
    state, _ = made.dispatch(made.init(), *batches(0, 4))
    made._rates = made._rates * 2
    made.dispatch(state, *batches(4, 2))  # a shorter dispatch too
    assert made._steps._cache_size() == 1

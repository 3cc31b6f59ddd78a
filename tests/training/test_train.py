"""The training step: exact under cutting, accumulation and sharding; unmoved by what is not finite."""

import dataclasses
import functools
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SOME_BACKBONES, TOKENIZER, TOKENS, noisy_params, tiny, trainer_of

from textgen import parallel
from textgen.training import loop, optimizers


def run(trainer, batches, state=None, until=None):
    """Trains with the loop itself; returns the state and the rows of the curve."""
    rows = []
    state = trainer.init() if state is None else state
    pauses = [(loop.at(until), lambda *_: None)] if until else []
    state = loop.train(
        trainer,
        state,
        batches,
        on_row=lambda step, metrics: rows.append((step, metrics)),
        on_dispatch=lambda *_: None,
        pauses=pauses,
        save=lambda *_: None,
    )
    return state, rows


@functools.cache
def on_one_device(name):
    return run(*trainer_of({"model.backbone": name}))


def losses(rows):
    return [(step, m["train/loss"]) for step, m in rows]


def equal(a, b):
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(keys(x), keys(y)), a, b)


def test_the_rate_leaves_out_the_dispatch_that_compiles(monkeypatch):
    trainer, batches = trainer_of({})
    rows = {name: np.ones(4, np.float32) for name in (*loop.SUMS, "skipped", "skipped_in_a_row")}

    def drive(_, state, *__, read, **___):
        for first, seconds in ((0, 60.0), (4, 2.0), (8, 1.0)):
            read(first, 4, rows, loop.Timing(seconds, 0.0))
        return state

    monkeypatch.setattr(loop, "run_steps", drive)
    seen = []
    quiet = {"on_row": lambda *_: None, "pauses": [], "save": lambda *_: None}
    loop.train(trainer, trainer.abstract, batches, on_dispatch=lambda *told: seen.append(told), **quiet)
    a_step = trainer.config.data.batch_size * trainer.config.data.window
    np.testing.assert_allclose([rate / a_step for _, _, rate in seen], [4 / 2, 8 / 3])
    assert [step for step, _, _ in seen] == [8, 12]


def test_the_curve_has_the_rate_that_the_optimizer_took():
    config = tiny({"optimizer.warmup_steps": 4, "log.every_steps": 1, "train.steps": 8})
    rows = {name: np.ones(8, np.float32) for name in loop.SUMS}
    rows["skipped"] = np.array([0, 1, 2, 2, 2, 2, 2, 2], np.float32)  # the second and third step changed nothing
    made = list(loop.curve(config, 8.0, 0, 8, rows, loop.Timing(1.0, 0.0)))
    rates = [row["train/learning_rate"] / config.optimizer.learning_rate for _, row in made]
    np.testing.assert_allclose(rates[:5], [0.25, 0.25, 0.25, 0.5, 0.75], rtol=1e-6)


def driven(a_dispatch, looks, pauses=()):
    """(steps read, steps saved) of 12 steps that a signal cuts short; looks: what each look for it sees."""
    config = tiny({"train.steps_per_dispatch": a_dispatch})
    trainer = SimpleNamespace(config=config, dispatch=lambda state, *_: (state, {"nats": jnp.zeros(a_dispatch)}))
    read, saved, looks = [], [], iter(looks)
    with pytest.raises(loop.Interrupted):
        loop.run_steps(
            trainer,
            SimpleNamespace(step=np.zeros((), np.int32)),
            lambda *_: (),
            read=lambda first, count, *_: read.append(first + count),
            pauses=pauses,
            save=lambda step, _: saved.append(step),
            stopping=lambda: next(looks),
        )
    return read, saved


def test_nobody_waits_for_tokens_longer_than_a_dispatch_takes():
    """Whose time the wait for the next tokens lies in, has it."""
    config = tiny({"train.steps_per_dispatch": 1})
    trainer = SimpleNamespace(config=config, dispatch=lambda state, *_: (state, {"nats": jnp.zeros(1)}))
    timings = []
    loop.run_steps(
        trainer,
        SimpleNamespace(step=np.zeros((), np.int32)),
        lambda step, _: (time.sleep(0.02 * (step % 2)), ())[1],
        read=lambda *told: timings.append(told[-1]),
        pauses=[],
        save=lambda *_: None,
        stopping=lambda: False,
    )
    assert len(timings) == 12
    assert all(timing.waited <= timing.seconds for timing in timings)
    assert sum(timing.waited for timing in timings) >= 6 * 0.02


def test_a_signal_between_two_looks_waits_for_the_next_turn():
    """Whatever is saved has been read: no row of the curve is lost."""
    assert driven(4, [False, True, True]) == ([4, 8], [8])


def test_a_stop_at_the_last_step_is_a_stop():
    """Asked for while what is due there is done."""
    assert driven(12, [False, True], [(loop.at(12), lambda *_: None)]) == ([12], [12])


@pytest.mark.parametrize(
    ("name", "order", "devices"),
    [("lstm", "stream", 2), pytest.param("transformer", "shuffled", 2, marks=pytest.mark.slow)]
    + [pytest.param(name, "stream", 1, marks=pytest.mark.slow) for name in ("mingru", "transformer")],
)
def test_where_a_run_is_cut_makes_no_difference_to_a_bit(name, order, devices):
    overrides = {"model.backbone": name, "data.order": order, "mesh.data": devices}
    trainer, batches = trainer_of(overrides | {"model.dropout": 0.1, "train.ema_decay": 0.9})
    whole, rows = run(trainer, batches)
    # Cut at every step, and where it falls in the middle of a row of the curve.
    state = trainer.init()
    singles = []
    for step in range(12):
        state, sums = trainer.dispatch(state, *batches(step, 1))
        assert float(sums["steps"][0]) == step % 3 + 1  # a row averages over its own steps alone
        if (step + 1) % 3 == 0:
            singles.append((step + 1, float(sums["nats"][0] / sums["tokens"][0])))
    equal(state, whole)
    assert losses(rows) == singles


@pytest.mark.parametrize(
    "overrides",
    [pytest.param({}, marks=pytest.mark.slow), {"model.tie_embedding": True, "model.predict_ahead": 2}],
)
def test_a_loss_in_chunks_has_the_same_gradients_and_never_holds_all_logits(overrides):
    whole, batches = trainer_of(overrides)
    chunked, _ = trainer_of(overrides | {"train.loss_chunk": 7})  # 64 predictions do not divide by it
    windows = batches(0, 1)[0]
    targets = windows[0, :, 1:].astype(np.int32)
    targets[1, 3:9] = -1
    params = noisy_params(whole.model)
    key = jax.random.key(0)
    inputs = (params, (windows[0, :, :-1].astype(np.int32), targets, None), key)
    wanted, got = (jax.jit(t._gradients)(*inputs) for t in (whole, chunked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), wanted, got)
    size = f"[64,{whole.model.vocab_size}]", f"[4,16,{whole.model.vocab_size}]"
    texts = [str(jax.make_jaxpr(t._gradients)(*inputs)) for t in (whole, chunked)]
    assert any(s in texts[0] for s in size)
    assert not any(s in texts[1] for s in size)


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=pytest.mark.slow), "transformer"])
def test_accumulation_equals_one_big_batch(name):
    whole, rows = on_one_device(name)
    state, part_rows = run(*trainer_of({"model.backbone": name, "train.accumulation": 4}))
    np.testing.assert_allclose([x for _, x in losses(part_rows)], [x for _, x in losses(rows)], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, whole.params)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_only_the_targets_given_are_scored(parts):
    rates = {"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    trainer, batches = trainer_of(rates | {"train.accumulation": parts})
    windows, fresh = batches(0, 1)
    random = np.random.default_rng(0)
    targets = random.integers(0, TOKENIZER.vocab_size, windows[:, :, 1:].shape)
    targets[random.random(targets.shape) < 0.7] = -1
    targets[0, 0] = -1  # a row of which nothing is scored, and micro-batches of unequal counts

    def loss(params):
        logits, _ = trainer.model.apply({"params": params}, jnp.asarray(windows[0, :, :-1], jnp.int32))
        rows, places = np.nonzero(targets[0] >= 0)
        return -jnp.sum(jax.nn.log_softmax(logits)[rows, places, targets[0, rows, places]])

    params = noisy_params(trainer.model)
    nats, gradients = jax.jit(jax.value_and_grad(loss))(params)
    count = np.sum(targets >= 0)
    _, sums = trainer.dispatch(trainer.init().replace(params=params), windows, fresh, targets)
    np.testing.assert_allclose(sums["nats"][0], nats, rtol=1e-5)
    assert sums["tokens"][0] == count
    np.testing.assert_allclose(sums["grad_norm"][0], optax.tree.norm(gradients) / count, rtol=1e-4)


@pytest.mark.slow
def test_no_targets_means_the_next_token():
    trainer, batches = trainer_of()
    windows, fresh = batches(0, 3)
    one, _ = trainer.dispatch(trainer.init(), windows, fresh)
    other, _ = trainer.dispatch(trainer.init(), windows, fresh, windows[:, :, 1:])
    equal(one, other)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param("lstm", (2, 2, 1), marks=pytest.mark.slow), ("transformer", (2, 2, 1))]
    + [pytest.param(name, (1, 2, 2), marks=pytest.mark.slow) for name in SOME_BACKBONES]
    + [pytest.param("transformer", (4, 1, 1), marks=pytest.mark.slow)],  # parameters are copied, whatever they are
    ids=str,
)
def test_four_devices_give_the_losses_of_one(name, mesh):
    overrides = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    trainer, batches = trainer_of({"model.backbone": name, "optimizer.name": "adamw"} | overrides)
    state, sharded = run(trainer, batches)
    np.testing.assert_allclose(
        [x for _, x in losses(sharded)], [x for _, x in losses(on_one_device(name)[1])], rtol=1e-4
    )
    used = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
    assert used == {4}
    if mesh[1] * mesh[2] > 1:  # parameters are split, not copied
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ({"data.window": 64}, (1, 1, 1)),  # too few tokens to be worth it
        ({"data.window": 128}, (2, 1, 1)),
        ({"data.window": 1024}, (4, 1, 1)),
        ({"data.window": 1024, "data.batch_size": 6}, (3, 1, 1)),
        ({"data.window": 1024, "train.accumulation": 2}, (2, 1, 1)),
        ({"data.window": 1024, "mesh.fsdp": 2}, (2, 2, 1)),
        ({"data.window": 1024, "mesh.fsdp": 4, "mesh.tensor": 1}, (1, 4, 1)),
    ],
    ids=str,
)
def test_rows_go_to_as_many_devices_as_divide_them(overrides, shape):
    assert parallel.make_mesh(tiny({"mesh.data": None} | overrides)).devices.shape == shape


@pytest.mark.slow
def test_each_device_drops_other_units_and_keeps_its_rows():
    overrides = {"model.backbone": "lstm", "model.layers": 2, "model.dropout": 0.5, "data.order": "stream"}
    trainer, _ = trainer_of(overrides | {"mesh.data": 2})
    windows = np.broadcast_to(TOKENS[:17].astype(np.uint16), (1, 4, 17))
    state, _ = trainer.dispatch(trainer.init(), windows, np.ones(1, bool))
    for leaf in map(np.asarray, jax.tree.leaves(state.carry)):
        assert len(leaf) == 4
    assert not np.array_equal(leaf[:2], leaf[2:])  # of the second layer


def test_programs_of_one_device_take_what_every_device_has():
    for fsdp, devices in ((1, 1), (2, 4)):
        params = trainer_of({"mesh.data": 2, "mesh.fsdp": fsdp})[0].init().params
        for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(parallel.on_one(params)), strict=True):
            assert len(after.devices()) == devices
            np.testing.assert_array_equal(before, after)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="takes 8 x 1 x 1 = 8 devices, and there are 4"):
        parallel.make_mesh(tiny({"mesh.data": 8, "data.batch_size": 8}))


@pytest.mark.parametrize("name", ["muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adamw", "lion", "sgd"))])
def test_every_optimizer_learns(name):
    rate = {"adamw": 1e-2, "muon": 1e-2, "lion": 4e-3, "sgd": 0.3}[name]
    overrides = {"optimizer.name": name, "optimizer.learning_rate": rate, "train.steps": 40, "log.every_steps": 10}
    _, rows = run(*trainer_of(overrides))
    assert losses(rows)[-1][1] < losses(rows)[0][1] - 0.3


def test_muon_moves_hidden_matrices_and_adam_the_rest():
    trainer, _ = trainer_of({"optimizer.name": "muon"})
    chosen = jax.tree_util.tree_leaves_with_path(optimizers._is_hidden(trainer.abstract.params))
    names = {"/".join(str(getattr(k, "key", k)) for k in path) for path, hidden in chosen if hidden}
    assert names == {f"backbone/block_{i}/{m}/kernel" for i in range(1) for m in ("qkv", "out", "up", "down")}


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (1, 5), (3, 8, 24)], ids=str)
@pytest.mark.parametrize("decades", [0, 6])
def test_muon_takes_the_iterations_of_newton_and_schulz(shape, decades):
    random = np.random.default_rng(0)
    g = random.standard_normal(shape) * np.logspace(0, -decades, shape[-1])

    def plain(x):
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        return x

    expected = np.stack([plain(x) for x in g.reshape(-1, *shape[-2:])]).reshape(shape)
    got = jax.jit(optimizers._orthogonal, static_argnums=1)(g.astype(np.float32), 5)
    np.testing.assert_allclose(got, 0.2 * max(shape[-2:]) ** 0.5 * expected, atol=1e-3 if decades else 1e-5)


def test_muon_leaves_what_has_no_gradient():
    assert not np.any(optimizers._orthogonal(jnp.zeros((4, 8)), 5))
    of_rank_one = optimizers._orthogonal(jnp.ones((4, 8)), 5)
    np.testing.assert_allclose(np.linalg.svd(of_rank_one)[1][1:], 0, atol=1e-3)


@pytest.mark.slow
def test_weight_decay_acts_on_matrices_alone():
    trainer, batches = trainer_of({"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 50.0, "train.steps": 40})
    before = trainer.init().params
    after, _ = run(trainer, batches)
    shrunk = lambda path: float(optax.tree.norm(path(after.params)) / optax.tree.norm(path(before)))
    assert shrunk(lambda p: p["backbone"]["block_0"]["up"]["kernel"]) < 0.2
    assert shrunk(lambda p: p["final_norm"]["scale"]) > 0.5
    assert shrunk(lambda p: p["embedding"]) > 0.5


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_schedules_warm_up_and_end_where_they_should(name):
    config = tiny({"optimizer.schedule": name, "optimizer.warmup_steps": 10, "train.steps": 100}).optimizer
    curve = np.array([float(optimizers.schedule(config, 100)(s)) for s in range(101)])
    np.testing.assert_allclose(curve[:10], (np.arange(10) + 1) / 10, rtol=1e-5)
    np.testing.assert_allclose(curve.max(), 1, rtol=1e-5)
    np.testing.assert_allclose(curve[99], 1 if name == "constant" else 0.1, atol=0.02)
    assert (np.diff(curve[10:]) <= 1e-6).all()
    if name == "wsd":
        np.testing.assert_allclose(curve[10:79], 1, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_last_step_has_the_final_fraction_and_the_first_without_warm_up_the_peak(warmup):
    config = tiny({"optimizer.warmup_steps": warmup, "train.steps": 20}).optimizer
    for name, decay in (("cosine", 0.2), ("linear", 0.2), ("wsd", 0.2), ("wsd", 1.0)):
        shape = optimizers.schedule(dataclasses.replace(config, schedule=name, decay_fraction=decay), 20)
        np.testing.assert_allclose([shape(0), shape(19)], [1 / max(warmup, 1), 0.1], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    trainer, batches = trainer_of({"train.ema_decay": 0.9})
    state, _ = trainer.dispatch(trainer.init(), *batches(0, 2))
    poisoned = jax.tree.map(lambda p: p, state.params)
    poisoned["final_norm"]["scale"] = poisoned["final_norm"]["scale"].at[0].set(jnp.nan)
    before = jax.tree.map(np.asarray, (poisoned, state.opt_state, state.average))
    sick = state.replace(params=poisoned)
    after, sums = trainer.dispatch(sick, *batches(2, 1))
    equal((after.params, after.opt_state, after.average), before)
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.step)) == (1, 1, 3)
    assert np.isfinite(sums["nats"][0])


@pytest.mark.slow
def test_a_run_that_stays_non_finite_stops():
    overrides = {"optimizer.name": "sgd", "optimizer.learning_rate": 1e30, "train.max_skipped_steps": 3}
    with pytest.raises(loop.Diverged):
        run(*trainer_of(overrides))


@pytest.mark.slow
def test_the_average_is_the_average_and_is_what_is_evaluated():
    trainer, batches = trainer_of({"train.ema_decay": 0.5})
    state = trainer.init()
    expected = jax.tree.map(np.asarray, state.params)
    for step in range(6):
        state, _ = trainer.dispatch(state, *batches(step, 1))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.eval_params, expected)


def test_a_run_compiles_its_step_once():
    trainer, batches = trainer_of({"train.steps": 11, "train.steps_per_dispatch": 4})
    run(trainer, batches, until=5)
    assert trainer._dispatch._cache_size() == 1


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_not_from_run_to_run():
    trainer, batches = trainer_of({"model.dropout": 0.5, "optimizer.name": "sgd", "optimizer.learning_rate": 1e-9})
    window = batches(0, 1)
    seen = []
    for step in (0, 1, 0):
        state = trainer.init().replace(step=jnp.int32(step))
        # The head begins at zero: give it something to read.
        params = jax.tree.map(lambda p: p + 0.1, state.params)
        _, sums = trainer.dispatch(state.replace(params=params), *window)
        seen.append(float(sums["grad_norm"][0]))
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]


def test_clipping_bounds_the_update():
    config = tiny({"optimizer.name": "sgd", "optimizer.clip_norm": 0.01, "optimizer.learning_rate": 1.0}).optimizer
    optimizer = optimizers.build(config, 10)
    params = {"kernel": jnp.ones((3, 3))}
    gradients = {"kernel": jnp.full((3, 3), 100.0)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert float(optax.tree.norm(updates)) <= 0.01 * 2 + 0.1 * 3 * 1.01  # nesterov, and the weight decay

"""The contract that every backbone keeps, for every name in BACKBONES."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BACKBONES, SCANNED, noisy_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen import errors, models
from textgen.models import gru, lstm, mingru
from textgen.models.transformer import attend, attend_in_blocks, choose_implementation, fused

V = 11


def variant(name, overrides, *marks):
    label = "-".join([name, *(f"{key.split('.')[-1]}={value}" for key, value in overrides.items())])
    return pytest.param((name, overrides), id=label, marks=marks)


# What keeps the whole contract, and the variants that differ in how they treat the past.
SLOW = pytest.mark.slow
CONTRACT = [
    *(variant(name, {}) for name in BACKBONES),
    *(variant(name, {"model.scan_layers": True}, SLOW) for name in SCANNED),
]
VARIANTS = [
    *CONTRACT,
    variant("transformer", {"model.transformer.kv_heads": 2, "model.transformer.qk_norm": True}, SLOW),
    variant("transformer", {"model.context": 5}),
    variant("transformer", {"model.transformer.attention": "fused", "model.context": 6}, SLOW),
    variant(
        "transformer",
        {"model.transformer.positions": "learned", "model.context": 32, "model.norm": "layernorm"},
        SLOW,
    ),
    variant("transformer", {"model.transformer.activation": "swiglu", "model.tie_embedding": True}, SLOW),
    variant("mingru", {"model.mingru.activation": "swiglu", "model.norm": "layernorm"}, SLOW),
    variant("hybrid", {"model.context": 5, "model.recurrence": "associative"}, SLOW),
]


def make(name, *overrides):
    config = {"model.backbone": name, "model.layers": 2}
    for more in overrides:
        config |= more
    model = models.build(tiny(config), V)
    return model, noisy_params(model)


@pytest.fixture(params=VARIANTS, scope="module")
def built(request):
    model, params = make(*request.param)
    apply = jax.jit(lambda tokens, carry, lengths: model.apply({"params": params}, tokens, carry, lengths))
    return model, params, apply


def random_tokens(rows, steps, seed=1):
    return np.random.default_rng(seed).integers(0, V, (rows, steps)).astype(np.int32)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance)


# Compilation is what these tests cost: they share the shapes (3, 14), (3, 6) and (3, 1), with room for ROOM tokens.
ROOM = 14


@pytest.mark.parametrize("cuts", [(1,) * ROOM, (6, 1, 1, 6)])
def test_full_pass_equals_chunks_and_single_tokens(built, cuts):
    model, _, apply = built
    tokens = random_tokens(3, ROOM)
    full, none = apply(tokens, None, None)
    assert none is None
    carry, parts, start = model.init_carry(3, ROOM), [], 0
    for n in cuts:
        logits, carry = apply(tokens[:, start : start + n], carry, None)
        parts.append(logits)
        start += n
    close(np.concatenate(parts, 1), full)


@pytest.mark.slow
def test_a_carry_with_more_room_is_the_same_with_zeros_behind(built):
    model, _, apply = built
    tokens, lengths = random_tokens(3, 6), np.array([6, 2, 3], np.int32)
    carries = []
    for room in (7, ROOM):
        _, carry = apply(tokens, model.init_carry(3, room), lengths)
        _, carry = apply(tokens[:, :1], carry, None)
        carries.append(carry)
    place = lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)
    got, _ = apply(tokens, jax.tree.map(place, model.init_carry(3, ROOM), carries[0]), None)
    expected, _ = apply(tokens, carries[1], None)
    close(got, expected)


def test_ragged_batch_equals_each_row_alone(built):
    model, _, apply = built
    tokens, lengths = random_tokens(3, 6), np.array([6, 1, 0], np.int32)
    more = random_tokens(3, 1, seed=2)
    logits, carry = apply(tokens, model.init_carry(3, ROOM), lengths)
    after, carry = apply(more, carry, None)
    last, _ = apply(more, carry, None)
    for row, n in enumerate(lengths):
        alone = model.init_carry(1, ROOM)
        if n:
            expected, alone = apply(tokens[row : row + 1, :n], alone, None)
            close(logits[row, :n], expected[0])
        expected, alone = apply(more[row : row + 1], alone, None)
        close(after[row], expected[0])
        expected, _ = apply(more[row : row + 1], alone, None)
        close(last[row], expected[0])


@pytest.mark.slow
def test_next_token_equals_the_logits_after_the_last_real_token(built):
    model, params, apply = built
    tokens, lengths = random_tokens(3, 6), np.array([6, 2, 5], np.int32)
    full, _ = apply(tokens, model.init_carry(3, ROOM), lengths)
    next_token = jax.jit(lambda *a: model.apply({"params": params}, *a, method="next_token"))
    last, _ = next_token(tokens, model.init_carry(3, ROOM), lengths)
    close(last, full[np.arange(3), lengths - 1])


def test_no_prediction_depends_on_what_comes_after_it(built):
    _, _, apply = built
    tokens = random_tokens(3, ROOM)
    before = np.asarray(apply(tokens, None, None)[0])
    for t in range(1, ROOM):
        changed = tokens.copy()
        changed[:, t:] = (changed[:, t:] + 1) % V
        after = np.asarray(apply(changed, None, None)[0])
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before[:, t] - after[:, t]).max(-1) > 1e-4).all()  # but does depend on its own


def test_the_past_is_used(built):
    _, _, apply = built
    tokens = random_tokens(3, ROOM)
    for back in (1, 7):  # two layers that look back 4 tokens reach 8
        other = tokens.copy()
        other[:, -1 - back] = (other[:, -1 - back] + 1) % V
        moved = np.abs(np.asarray(apply(tokens, None, None)[0] - apply(other, None, None)[0]))
        assert (moved[:, -1].max(-1) > 1e-4).all()


@pytest.mark.parametrize("variant", CONTRACT)
def test_the_batch_is_the_first_axis_of_every_carry_leaf(variant):
    model, _ = make(*variant)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.init_carry(5, 9))} == {5}


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONTRACT)
def test_eval_shape_and_vmap_over_seeds(variant):
    model, _ = make(*variant, {"model.layers": 2 if variant[0] == "hybrid" else 1})
    tokens = random_tokens(2, 6)

    def made(key):
        params = model.init(key, tokens[:1, :1])["params"]
        return params, model.apply({"params": jax.tree.map(lambda p: p + 0.1, params)}, tokens)[
            0
        ]  # the head begins at 0

    shapes, _ = jax.eval_shape(made, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    stacked, together = jax.jit(jax.vmap(made))(keys)
    assert all(jax.tree.leaves(jax.tree.map(lambda s, p: (3, *s.shape) == p.shape, shapes, stacked)))
    alone = jax.jit(made)
    for i, key in enumerate(keys):
        params, logits = alone(key)
        close(together[i], logits)
        jax.tree.map(lambda s, p, i=i: close(s[i], p), stacked, params)


def gradient(model, params):
    tokens = random_tokens(2, 8)
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens)[0]))))(params)


@pytest.mark.parametrize("variant", CONTRACT)
def test_gradients_reach_every_parameter(variant):
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradient(*make(*variant))))


@pytest.mark.parametrize("variant", CONTRACT)
@pytest.mark.slow
def test_remat_changes_no_gradient(variant):
    plain, params = make(*variant)
    model, _ = make(*variant, {"model.remat": True})
    heeded = lambda model: "remat" in str(jax.make_jaxpr(lambda p: gradient(model, p))(params))
    assert (heeded(plain), heeded(model)) == (False, True)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), gradient(plain, params), gradient(model, params))


@pytest.mark.parametrize("variant", CONTRACT)
@pytest.mark.slow
def test_bfloat16_stays_near_float32(variant):
    tokens = random_tokens(2, 8)
    model, params = make(*variant)
    half, _ = make(*variant, {"model.compute_dtype": "bfloat16"})
    a, b = jax.jit(lambda p: (model.apply({"params": p}, tokens)[0], half.apply({"params": p}, tokens)[0]))(params)
    assert b.dtype == jnp.float32
    assert np.abs(np.asarray(a - b)).mean() < 0.1 * np.abs(np.asarray(a)).mean()


@pytest.mark.parametrize("variant", CONTRACT)
@pytest.mark.slow
def test_dropout_is_off_unless_training_and_keeps_the_mean(variant):
    model, params = make(*variant, {"model.dropout": 0.5})
    plain, _ = make(*variant)
    tokens = random_tokens(2, 8)

    @jax.jit
    def run(params, key):
        drawn, _ = model.apply({"params": params}, tokens, train=True, rngs={"dropout": key})
        return drawn, *(m.apply({"params": params}, tokens)[0] for m in (model, plain))

    one, still, expected = run(params, jax.random.key(0))
    other, _, _ = run(params, jax.random.key(1))
    close(still, expected)
    assert np.abs(np.asarray(one - other)).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_count_of_operations_is_xlas(variant):
    name, overrides = variant
    sizes = {"model.width": 128, "model.context": 512}
    sizes |= {f"model.{group}.feed_forward_width": 320 for group in ("transformer", "mingru")}
    layers = 1 if "model.scan_layers" in overrides else 2
    config = tiny({"model.backbone": name, "model.layers": layers} | overrides | sizes)
    model = models.build(config, V)
    # A scan's body is counted once, so nets with a loop over time take one token, and one over layers has one
    # layer. The whole square of attention is computed: as much as the causal half of a window nearly twice as long.
    for steps in (1, 64) if name == "transformer" else (1,):
        tokens = jax.ShapeDtypeStruct((8, steps), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        counted = jax.jit(lambda p, t: model.apply(p, t)[0]).lower(params, tokens).cost_analysis()["flops"]
        assert counted / (8 * steps) == pytest.approx(model.flops_per_token(2 * steps - 1), rel=0.1)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 40])
def test_attention_is_counted_over_what_each_token_sees(length):
    model = models.build(tiny({"model.backbone": "transformer", "model.context": 5}), V)
    seen = np.minimum(np.arange(length) + 1, 5).mean()
    got = model.flops_per_token(length) - model.flops_per_token(1)
    assert got == pytest.approx(4 * 16 * (seen - 1))


def test_dropout_keeps_the_stated_fraction():
    layer = models.layers.Dropout(0.25, shared=(1,))
    y = np.asarray(layer.apply({}, jnp.ones((64, 3, 101)), True, rngs={"dropout": jax.random.key(0)}))
    assert abs((y > 0).mean() - 0.75) < 0.02
    np.testing.assert_array_equal(y[:, 0], y[:, 2])  # one mask over the shared axis
    np.testing.assert_allclose(y[y > 0], 1 / 0.75)


def test_lstm_forget_gates_begin_open():
    model = models.build(tiny({"model.backbone": "lstm"}), V)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    np.testing.assert_array_equal(params["backbone"]["layer_0"]["bias"], np.repeat([0, 1, 0, 0], 16))


def plain_recurrence(projected, recurrent, h, c):
    """The definition, differentiated by JAX itself."""

    def step(state, p):
        h, c = state
        i, f, g, o = jnp.split(p + h @ recurrent, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    last, hidden = jax.lax.scan(step, (h, c), projected)
    return hidden, last


def plain_gru(projected, recurrent, bias, h):
    def step(h, p):
        (p_r, p_u, p_n), (q_r, q_u, q_n) = jnp.split(p, 3, -1), jnp.split(h @ recurrent, 3, -1)
        r, u = jax.nn.sigmoid(p_r + q_r), jax.nn.sigmoid(p_u + q_u)
        h = u * h + (1 - u) * jnp.tanh(p_n + r * (q_n + bias))
        return h, h

    last, hidden = jax.lax.scan(step, h, projected)
    return hidden, last


@pytest.mark.parametrize("steps", [pytest.param(1, marks=SLOW), 9])
@pytest.mark.parametrize(
    ("fast", "plain", "shapes"),
    [
        (lstm.recurrence, plain_recurrence, [(3, 20), (5, 20), (3, 5), (3, 5)]),
        (gru.recurrence, plain_gru, [(3, 15), (5, 15), (5,), (3, 5)]),
    ],
    ids=["lstm", "gru"],
)
def test_a_recurrence_and_its_gradients_equal_the_definition(fast, plain, shapes, steps):
    random = np.random.default_rng(0)
    shapes = [(steps, *shapes[0]), *shapes[1:]]
    args = [jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes]
    total = lambda f: lambda *a: sum(jnp.sum(jnp.sin(x) * (1 + i)) for i, x in enumerate(jax.tree.leaves(f(*a))))
    jax.tree.map(close, fast(*args), plain(*args))
    expected, got = (jax.jit(jax.grad(total(f), argnums=(0, 1, 2, 3)))(*args) for f in (plain, fast))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, expected)


@pytest.mark.parametrize("way", ["auto", "scan", "associative"])
def test_linear_recurrence_and_its_gradients_equal_the_definition(way):
    """Over a long window, with factors from 0 to 1."""
    random = np.random.default_rng(0)
    steps, shape = 2048, (2, 3)
    a = random.uniform(0, 1, (steps, *shape)) ** np.array([0.001, 0.1, 4])
    a[90::97], a[50:90] = 0, 1
    b, weights = random.standard_normal((2, steps, *shape))
    h = random.standard_normal(shape)

    # In float64: h_t = a_t h_(t-1) + b_t; g is the gradient of sum(weights h) by h_t.
    hidden, old, g = np.zeros_like(a), np.zeros_like(a), np.zeros_like(a)
    for t in range(steps):
        old[t] = hidden[t - 1] if t else h
        hidden[t] = a[t] * old[t] + b[t]
    for t in reversed(range(steps)):
        g[t] = weights[t] + (a[t + 1] * g[t + 1] if t + 1 < steps else 0)
    expected = hidden, g * old, g, a[0] * g[0]

    def check(a, b, h, weights):
        got, back = jax.vjp(functools.partial(mingru.linear_recurrence, way=way), a, b, h)
        return got, *back(weights)

    for got, wanted in zip(jax.jit(check)(*map(np.float32, (a, b, h, weights))), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(3, 6, context, h, g) for context in (1, 3, 7) for h, g in ((2, 1), (2, 2))])
    | st.sampled_from([(1, 1, 3, 2, 1), (1, 6, 3, 1, 1)]),  # few shapes, few compilations
    st.integers(0, 99),
)
def test_attention_equals_a_loop_over_tokens(shape, seed):
    rows, steps, context, h, g = shape
    random = np.random.default_rng(seed)
    q = random.standard_normal((rows, h, steps, 4)).astype(np.float32)
    k, v = random.standard_normal((2, rows, g, steps, 4)).astype(np.float32)
    positions = np.arange(steps, dtype=np.int32)[None]
    got = np.asarray(jax.jit(attend, static_argnums=3)(q, [(k, v, positions)], positions, context))
    for b in range(rows):
        for head in range(h):
            for t in range(steps):
                near = slice(max(t - context + 1, 0), t + 1)
                scores = k[b, head * g // h, near] @ q[b, head, t] / 2
                weights = np.exp(scores - scores.max())
                expected = weights @ v[b, head * g // h, near] / weights.sum()
                np.testing.assert_allclose(got[b, head, t], expected, atol=2e-6)


def with_gradients(f):
    """(q, k, v) -> (y, the gradients of sum(sin(y)))."""
    return jax.jit(lambda *a: (f(*a), jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2))(*a)))


@pytest.mark.parametrize(
    ("steps", "context"),
    [(64, 64), (65, 2), (130, 65), *(pytest.param(*p, marks=SLOW) for p in [(65, 1), (130, 200), (600, 77)])],
)
def test_attention_in_blocks_and_its_gradients_equal_that_of_all_at_once(steps, context):
    random = np.random.default_rng(0)
    q = random.standard_normal((2, 2, steps, 4)).astype(np.float32)
    k, v = random.standard_normal((2, 2, 1, steps, 4)).astype(np.float32)
    positions = np.arange(steps, dtype=np.int32)[None]
    one = lambda q, k, v: attend(q, [(k, v, positions)], positions, context)
    blocks = lambda q, k, v: attend_in_blocks(q, k, v, positions, context)
    jax.tree.map(close, with_gradients(blocks)(q, k, v), with_gradients(one)(q, k, v))


@pytest.mark.parametrize("context", [1, 3, 6, 9])
def test_fused_attention_and_its_gradients_equal_the_plain(context):
    random = np.random.default_rng(0)
    q = random.standard_normal((2, 4, 6, 8)).astype(np.float32)
    k, v = random.standard_normal((2, 2, 2, 6, 8)).astype(np.float32)
    positions = np.arange(6, dtype=np.int32)[None]
    plain = lambda q, k, v: attend(q, [(k, v, positions)], positions, context)
    jax.tree.map(close, with_gradients(lambda *a: fused(*a, context, "xla"))(q, k, v), with_gradients(plain)(q, k, v))


@pytest.fixture
def hopper(gpu, monkeypatch):
    """As on a GPU that has cuDNN's attention, as far as tracing asks."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    return gpu


BF16 = {"model.compute_dtype": "bfloat16", "model.width": 64}


@pytest.mark.parametrize(
    ("chosen", "overrides", "capability", "implementation"),
    [
        ("auto", {}, "9.0", "cudnn"),
        ("fused", {}, "8.0", "cudnn"),
        ("plain", {}, "9.0", None),
        ("auto", {}, "7.5", None),
        ("auto", {}, "gfx90a", None),
        ("auto", {"model.compute_dtype": "float32"}, "9.0", None),
        ("fused", {"model.compute_dtype": "float32"}, "9.0", "xla"),
        ("auto", {"model.width": 48}, "9.0", None),
        ("auto", {"model.width": 1024}, "9.0", None),
    ],
)
def test_cudnns_attention_is_taken_where_it_can_be_had(chosen, overrides, capability, implementation, hopper):
    hopper.compute_capability = capability
    config = tiny({"model.transformer.attention": chosen} | BF16 | overrides)
    assert choose_implementation(config.model) == implementation


def test_cudnns_attention_is_in_the_program_for_a_gpu(hopper):
    model = models.build(tiny({"model.context": 5, "model.transformer.kv_heads": 2} | BF16), V)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    loss = jax.grad(lambda p: jnp.sum(model.apply(p, random_tokens(2, 16))[0]))
    text = jax.jit(loss).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text


def test_on_a_cpu_auto_is_plain_and_fused_is_xlas_and_says_so_once(capsys):
    errors.note.cache_clear()
    program = {}
    for chosen in ("auto", "plain", "fused"):
        for _ in range(2):
            model, params = make("transformer", {"model.transformer.attention": chosen})
            program[chosen] = jax.jit(model.apply).lower({"params": params}, random_tokens(2, 6)).as_text()
    assert program["auto"] == program["plain"] != program["fused"]
    assert capsys.readouterr().err.count("XLA's, as cuDNN's cannot be had") == 1


def test_rotary_attention_knows_distances_alone():
    from textgen.models.transformer import angles, rotate

    random = np.random.default_rng(0)
    qk = jnp.asarray(random.standard_normal((1, 2, 6, 8)), jnp.float32)
    scores = []
    for shift in (0, 5000, 1_000_000):
        places = np.arange(6, dtype=np.int32)[None] + shift
        q, k = rotate(qk, angles(jnp.asarray(places), 8, 10_000.0), 1)
        scores.append(np.asarray(jnp.einsum("bhtk,bhsk->ts", q, k)))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)
    np.testing.assert_allclose(scores[2], scores[0], atol=3e-3)
    # Exact against float64, far out.
    exact = (np.arange(6) + 1_000_000)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    a, b = np.split(np.asarray(qk, np.float64)[0, 0], 2, -1)
    expected = np.concatenate([a * np.cos(exact) - b * np.sin(exact), a * np.sin(exact) + b * np.cos(exact)], -1)
    for positions in (places, jnp.asarray(places)):
        q, _ = rotate(qk, angles(positions, 8, 10_000.0), 1)
        np.testing.assert_allclose(np.asarray(q)[0, 0], expected, atol=2e-3)

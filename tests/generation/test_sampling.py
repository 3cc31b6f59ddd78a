"""Every transformation against its definition; the draw against a grid of uniforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from textgen.config import UserError
from textgen.generation import transforms

INF = np.inf
VOCABULARIES = st.sampled_from([1, 2, 5, 12])  # few shapes, few compilations
run = jax.jit(lambda chain, z: chain(z))
draw = jax.jit(transforms.draw)


def random_logits(rows, vocab, seed=0, ties=False):
    z = np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 2
    return np.round(z) if ties else z


def probabilities(logits):
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kept(transform, z):
    return np.isfinite(np.asarray(run(transform, jnp.asarray(z))))


# The definitions, slow and plain: sort the row, keep the first ones.
def keep_top_k(row, k):
    order = np.argsort(-row, kind="stable")
    return np.isin(np.arange(len(row)), order[: int(k)])


def keep_top_p(row, p):
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(probabilities(row)[order])
    count = int(np.sum(mass < p)) + 1
    return np.isin(np.arange(len(row)), order[:count])


@settings(max_examples=60, deadline=None)
@given(VOCABULARIES, st.integers(1, 14), st.booleans(), st.integers(0, 999))
def test_top_k_equals_sorting_and_keeps_exactly_k(vocab, k, ties, seed):
    z = random_logits(2, vocab, seed, ties)
    got = kept(transforms.top_k(k), z)
    np.testing.assert_array_equal(got, [keep_top_k(row, k) for row in z])
    assert (got.sum(-1) == min(k, vocab)).all()


@settings(max_examples=60, deadline=None)
@given(VOCABULARIES, st.floats(0.02, 0.99), st.booleans(), st.integers(0, 999))
def test_top_p_equals_sorting(vocab, p, ties, seed):
    z = random_logits(2, vocab, seed, ties)
    mass = np.cumsum(-np.sort(-probabilities(z)), -1)
    assume((np.abs(mass - p) > 1e-5).all())  # where float32 can tell
    np.testing.assert_array_equal(kept(transforms.top_p(p), z), [keep_top_p(row, p) for row in z])


def test_top_p_and_top_k_at_the_vocabulary_of_gpt2():
    z = random_logits(2, 50_257)
    np.testing.assert_array_equal(kept(transforms.top_k(50), z), [keep_top_k(row, 50) for row in z])
    got, p = kept(transforms.top_p(0.9), z), probabilities(z)
    mass = (p * got).sum(-1)
    least = np.where(got, p, 1).min(-1)
    assert ((mass > 0.9 - 1e-5) & (mass - least < 0.9 + 1e-5)).all()


def test_min_p_keeps_what_is_likely_enough_whatever_the_shift():
    z = np.log(np.array([[0.5, 0.25, 0.2, 0.05]], np.float32))
    for shift in (0, 100, -100):
        np.testing.assert_array_equal(kept(transforms.min_p(0.45), z + shift), [[True, True, False, False]])
    np.testing.assert_array_equal(kept(transforms.min_p(1.0), z), [[True, False, False, False]])
    assert kept(transforms.min_p(0.0), z).all()


@settings(max_examples=60, deadline=None)
@given(VOCABULARIES, st.floats(0.02, 0.99), st.integers(0, 999))
def test_cut_offs_equal_their_definitions(vocab, x, seed):
    z = random_logits(2, vocab, seed)
    for row, got in zip(z, kept(transforms.typical(x), z), strict=True):
        p = probabilities(row)
        distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
        order = np.argsort(distance, kind="stable")
        mass = np.cumsum(p[order])
        assume((np.abs(mass - x) > 1e-5).all())
        assume(vocab < 2 or np.diff(distance[order]).min() > 1e-5)
        np.testing.assert_array_equal(got, np.isin(np.arange(vocab), order[: int((mass < x).sum()) + 1]))
    p = probabilities(z)
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    largest = p == p.max(-1, keepdims=True)
    np.testing.assert_array_equal(kept(transforms.epsilon(x), z), (p >= x) | largest)
    np.testing.assert_array_equal(
        kept(transforms.eta(x), z), (p >= np.minimum(x, np.sqrt(x) * np.exp(-entropy))) | largest
    )
    sigma = z >= z.max(-1, keepdims=True) - 3 * x * z.std(-1, keepdims=True)
    np.testing.assert_array_equal(kept(transforms.top_n_sigma(3 * x), z), sigma)
    np.testing.assert_array_equal(kept(transforms.top_n_sigma(3 * x), z / 4), sigma)  # whatever the temperature


def test_identities():
    z = random_logits(3, 9)
    for transform in (
        transforms.temperature(1.0),
        transforms.top_p(1.0),
        transforms.top_k(9),
        transforms.min_p(0.0),
        transforms.typical(1.0),
        transforms.epsilon(0.0),
        transforms.eta(0.0),
        transforms.top_n_sigma(1e9),
    ):
        np.testing.assert_allclose(probabilities(run(transform, z)), probabilities(z), atol=1e-6)
    np.testing.assert_array_equal(run(transforms.chain(), z), z)


@pytest.mark.parametrize("ties", [False, True])
def test_four_ways_to_be_greedy(ties):
    z = random_logits(20, 7, ties=ties)
    for transform in (transforms.temperature(0.0), transforms.greedy(), transforms.top_k(1), transforms.top_p(1e-6)):
        got = np.asarray(run(transform, z))
        np.testing.assert_array_equal(np.argmax(got, -1), np.argmax(z, -1))
        assert (np.isfinite(got).sum(-1) == 1).all()
    cold = probabilities(run(transforms.temperature(1e-30), random_logits(20, 7)))
    np.testing.assert_array_equal(cold.max(-1), 1)


def test_temperature_is_the_textbooks_reweighting_and_its_entropy_rises_at_the_known_rate():
    z = random_logits(1, 6)
    for t in (0.3, 0.7, 1.0, 2.5):
        ours = probabilities(run(transforms.temperature(t), z))
        np.testing.assert_allclose(ours, transforms.reweight_distribution(probabilities(z), t), rtol=1e-5)
        np.testing.assert_allclose(ours, probabilities(z) ** (1 / t) / (probabilities(z) ** (1 / t)).sum(), rtol=1e-5)

    def entropy(t):
        p = transforms.reweight_distribution(probabilities(z), t)
        return -(p * np.log(p)).sum()

    t, step = 0.7, 1e-5  # dH/dT = Var_{p_T}(z) / T^3
    p = transforms.reweight_distribution(probabilities(z), t)
    variance = (p * z**2).sum() - (p * z).sum() ** 2
    np.testing.assert_allclose((entropy(t + step) - entropy(t - step)) / (2 * step), variance / t**3, rtol=1e-4)


def test_reweighting_keeps_zeros_at_zero_and_refuses_temperature_zero():
    np.testing.assert_allclose(transforms.reweight_distribution(np.array([0.0, 0.5, 0.5]), 0.5), [0, 0.5, 0.5])
    with pytest.raises(UserError, match="temperature must be above 0"):
        transforms.reweight_distribution(np.array([0.5, 0.5]), 0.0)


def test_removed_tokens_stay_removed_and_one_token_is_enough():
    z = np.array([[0.0, -INF, 1.0, -INF]], np.float32)
    for transform in (
        transforms.temperature(0.5),
        transforms.temperature(0.0),
        transforms.top_k(3),
        transforms.top_p(0.9),
        transforms.min_p(0.1),
        transforms.typical(0.9),
        transforms.eta(0.1),
        transforms.top_n_sigma(1.0),
    ):
        got = np.asarray(run(transform, z))
        assert not np.isnan(got).any()
        assert np.isneginf(got[0, [1, 3]]).all()
        np.testing.assert_array_equal(probabilities(run(transform, np.zeros((2, 1), np.float32))), 1)


def test_each_row_has_its_own_numbers():
    z = random_logits(3, 8)
    chain = transforms.chain(transforms.temperature([0.0, 0.5, 2.0]), transforms.top_k([1, 3, 8]))
    got = np.asarray(run(chain, z))
    for row, (t, k) in enumerate([(0.0, 1), (0.5, 3), (2.0, 8)]):
        alone = run(transforms.chain(transforms.temperature(t), transforms.top_k(k)), z[row : row + 1])
        np.testing.assert_allclose(got[row], np.asarray(alone)[0], rtol=1e-6)


def test_order_is_the_one_written():
    z = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    warm_first = run(transforms.chain(transforms.temperature(10.0), transforms.top_p(0.7)), z)
    cut_first = run(transforms.chain(transforms.top_p(0.7), transforms.temperature(10.0)), z)
    assert np.isfinite(warm_first).sum() == 3
    assert np.isfinite(cut_first).sum() == 2


def test_another_number_does_not_compile_again():
    traces = []

    @jax.jit
    def run(chain, z):
        traces.append(1)
        return chain(z)

    for t, p in [(0.5, 0.9), (1.0, 0.5), (0, 1)]:
        run(transforms.chain(transforms.temperature(t), transforms.top_p(p)), jnp.zeros((1, 4)))
    assert len(traces) == 1


@settings(max_examples=40, deadline=None)
@given(VOCABULARIES, st.integers(0, 999))
def test_the_draw_over_a_grid_of_uniforms_has_the_distribution(vocab, seed):
    z = random_logits(1, vocab, seed)
    z[0, np.random.default_rng(seed).integers(0, vocab, vocab // 2)] = -INF
    z[0, seed % vocab] = 0.0
    n = 1000
    tokens = np.asarray(draw(jnp.asarray(np.repeat(z, n, 0)), jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)))
    counts = np.bincount(tokens, minlength=vocab)
    assert np.abs(counts / n - probabilities(z)[0]).max() <= 1 / n + 1e-6
    assert (counts[np.isneginf(z[0])] == 0).all()


def test_the_draw_at_its_edges():
    z = jnp.array([[-INF, 0.0, 0.0, -INF]])
    below_one = np.nextafter(np.float32(1), np.float32(0))
    assert int(draw(z, jnp.array([0.0]))[0]) == 1
    assert int(draw(z, jnp.array([below_one]))[0]) == 2


def test_the_draw_from_a_large_vocabulary_inverts_the_running_sum():
    vocab, n = 50257, 50
    random = np.random.default_rng(0)
    z = random.normal(0, 3, (1, vocab)).astype(np.float32)
    z[0, random.integers(0, vocab, vocab // 2)] = -INF
    uniforms = random.random(n).astype(np.float32)
    tokens = np.asarray(draw(jnp.asarray(np.repeat(z, n, 0)), jnp.asarray(uniforms)))
    p = probabilities(z)[0]
    mass = np.cumsum(p)
    assert (p[tokens] > 0).all()
    assert (uniforms < mass[tokens] + 1e-6).all()
    assert (uniforms > (mass - p)[tokens] - 1e-6).all()


def test_a_chain_is_written_and_read():
    chain = transforms.parse("temperature(0.8), top_p(p=0.95), top_k(5)")
    assert str(chain) == "temperature(0.8), top_p(0.95), top_k(5)"
    assert str(transforms.parse(str(chain))) == str(chain)
    assert str(transforms.parse("")) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature(0.8)", "Did you mean 'temperature'"),
        ("temperature(-1)", "temperature must be 0 or more, got -1"),
        ("top_p(0)", r"top_p must lie in \(0, 1\], got 0"),
        ("top_p(1.5)", r"top_p must lie in \(0, 1\], got 1.5"),
        ("top_k(0)", "top_k must be a whole number of 1 or more; to keep all, leave it out, got 0"),
        ("top_k(2.5)", "top_k must be a whole number"),
        ("min_p(2)", r"min_p must lie in \[0, 1\], got 2"),
        ("temperature()", "has other arguments than temperature takes"),
        ("temperature(0.8", "A sampler is written like"),
        ("temperature", "A sampler is written like"),
        ("__import__('os')", "Unknown sampler"),
    ],
)
def test_what_is_wrong_with_a_chain_is_said(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text)


@settings(deadline=None)
@given(vocab=VOCABULARIES, seed=st.integers(0, 99), size=st.sampled_from([1.0, 1e-3, 1e4]))
def test_temperature_one_is_the_identity_to_the_last_bit(vocab, seed, size):
    z = jnp.asarray(random_logits(3, vocab, seed) * size).at[0, 0].set(-jnp.inf)
    assume(vocab > 1)
    np.testing.assert_array_equal(run(transforms.temperature(1.0), z), z)


def test_a_temperature_before_a_penalty_does_not_change_what_is_penalised():
    z = jnp.asarray([[3.0, 2.5, 0.0]])
    penalty = transforms.repetition_penalty(5.0)
    after = lambda *chain: follow(transforms.chain(*chain), z, [[0]])
    np.testing.assert_array_equal(after(transforms.temperature(1.0), penalty), after(penalty))
    np.testing.assert_allclose(after(penalty), [[0.6, 2.5, 0.0]], rtol=1e-6)


def follow(chain, logits, prompts):
    """What a chain makes of the logits after these prompts."""
    prompts = np.asarray(prompts, np.int32)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    moment = transforms.Moment(jnp.zeros(len(prompts), jnp.int32), jnp.zeros(len(prompts)))
    return chain.step(logits, chain.init(prompts, lengths, logits.shape[-1], prompts.shape[1] + 1), moment)[0]


@pytest.mark.parametrize("t", [1e-38, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_and_finite(t):
    z = jnp.asarray([[1e4, 9e3, -1e4], [-5.0, -1.0, -3.0]])
    np.testing.assert_allclose(probabilities(run(transforms.temperature(t), z)), [[1, 0, 0], [0, 1, 0]], atol=1e-6)


EXAMPLES = {
    "temperature": (0.7,), "greedy": (), "top_k": (3,), "top_p": (0.8,), "min_p": (0.2,), "typical": (0.7,),
    "epsilon": (0.1,), "eta": (0.1,), "top_n_sigma": (1.0,), "mirostat": (1.0, 0.1), "xtc": (0.1, 1.0),
    "temperature_schedule": (1.5, 0.5, 4), "repetition_penalty": (3.0,), "presence_penalty": (0.7,),
    "frequency_penalty": (0.7,), "no_repeat_ngram": (2,), "dry": (0.8, 1.75, 1), "logit_bias": ([1, 3], [2.5, -1.0]),
    "banned": ([0, 4],), "allowed": ([0, 1, 4],),
}  # fmt: skip


def test_there_is_an_example_of_every_transform():
    assert set(EXAMPLES) == set(transforms.TRANSFORMS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_temperature_one_before_a_transform_changes_nothing(name):
    transform = transforms.TRANSFORMS[name](*EXAMPLES[name])
    z, prompts = jnp.asarray(random_logits(3, 6)), [[0, 1, 0], [2, 2, 2], [5, 4, 3]]
    alone = follow(transforms.chain(transform), z, prompts)
    np.testing.assert_array_equal(follow(transforms.chain(transforms.temperature(1.0), transform), z, prompts), alone)

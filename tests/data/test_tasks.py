"""The tasks against their definitions in slow plain code, and their optima against enumeration."""

import itertools

import numpy as np
import pytest

from textgen.config import UserError
from textgen.data import tasks

WINDOW = 40


def drawn(name, window=WINDOW, seed=0, count=2):
    """(tokens [N, T+1], targets [N, T], best [N, T]) of a few batches."""
    parts = tasks.Batches(name, window=window, batch_size=16, seed=seed).with_best(3, count)
    return tuple(part.reshape(-1, part.shape[-1]) for part in parts)


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_batches_are_a_function_of_seed_and_step(name):
    batches = tasks.Batches(name, window=WINDOW, batch_size=4, seed=1)
    windows, fresh, targets = batches(5, 4)
    assert windows.shape == (4, 4, WINDOW + 1)
    assert targets.shape == (4, 4, WINDOW)
    assert fresh.all()
    for i in range(4):  # however the steps are cut, and whoever asks
        again = tasks.Batches(name, window=WINDOW, batch_size=4, seed=1)(5 + i, 1)
        np.testing.assert_array_equal(again[0][0], windows[i])
        np.testing.assert_array_equal(again[2][0], targets[i])
    assert any((windows[0] != windows[i]).any() for i in (1, 2, 3))
    other, _, _ = tasks.Batches(name, window=WINDOW, batch_size=4, seed=2)(5, 4)
    assert (other != windows).any()


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
@pytest.mark.parametrize("window", ["shortest", 41, 64])
def test_every_task_fills_its_windows_within_its_vocabulary(name, window):
    task = tasks.find(name)
    window = task.shortest if window == "shortest" else window
    tokens, targets, best = drawn(name, window)
    assert tokens.min() >= 0
    assert max(tokens.max(), targets.max()) < task.vocab_size
    assert targets.min() >= -1
    assert (targets >= 0).any()
    assert (best >= 0).all()
    assert not best[targets < 0].any()
    if task.determined:
        assert not best.any()


@pytest.mark.parametrize("name", ["copy", "associative_recall", "selective_copy", "counting", "dyck", "markov"])
def test_where_a_target_is_scored_it_is_the_next_token(name):
    tokens, targets, _ = drawn(name)
    assert ((targets == tokens[:, 1:]) | (targets == -1)).all()


def test_copy_repeats_the_string_and_scores_the_repetition():
    tokens, targets, _ = drawn("copy")
    lengths = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        n = row.index(tasks.SYMBOLS)
        lengths.add(n)
        assert row[:n] == row[n + 1 : 2 * n + 1]
        assert set(row[2 * n + 1 :]) <= {tasks.SYMBOLS + 1}
        assert wanted == [-1] * n + row[:n] + [-1] * (WINDOW - 2 * n)
    assert min(lengths) >= WINDOW // 4
    assert max(lengths) == WINDOW // 2
    assert len(lengths) > 5


def test_associative_recall_asks_for_what_it_has_shown():
    tokens, targets, _ = drawn("associative_recall")
    numbers, in_order = set(), 0
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = next(t for t in range(WINDOW) if wanted[t] >= 0) // 2
        numbers.add(pairs)
        shown = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(shown) == pairs  # no key twice
        assert all(key < tasks.KEYS <= value for key, value in shown.items())
        for t, target in enumerate(wanted):
            asks = t >= 2 * pairs and t % 2 == 0
            assert target == (shown[row[t]] if asks else -1)
        in_order += row[2 * pairs : 4 * pairs] == row[: 2 * pairs]
    assert numbers == set(range(WINDOW // 8, WINDOW // 4 + 1))
    assert 0.25 < in_order / len(tokens) < 0.75


def test_selective_copy_gathers_what_is_no_blank():
    tokens, targets, _ = drawn("selective_copy")
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        end = row.index(tasks.SYMBOLS + 1)
        kept = [x for x in row[:end] if x != tasks.SYMBOLS]
        assert len(kept) == WINDOW // 8
        assert wanted == [-1] * end + kept


@pytest.mark.parametrize(("name", "modulus"), [("parity", 2), ("modular_counting", 5)])
def test_modular_labels(name, modulus):
    tokens, targets, _ = drawn(name)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert set(row) == {0, 1}
        assert wanted == [sum(row[: t + 1]) % modulus for t in range(WINDOW)]


def test_permutations_are_products_in_S5():
    tokens, targets, _ = drawn("permutations", count=4)
    swap, cycle = (lambda x: [x[1], x[0], *x[2:]]), (lambda x: [*x[1:], x[0]])
    reached = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        cups = list(range(5))
        for letter, label in zip(row[:-1], wanted, strict=True):
            cups = cycle(cups) if letter else swap(cups)
            assert tasks.PERMUTATIONS[label].tolist() == cups
            reached.add(label)
    assert len(reached) == 120


def test_counting_strings_are_balanced_and_what_is_scored_is_determined():
    tokens, targets, _ = drawn("counting")
    seen = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        text = "".join("ab$"[x] for x in row)
        whole = text[: text.rfind("$") + 1].split("$")[:-1]
        for string in whole:
            n = len(string) // 2
            assert string == "a" * n + "b" * n
            assert 1 <= n <= WINDOW // 4
            seen.add(n)
        for t, target in enumerate(wanted):
            assert (target >= 0) == (text[t] != "a")  # after an a another may come, or not
            assert target in (-1, row[t + 1])
    assert seen == set(range(1, WINDOW // 4 + 1))


def test_dyck_words_are_balanced_and_no_deeper_than_they_may():
    tokens, _, best = drawn("dyck")
    deepest = 0
    for row, nats in zip(tokens.tolist(), best.tolist(), strict=True):
        stack = []
        for t, x in enumerate(row):
            if x < tasks.TYPES:
                probability = (1 if not stack else 0.5) / tasks.TYPES
                stack.append(x)
            else:
                probability = 1 if len(stack) == tasks.DEPTH else 0.5
                assert stack.pop() == x - tasks.TYPES
            assert len(stack) <= tasks.DEPTH
            deepest = max(deepest, len(stack))
            if t:
                np.testing.assert_allclose(nats[t - 1], -np.log(probability), atol=1e-12)
    assert deepest == tasks.DEPTH


def test_the_in_context_predictor_is_bayes():
    """Against the posterior mean of the matrix, integrated over many draws of its prior, weighted by likelihood."""
    tokens, _, best = drawn("in_context_markov", 16)
    weights = np.random.default_rng(0).dirichlet(np.ones(tasks.CHAIN), (200_000, tasks.CHAIN))
    for row, nats in zip(tokens[:3], best[:3], strict=True):
        likelihood = np.ones(len(weights))
        for t in range(8):
            step = weights[:, row[t], row[t + 1]]
            predicted = np.sum(likelihood * step) / np.sum(likelihood)
            np.testing.assert_allclose(np.exp(-nats[t]), predicted, rtol=0.03)
            likelihood *= step


def test_the_in_context_chain_has_its_prior():
    """Over the prior, two transitions from a state agree with probability 2 / (k + 1)."""
    tokens, _, _ = drawn("in_context_markov", 64, count=400)
    agree = []
    for row in tokens.tolist():
        first = {}
        for a, b in itertools.pairwise(row):
            if a in first and first[a] is not None:
                agree.append(first[a] == b)
                first[a] = None
            first.setdefault(a, b)
    expected = 2 / (tasks.CHAIN + 1)
    assert abs(np.mean(agree) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(agree))


def test_the_markov_chain_has_its_matrix_and_its_rate():
    tokens, _, best = drawn("markov", 64, count=200)
    counts = np.zeros_like(tasks.MARKOV)
    for a, b, c in zip(tokens[:, :-2].ravel(), tokens[:, 1:-1].ravel(), tokens[:, 2:].ravel(), strict=True):
        counts[a, b, c] += 1
    pairs = counts.sum(-1)
    error = np.abs(counts / np.maximum(pairs, 1)[..., None] - tasks.MARKOV)
    assert (error * np.sqrt(np.maximum(pairs, 1))[..., None] < 3)[pairs > 0].all()
    # The rate once more, from powers of the chain instead of its eigenvector.
    frequency = np.full((6, 6), 1 / 36)
    for _ in range(500):
        frequency = np.einsum("ab,abc->bc", frequency, tasks.MARKOV)
    rate = -np.sum(frequency[..., None] * tasks.MARKOV * np.log(tasks.MARKOV))
    np.testing.assert_allclose(tasks.find("markov").entropy_rate(), rate, rtol=1e-9)
    nats = best[:, 1:].mean(1)
    assert abs(nats.mean() - rate) < 5 * nats.std() / np.sqrt(len(nats))


def hidden_probability(string):
    """P(string) of the hidden chain, summed over every path of states."""
    start, total = tasks.stationary(tasks.HIDDEN), 0.0
    for path in itertools.product(range(3), repeat=len(string)):
        p = start[path[0]]
        for t, (state, x) in enumerate(zip(path, string, strict=True)):
            p *= tasks.EMITTED[state, x] * (tasks.HIDDEN[path[t - 1], state] if t else 1)
        total += p
    return total


def test_the_forward_algorithm_equals_the_sum_over_paths(monkeypatch):
    monkeypatch.setattr(tasks, "SETTLED", 0)
    tokens, _, best = drawn("hidden_markov", 20)
    for row, nats in zip(tokens[:4].tolist(), best[:4], strict=True):
        for t in range(6):
            expected = hidden_probability(row[: t + 2]) / hidden_probability(row[: t + 1])
            np.testing.assert_allclose(np.exp(-nats[t]), expected, rtol=1e-9)


def test_the_bounds_of_the_hidden_chain_are_entropies_of_short_strings():
    strings = lambda n: np.array([hidden_probability(s) for s in itertools.product(range(4), repeat=n)])
    entropy = lambda p: -np.sum(p * np.log(p))
    np.testing.assert_allclose(strings(4).sum(), 1, rtol=1e-12)
    _, upper = tasks.hidden_markov_bounds(4)
    np.testing.assert_allclose(upper, entropy(strings(4)) - entropy(strings(3)), rtol=1e-9)
    bounds = [tasks.hidden_markov_bounds(n) for n in (2, 3, 5, 9)]
    assert all(a[0] < b[0] < b[1] < a[1] for a, b in itertools.pairwise(bounds))
    low, high = tasks.hidden_markov_bounds()
    assert high - low < 1e-4


@pytest.mark.parametrize("name", ["hidden_markov", "dyck", "markov"])
def test_the_best_predictor_pays_the_entropy_rate_in_the_long_run(name):
    _, targets, best = drawn(name, 256, count=40)
    nats = np.array([row[wanted >= 0].mean() for row, wanted in zip(best, targets, strict=True)])
    error = nats.std(ddof=1) / np.sqrt(len(nats))
    # A Dyck word begins at depth 0, which costs a little more.
    assert abs(nats.mean() - tasks.find(name).entropy_rate()) < 4 * error + (0.005 if name == "dyck" else 0)


def test_what_cannot_be_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"Unknown task 'parety'.* Did you mean 'parity'"):
        tasks.Batches("parety", window=8, batch_size=1, seed=0)
    with pytest.raises(UserError, match="'associative_recall' fills windows of 16 to 128 tokens, got 12"):
        tasks.Batches("associative_recall", window=12, batch_size=1, seed=0)
    with pytest.raises(UserError, match="'hidden_markov' fills windows of 17"):
        tasks.Batches("hidden_markov", window=16, batch_size=1, seed=0)

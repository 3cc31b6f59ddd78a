"""Synthetic tasks whose best predictor is known exactly: what text hides, a probe shows.

Every row of a task is a function of its own uniform numbers, and these are a function of
(seed, step); so are the batches. Beside the tokens comes what to predict after each of them, and
what the best predictor pays for it. Where the answer is a label, as in parity, it is a target and
never an input: nothing can be looked up.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Integer

from textgen.config import did_you_mean, require

Drawn = tuple[Integer[np.ndarray, "N T1"], Integer[np.ndarray, "N T"], Float[np.ndarray, "N T"]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A distribution over windows, with its best predictor.

    Attributes:
      vocab_size: tokens and targets lie below it.
      uniforms: how many uniform numbers a token takes.
      draw: (uniforms [N, T+1, uniforms]) -> (tokens [N, T+1], targets [N, T], best [N, T]): target t
        is to be predicted from tokens 0 ... t, -1 where nothing is scored; best is -ln of the
        probability that the best predictor gives it, 0 where nothing is scored.
      shortest, longest: the windows T that it can fill.
      entropy_rate: nats per prediction of an endless sequence, the least that any predictor can
        pay in the long run; 0: every scored target is determined; None: it depends on the length.
    """

    vocab_size: int
    uniforms: int
    draw: Callable[[Float[np.ndarray, "N T1 U"]], Drawn]
    shortest: int
    longest: int
    entropy_rate: Callable[[], float | None]

    @property
    def determined(self) -> bool:
        """Whether every scored target follows from what came before it."""
        return self.entropy_rate() == 0


class Batches:
    """The windows of a task, as `loop.Trainer.dispatch` takes them: a pure function of (seed, step).

    Raises:
      UserError: no task has that name, or it cannot fill such a window.
    """

    steps_per_epoch = float("inf")  # nothing is seen twice

    def __init__(self, name: str, *, window: int, batch_size: int, seed: int):
        self.task = find(name)
        low, high = self.task.shortest, self.task.longest
        require(low <= window <= high, f"The task '{name}' fills windows of {low} to {high} tokens, got {window}.")
        self.window, self.batch_size, self.seed = window, batch_size, seed

    def __call__(
        self, step: int, count: int
    ) -> tuple[Integer[np.ndarray, "K B T1"], Bool[np.ndarray, "K"], Integer[np.ndarray, "K B T"]]:
        """(windows, fresh, targets) of `count` steps from `step` on; see `loop.Trainer.dispatch`."""
        tokens, targets, _ = self.with_best(step, count)
        return tokens, np.ones(count, bool), targets

    def with_best(
        self, step: int, count: int
    ) -> tuple[Integer[np.ndarray, "K B T1"], Integer[np.ndarray, "K B T"], Float[np.ndarray, "K B T"]]:
        """(windows, targets, nats of the best predictor) of `count` steps from `step` on."""
        shape = (self.batch_size, self.window + 1, self.task.uniforms)
        generators = [np.random.Generator(np.random.Philox(key=[self.seed, s])) for s in range(step, step + count)]
        uniforms = np.concatenate([g.random(shape) for g in generators])
        tokens, targets, best = self.task.draw(uniforms)
        cut = lambda a: a.reshape(count, self.batch_size, -1)
        return cut(tokens.astype(np.int32)), cut(targets.astype(np.int32)), cut(best)


def find(name: str) -> Task:
    """The task of that name in TASKS.

    Raises:
      UserError: there is none.
    """
    require(name in TASKS, f"Unknown task '{name}'.{did_you_mean(name, TASKS)}")
    return TASKS[name]


# ---------------------------------------------------------------------------------------- recall

SYMBOLS = 16  # of copy and selective copy
KEYS, VALUES = 32, 16  # of associative recall, as tokens of their own


def _pick(u: np.ndarray, count: int) -> np.ndarray:
    return (u * count).astype(np.int64)


def _next_where(tokens: np.ndarray, scored: np.ndarray) -> Drawn:
    """The next token is the target where it is scored, and is determined there."""
    return tokens, np.where(scored, tokens[:, 1:], -1), np.zeros(scored.shape)


def _copy(u: np.ndarray) -> Drawn:
    """A string of T/4 to T/2 symbols, a separator, the string again, padding; the second string is scored."""
    most = (u.shape[1] - 1) // 2
    length = most // 2 + _pick(u[:, 0, 1], most - most // 2 + 1)[:, None]
    at = np.arange(u.shape[1])[None]
    string = _pick(u[..., 0], SYMBOLS)
    repeated = np.take_along_axis(string, np.maximum(at - length - 1, 0), 1)
    tokens = np.where(at < length, string, np.where(at == length, SYMBOLS, repeated))
    tokens = np.where(at > 2 * length, SYMBOLS + 1, tokens)
    return _next_where(tokens, (at[:, 1:] > length) & (at[:, 1:] <= 2 * length))


def _associative_recall(u: np.ndarray) -> Drawn:
    """T/8 to T/4 pairs of a key and its value, then keys at random, each with its value, which is scored.

    Multi-query associative recall (Arora et al. 2023). In half of the rows each key is first asked
    for once in the order shown, which is easier.
    """
    rows, size, _ = u.shape
    most = (size - 1) // 4
    pairs = most // 2 + _pick(u[:, 0, 3], most - most // 2 + 1)[:, None]
    keys = np.argsort(u[..., :2].reshape(rows, -1)[:, :KEYS], 1)[:, :most]
    values = KEYS + _pick(u[:, :most, 2], VALUES)
    at = np.arange((size + 1) // 2)[None]
    which = (u[:, 2:, 3][:, : at.size] * pairs).astype(np.int64)
    in_order = (at < pairs) | ((at < 2 * pairs) & (u[:, 1, 3] < 0.5)[:, None])
    which = np.repeat(np.where(in_order, at % pairs, which), 2, 1)[:, :size]  # [N, T+1], of the row's pairs
    value = np.arange(size) % 2 == 1
    tokens = np.where(value, np.take_along_axis(values, which, 1), np.take_along_axis(keys, which, 1))
    return _next_where(tokens, (value & (np.arange(size) >= 2 * pairs))[:, 1:])


def _selective_copy(u: np.ndarray) -> Drawn:
    """T/8 symbols at random places among blanks, a separator, the symbols in their order, which is scored.

    Gu and Dao 2023.
    """
    rows, size, _ = u.shape
    count = (size - 1) // 8
    body = size - 1 - count
    places = np.sort(np.argsort(u[:, :body, 0], 1)[:, :count], 1)
    symbols = _pick(u[:, :count, 1], SYMBOLS)
    tokens = np.full((rows, size), SYMBOLS)
    np.put_along_axis(tokens, places, symbols, 1)
    tokens[:, body] = SYMBOLS + 1
    tokens[:, body + 1 :] = symbols
    return _next_where(tokens, np.broadcast_to(np.arange(1, size) > body, (rows, size - 1)))


# ------------------------------------------------------------------------------------ state tracking


def _labels(tokens: np.ndarray, states: np.ndarray) -> Drawn:
    """The state after each token is its target."""
    return tokens, states[:, :-1], np.zeros(states[:, :-1].shape)


def _modular(modulus: int) -> Callable[[np.ndarray], Drawn]:
    """Random bits; after each, the number of ones so far, modulo `modulus`. Parity: modulo 2."""

    def draw(u: np.ndarray) -> Drawn:
        bits = _pick(u[..., 0], 2)
        return _labels(bits, np.cumsum(bits, 1) % modulus)

    return draw


PERMUTATIONS = np.array(list(itertools.permutations(range(5))))  # [120, 5]
GENERATORS = np.array([[1, 0, 2, 3, 4], [1, 2, 3, 4, 0]])  # a swap and a cycle: together they make all of S5


@cache
def _products() -> np.ndarray:
    """[120, 2]: the number of the permutation that follows p when generator g is applied after it."""
    number = {tuple(p): i for i, p in enumerate(PERMUTATIONS.tolist())}
    return np.array([[number[tuple(p[g].tolist())] for g in GENERATORS] for p in PERMUTATIONS])


def _permutations(u: np.ndarray) -> Drawn:
    """A word over two generators of S5; after each letter, which of the 120 permutations the word so far is.

    The word problem of a group that is not solvable (Barrington 1989; Merrill et al. 2024).
    """
    letters, table = _pick(u[..., 0], 2), _products()
    states = np.zeros_like(letters)
    now = np.zeros(len(letters), np.int64)
    for t in range(letters.shape[1]):
        states[:, t] = now = table[now, letters[:, t]]
    return _labels(letters, states)


# --------------------------------------------------------------------------------------- grammars

TYPES, DEPTH = 3, 4  # kinds of bracket, and how deep they nest


def _counting(u: np.ndarray) -> Drawn:
    """Strings a^n b^n $ one after the other, n uniform in 1 ... T/4; what is determined is scored: all from b on."""
    most = max((u.shape[1] - 1) // 4, 1)
    n = 1 + _pick(u[:, 0, 0], most)
    place = np.zeros_like(n)  # within the string
    tokens, determined = np.zeros((2, *u.shape[:2]), np.int64)
    for t in range(u.shape[1]):
        tokens[:, t] = (place >= n).astype(np.int64) + (place >= 2 * n)
        determined[:, t] = (place == 0) | (place > n)
        ended = place == 2 * n
        n = np.where(ended, 1 + _pick(u[:, t, 1], most), n)
        place = np.where(ended, 0, place + 1)
    return _next_where(tokens, determined[:, 1:] > 0)


def _dyck(u: np.ndarray) -> Drawn:
    """Balanced brackets: open one of TYPES, or close the last, with equal chance; at depth 0 open, at DEPTH close."""
    rows, size, _ = u.shape
    stack, depth = np.zeros((rows, DEPTH), np.int64), np.zeros(rows, np.int64)
    tokens, best = np.zeros((rows, size), np.int64), np.zeros((rows, size))
    row = np.arange(rows)
    for t in range(size):
        free = (depth > 0) & (depth < DEPTH)
        opens = (depth == 0) | (free & (u[:, t, 0] < 0.5))
        kind = np.where(opens, _pick(u[:, t, 1], TYPES), stack[row, depth - 1])
        tokens[:, t] = np.where(opens, kind, TYPES + kind)
        best[:, t] = np.where(free, np.log(2), 0) + np.where(opens, np.log(TYPES), 0)
        stack[row[opens], depth[opens]] = kind[opens]
        depth = np.where(opens, depth + 1, depth - 1)
    return tokens, tokens[:, 1:], best[:, 1:]


def _dyck_rate() -> float:
    """Nats per bracket: the mean over the depths, each as often as the random walk between 0 and DEPTH visits it."""
    visits = np.ones(DEPTH + 1)
    visits[[0, -1]] = 0.5  # the walk turns back at both ends
    nats = np.full(DEPTH + 1, np.log(2) + np.log(TYPES) / 2)
    nats[[0, -1]] = np.log(TYPES), 0
    return float(visits @ nats / visits.sum())


# ------------------------------------------------------------------------------------------ chains

CHAIN = 4  # symbols of the chain whose matrix each row draws anew
# The second-order chain's: P(x | a, b), and the hidden chain's P(s' | s) and P(x | s), drawn once and kept.
MARKOV = np.random.Generator(np.random.Philox(key=[0, 0])).dirichlet(np.full(6, 0.6), (6, 6))
HIDDEN = np.array([[0.90, 0.08, 0.02], [0.03, 0.90, 0.07], [0.12, 0.03, 0.85]])
EMITTED = np.array([[0.80, 0.10, 0.05, 0.05], [0.05, 0.45, 0.45, 0.05], [0.10, 0.05, 0.05, 0.80]])


def _choose(probabilities: np.ndarray, u: np.ndarray) -> np.ndarray:
    """[N] numbers drawn from [N, k] probabilities."""
    return np.minimum((np.cumsum(probabilities, -1) <= u[:, None]).sum(-1), probabilities.shape[-1] - 1)


def stationary(matrix: Float[np.ndarray, "S S"]) -> Float[np.ndarray, "S"]:
    """How often a chain is in each of its states, in the long run."""
    size = len(matrix)
    return np.linalg.lstsq(np.vstack([matrix.T - np.eye(size), np.ones(size)]), np.r_[np.zeros(size), 1.0])[0]


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)


def _in_context(u: np.ndarray) -> Drawn:
    """A Markov chain whose matrix is each row's own, its rows uniform over the simplex, Dirichlet(1, ..., 1).

    The best predictor is Laplace's: (n_ij + 1) / (n_i + CHAIN), with the counts so far.
    """
    rows, size, _ = u.shape
    weights = -np.log1p(-u[:, : CHAIN * CHAIN, 1].reshape(rows, CHAIN, CHAIN))
    matrix = weights / weights.sum(-1, keepdims=True)
    row = np.arange(rows)
    tokens, best = np.zeros((rows, size), np.int64), np.zeros((rows, size - 1))
    counts = np.ones((rows, CHAIN, CHAIN))
    tokens[:, 0] = _pick(u[:, 0, 0], CHAIN)
    for t in range(1, size):
        old = tokens[:, t - 1]
        new = tokens[:, t] = _choose(matrix[row, old], u[:, t, 0])
        best[:, t - 1] = -np.log(counts[row, old, new] / counts[row, old].sum(-1))
        counts[row, old, new] += 1
    return tokens, tokens[:, 1:], best


def _pairs() -> np.ndarray:
    """[36, 36] the second-order chain as a chain of pairs: (a, b) -> (b, x)."""
    size = len(MARKOV)
    matrix = np.zeros((size, size, size, size))
    for b in range(size):
        matrix[:, b, b, :] = MARKOV[:, b, :]
    return matrix.reshape(size * size, size * size)


def _markov(u: np.ndarray) -> Drawn:
    """A second-order Markov chain over 6 symbols, begun in its stationary state; scored where two symbols are known."""
    rows, size, _ = u.shape
    tokens, best = np.zeros((rows, size), np.int64), np.zeros((rows, size - 1))
    pair = _choose(np.broadcast_to(stationary(_pairs()), (rows, 36)), u[:, 0, 0])
    tokens[:, 0], tokens[:, 1] = pair // 6, pair % 6
    for t in range(2, size):
        now = MARKOV[tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = _choose(now, u[:, t, 0])
        best[:, t - 1] = -np.log(np.take_along_axis(now, tokens[:, t : t + 1], 1)[:, 0])
    targets = tokens[:, 1:].copy()
    targets[:, 0] = -1
    return tokens, targets, best


def _markov_rate() -> float:
    return float(stationary(_pairs()) @ _entropy(MARKOV).ravel())


SETTLED = 16  # predictions after which the hidden chain's filter has forgotten how it began


def _hidden_markov(u: np.ndarray) -> Drawn:
    """A chain of 3 hidden states that keep for about ten steps, seen through 4 symbols; scored once it has settled.

    The best predictor is the forward algorithm (Rabiner 1989).
    """
    rows, size, _ = u.shape
    tokens, best = np.zeros((rows, size), np.int64), np.zeros((rows, size))
    belief = np.broadcast_to(stationary(HIDDEN), (rows, len(HIDDEN)))  # P(state now | symbols before)
    state = _choose(belief, u[:, 0, 0])
    for t in range(size):
        symbol = tokens[:, t] = _choose(EMITTED[state], u[:, t, 1])
        joint = belief * EMITTED[:, symbol].T
        seen = joint.sum(-1, keepdims=True)
        best[:, t] = -np.log(seen[:, 0])
        belief = joint / seen @ HIDDEN
        if t + 1 < size:
            state = _choose(HIDDEN[state], u[:, t + 1, 0])
    scored = np.broadcast_to(np.arange(1, size) > SETTLED, (rows, size - 1))
    return tokens, np.where(scored, tokens[:, 1:], -1), np.where(scored, best[:, 1:], 0)


@cache
def hidden_markov_bounds(length: int = 10) -> tuple[float, float]:
    """Two numbers with the entropy rate of the hidden chain between them, in nats.

    H(X_n | X_1 ... X_n-1, S_1) <= rate <= H(X_n | X_1 ... X_n-1) (Cover and Thomas, theorem
    4.5.1), both by summing over all strings of n = `length` symbols.
    """
    start = stationary(HIDDEN)

    def last(first: np.ndarray) -> np.ndarray:
        """H(X_1 ... X_n | S_1) - H(X_1 ... X_n-1 | S_1) for each row of `first`, a distribution of S_1."""
        joint, entropies = first[:, None, :], []  # [R, strings, S]: P(string, state after it)
        for _ in range(length):
            joint = (joint[:, :, None, :] * EMITTED.T) @ HIDDEN  # [R, strings, X, S]
            joint = joint.reshape(len(first), -1, len(start))
            entropies.append(_entropy(joint.sum(-1)))
        return entropies[-1] - entropies[-2]

    return float(start @ last(np.eye(len(start)))), float(last(start[None])[0])


def _hidden_markov_rate() -> float:
    """The middle of the bounds, which lie within 1e-4 of it."""
    return sum(hidden_markov_bounds()) / 2


FAR = 1 << 16
_none = lambda: None
_zero = lambda: 0.0

TASKS = {
    "copy": Task(SYMBOLS + 2, 2, _copy, 4, FAR, _zero),
    "associative_recall": Task(KEYS + VALUES, 4, _associative_recall, 16, 4 * KEYS, _zero),
    "selective_copy": Task(SYMBOLS + 2, 2, _selective_copy, 8, FAR, _zero),
    "parity": Task(2, 1, _modular(2), 1, FAR, _zero),
    "modular_counting": Task(5, 1, _modular(5), 1, FAR, _zero),
    "permutations": Task(len(PERMUTATIONS), 1, _permutations, 1, FAR, _zero),
    "counting": Task(3, 2, _counting, 4, FAR, _zero),
    "dyck": Task(2 * TYPES, 2, _dyck, 1, FAR, _dyck_rate),
    "in_context_markov": Task(CHAIN, 2, _in_context, CHAIN * CHAIN, FAR, _none),
    "markov": Task(len(MARKOV), 1, _markov, 2, FAR, _markov_rate),
    "hidden_markov": Task(EMITTED.shape[1], 2, _hidden_markov, SETTLED + 1, FAR, _hidden_markov_rate),
}

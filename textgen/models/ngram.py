"""Interpolated Kneser-Ney n-grams: a model that is counted, not trained.

Kneser and Ney 1995; Chen and Goodman 1999:

    p(w | h) = max(c(hw) - D, 0) / c(h.)  +  backoff(h) p(w | h without its first token)

c counts occurrences in the longest n-grams, and in shorter ones the distinct tokens that stand
before them. backoff(h) is the mass that the discounts took, so that the sum over w is 1. Below
the single token is the uniform distribution, so that no token is impossible. D is one number,
or, in the modified form, estimated for each order and for counts of 1, 2, and 3 or more.

The contexts seen in training form a tree: context hw is a successor of context h. A level holds
the contexts of one length, and their successors in the order of (context, token), so that a
context's successors lie side by side and the next level's contexts are numbered like them.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from textgen.config import require

Tables = dict[str, Any]  # what `fit` gives; see there
Lengths = Integer[Array | np.ndarray, "B"]


@dataclasses.dataclass(frozen=True)
class NGram:
    """A language model as LanguageModel is one, whose parameters are the tables of `fit`.

    Its carry holds, for each row, the numbers of the contexts that end at its last token, of
    lengths 1 to order - 1; -1 where training never saw the context go on.
    """

    order: int
    vocab_size: int
    max_positions: int | None = None  # there is no longest sequence

    def init_carry(self, batch_size: int, max_length: int) -> Integer[Array, "B C"]:
        """An empty past. Its size does not depend on `max_length`."""
        del max_length
        return jnp.full((batch_size, self.order - 1), -1, jnp.int32)

    def apply(
        self,
        variables: dict[str, Tables],
        tokens: Integer[Array | np.ndarray, "B T"],
        carry: Integer[Array | np.ndarray, "B C"] | None = None,
        lengths: Lengths | None = None,
        *,
        method: str | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "..."], Integer[Array, "B C"] | None]:
        """ln p of the token after each of `tokens`, and the past with them added; as LanguageModel.

        Returns:
          [B, T, V], or with method="next_token" [B, V] after each row's last real token; the carry.
        """
        del train
        tables = variables["params"]
        rows, steps = tokens.shape
        tokens = jnp.asarray(tokens, jnp.int32)
        past = self.init_carry(rows, 0) if carry is None else jnp.asarray(carry)
        contexts = _contexts(tables, tokens, past)  # [B, T, C]
        taken = jnp.full((rows,), steps) if lengths is None else jnp.asarray(lengths)
        everything = jnp.concatenate([past[:, None], contexts], axis=1)  # before the first token, after the first, ...
        last = jnp.take_along_axis(everything, taken[:, None, None], axis=1)[:, 0]  # [B, C]
        p = _distribution(tables, last if method == "next_token" else contexts)
        logits = jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))  # many small backoffs can underflow
        return logits, None if carry is None else last


def _contexts(tables: Tables, tokens: Any, past: Any) -> Any:
    """[B, T, C] the contexts that end at each token. One level is found from the one before, at all tokens at once."""
    levels = tables["levels"]
    found = [tokens] if past.shape[-1] else []  # every token is a context of length 1
    for k in range(1, past.shape[-1]):
        before = jnp.concatenate([past[:, None, k - 1], found[-1][:, :-1]], axis=1)  # [B, T]
        successors, inside = _successors(levels[str(k)], before)
        same = inside & (levels[str(k)]["token"][successors] == tokens[..., None])
        # At most one is the same, and where it is the context of length k + 1 has its number.
        found.append(jnp.max(jnp.where(same, successors, -1), axis=-1))
    return jnp.stack(found, -1) if found else jnp.zeros((*tokens.shape, 0), jnp.int32)


def _successors(level: Tables, context: Any) -> tuple[Any, Any]:
    """[..., M] the numbers of a context's successors, and which of these places are taken."""
    known = jnp.maximum(context, 0)
    first, end = level["first"][known], level["first"][known + 1]
    successors = first[..., None] + level["place"]
    return successors, (successors < end[..., None]) & (context >= 0)[..., None]


def _distribution(tables: Tables, contexts: Any) -> Any:
    """[..., V] the probability of each next token, from the shortest context to the longest."""
    shape = contexts.shape[:-1]
    contexts = contexts.reshape(math.prod(shape), contexts.shape[-1])  # [N, C]
    p = jnp.broadcast_to(tables["unigram"], (len(contexts), len(tables["unigram"])))
    row = jnp.arange(len(contexts))[:, None]
    for k in range(1, contexts.shape[-1] + 1):
        level, context = tables["levels"][str(k)], contexts[:, k - 1]
        successors, inside = _successors(level, context)
        # Beyond the last token: nothing is added there.
        token = jnp.where(inside, level["token"][successors], p.shape[-1])
        backoff = jnp.where(context >= 0, level["backoff"][jnp.maximum(context, 0)], 1.0)
        p = (p * backoff[:, None]).at[row, token].add(level["weight"][successors], mode="drop")
    return p.reshape(*shape, p.shape[-1])


def fit(tokens: Shaped[np.ndarray, "N"], order: int, vocab_size: int, discount: float | None = None) -> Tables:
    """Counts a text.

    Args:
      tokens: ids below vocab_size.
      order: the longest n-grams; each token is predicted from the order - 1 before it.
      discount: in (0, 1], taken from every count. None: estimated, as `discounts` does.

    Returns:
      The parameters of NGram(order, vocab_size):
      unigram: [V] probability of each token without a context, float32.
      levels: for contexts of each length "1" ... "order - 1":
        first: [contexts + 1] where each context's successors begin; the last is their number.
        backoff: [contexts] the factor of the shorter context's distribution, float32.
        token, weight: [successors] which token, and what is added to its probability.
        place: [M] 0, 1, ...; M is the most successors that a context has.

    Raises:
      UserError: order below 1, a text no longer than the order, a token outside the vocabulary.
    """
    require(order >= 1, f"The order of an n-gram model (model.ngram.order) must be 1 or more, got {order}.")
    require(
        len(tokens) > order,
        f"An n-gram model of order {order} takes a text of more than {order} tokens, got {len(tokens)}: "
        "lower model.ngram.order, or give a longer text.",
    )
    require(
        discount is None or 0 < discount <= 1,
        f"The discount of an n-gram model (model.ngram.discount) must lie in (0, 1], got {discount}; None: estimated.",
    )
    _check_vocabulary(tokens, vocab_size)
    levels = _levels(np.asarray(tokens, np.int64), order, vocab_size)
    # Of the longest n-grams the occurrences count, of the shorter ones the distinct longer ones that end in them.
    counts = []
    for (_, token, number), (_, longer_token, longer) in itertools.pairwise(levels):
        ending = np.empty(len(longer_token), np.int64)
        ending[longer] = number[1:]
        counts.append(np.bincount(ending, minlength=len(token)))
    counts.append(np.bincount(levels[-1][2], minlength=len(levels[-1][1])))

    weight, backoff = _discounted(counts[0], levels[0][0], discount)
    tables: Tables = {"unigram": np.float32(weight + backoff / vocab_size), "levels": {}}
    for k in range(1, order):
        first, token, _ = levels[k]
        weight, backoff = _discounted(counts[k], first, discount)
        tables["levels"][str(k)] = {
            "first": np.int32(first),
            "backoff": np.float32(backoff),
            "token": token.astype(np.uint16 if vocab_size <= 2**16 else np.int32),
            "weight": np.float32(weight),
            "place": np.arange(np.diff(first).max(), dtype=np.int32),
        }
    return tables


def _levels(tokens: Any, order: int, vocab_size: int) -> list[tuple[Any, Any, Any]]:
    """The distinct n-grams of each length 1 ... order, and where they stand.

    Returns:
      For each length: first, where the successors of each context begin, as in `fit`; the last token
      of each n-gram; and which n-gram ends at each place of the text that one can end at.
    """
    levels = [(np.array([0, vocab_size]), np.arange(vocab_size), tokens)]
    for _ in range(1, order):
        _, token, number = levels[-1]
        keys, longer = np.unique(number[:-1] * vocab_size + tokens[1 - len(number) :], return_inverse=True)
        first = np.searchsorted(keys, np.arange(len(token) + 1) * vocab_size)
        levels.append((first, keys % vocab_size, longer))
    return levels


def _discounted(counts: Any, first: Any, discount: float | None) -> tuple[Any, Any]:
    """(weight of each successor, backoff of each context) from the successors' counts."""
    by_count = discounts(counts) if discount is None else np.array([0, discount, discount, discount])
    taken = by_count[np.minimum(counts, 3)]
    sums = lambda x: np.diff(np.concatenate([[0.0], np.cumsum(x)])[first])
    total = sums(counts)
    nothing = total == 0  # at the text's end, or at its beginning alone
    share = np.repeat(1 / np.where(nothing, 1, total), np.diff(first))
    return (counts - taken) * share, np.where(nothing, 1.0, sums(taken) / np.where(nothing, 1, total))


def discounts(counts: Integer[np.ndarray, "M"]) -> Float[np.ndarray, "4"]:
    """What is taken from a count of 0, 1, 2, and of 3 or more (Chen and Goodman 1999, equation 26).

    With so few n-grams that the estimate fails, three quarters each.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)  # how often each count occurs
    if not n.all():
        return np.array([0, 0.75, 0.75, 0.75])
    y = n[0] / (n[0] + 2 * n[1])
    d = np.arange(1, 4) - np.arange(2, 5) * y * n[1:] / n[:-1]
    return np.concatenate([[0.0], np.clip(d, 0.05, np.arange(1, 4) - 0.05)])


def _check_vocabulary(tokens: Any, vocab_size: int) -> None:
    most = int(np.max(tokens, initial=0))
    require(
        most < vocab_size,
        f"The n-gram model's vocabulary has {vocab_size} tokens, and the text has token {most}: "
        "encode it with the tokenizer of the model.",
    )


def nats(tables: Tables, tokens: Shaped[np.ndarray, "N"]) -> Float[np.ndarray, "M"]:
    """-ln p of each token after the first, each from all that came before it, without JAX.

    Raises:
      UserError: a token outside the model's vocabulary.
    """
    unigram = np.asarray(tables["unigram"], np.float64)
    vocab_size = len(unigram)
    _check_vocabulary(tokens, vocab_size)
    tokens = np.asarray(tokens, np.int64)
    p = unigram[tokens[1:]]
    context = tokens[:-1]  # of length k, the one before tokens[k], tokens[k + 1], ...
    for k in range(1, len(tables["levels"]) + 1):
        level = {name: np.asarray(table) for name, table in tables["levels"][str(k)].items()}
        if len(context) == 0:
            break
        keys = np.repeat(np.arange(len(level["backoff"])) * vocab_size, np.diff(level["first"])) + level["token"]
        wanted = context * vocab_size + tokens[k:]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        seen = keys[place] == wanted  # a context of -1 makes a key below 0
        known = context >= 0
        p[k - 1 :] *= np.where(known, level["backoff"][context], 1.0)
        p[k - 1 :] += np.where(seen, level["weight"][place], 0.0)
        context = np.where(seen, place, -1)[:-1]
    return -np.log(p)


def adaptive_nats(
    train: Shaped[np.ndarray, "N"],
    tokens: Shaped[np.ndarray, "M1"],
    order: int,
    vocab_size: int,
    discount: float | None = None,
) -> Float[np.ndarray, "M"]:
    """-ln p of each token after the first where counting goes on: each from the counts of all before it, train first.

    `tokens` follows `train`. The discounts are those of `train`. This is another task than that of
    `nats`, which learns nothing from the text it predicts: report it in a column of its own.
    """
    _check_vocabulary(tokens, vocab_size)
    text = np.concatenate([train, tokens]).astype(np.int64)
    numbers = [number for _, _, number in _levels(text, order, vocab_size)]
    p = np.full(len(text), 1 / vocab_size)
    for k, gram in enumerate(numbers):  # gram[i] ends at the text's place i + k
        context = numbers[k - 1][:-1] if k else np.zeros_like(gram)
        counted = np.ones(len(gram), bool)
        if k + 1 < order:  # only when the n-gram that is longer by one appears for the first time
            counted[:] = False
            counted[1 + np.unique(numbers[k + 1], return_index=True)[1]] = True
        trained = gram[: len(train) - k][counted[: len(train) - k]]
        by_count = discounts(np.bincount(trained)) if discount is None else np.array([0, discount, discount, discount])
        count = _before(gram, counted)
        known = np.minimum(count, 3).astype(int)
        total = _before(context, counted)
        taken = _before(context, counted * np.append(np.diff(by_count), 0)[known])
        mixed = (count - by_count[known] + taken * p[k:]) / np.maximum(total, 1)
        p[k:] = np.where(total > 0, mixed, p[k:])
    return -np.log(p[len(train) + 1 :])


def _before(group: Any, values: Any) -> Any:
    """At each place, the sum of the values at earlier places of its group."""
    order = np.argsort(group, kind="stable")
    values = values[order].astype(np.float64)
    sums = np.cumsum(values) - values
    begins = np.concatenate([[True], np.diff(group[order]) != 0])
    result = np.empty(len(group))
    result[order] = sums - sums[begins][np.cumsum(begins) - 1]
    return result
